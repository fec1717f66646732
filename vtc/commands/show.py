"""`vtc show`: which tokens of a picture stay."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vtc.commands.shared import (
    A_MODEL,
    Calibration,
    Device,
    KeepText,
    MethodName,
    Options,
    Positions,
    build_config,
    clear_errors,
    pick_device,
)
from vtc.files import replacing, write_text
from vtc.values import shown

PICTURES, ANIMATIONS, PAGES = (".png", ".jpg", ".jpeg", ".webp"), (".gif",), (".html", ".htm")


def show(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    model: Annotated[str, typer.Argument(help=f"A checkpoint: {A_MODEL}.")] = "tinyvlm",
    method: MethodName = "divprune",
    keep: KeepText = "0.25",
    option: Options = None,
    positions: Positions = None,
    calibration: Calibration = None,
    question: Annotated[
        str, typer.Option("--question", "-q", help="What to ask; some methods choose by it.")
    ] = "What is in the picture?",
    out: Annotated[
        Path, typer.Option(help=".png: small multiples; .gif: an animation; .html: both, and tokens per layer.")
    ] = Path("vtc-show.png"),
    order: Annotated[bool, typer.Option("--order/--no-order", help="Colour the pick order.")] = True,
    size: Annotated[
        int | None, typer.Option(min=1, help="Pixels that the longer side of a panel has at least.")
    ] = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16, float16.")] = "auto",
) -> None:
    """Draw the visual tokens that stay over the picture, as the model saw it.

    Any-resolution models: the thumbnail and the mosaic of crops. Methods that drop tokens inside the language model:
    one drawing for each stage.
    """
    with clear_errors():
        _check_out(out)
        config = build_config(method, keep, option, positions, calibration)
        from vtc.viz.pixels import open_image

        picture = open_image(image)
        from vtc import viz
        from vtc.checkpoint import Checkpoint
        from vtc.patching import patch
        from vtc.viz.page import import_jinja, page

        if out.suffix.lower() in PAGES:
            import_jinja()  # or a missing one would be noticed when all is computed

        checkpoint = Checkpoint.load(model, device=pick_device(device), dtype=dtype)
        inputs = checkpoint.encode(picture, question)
        with patch(checkpoint.model, config) as handle:
            tokens = checkpoint.model.generate(**inputs, max_new_tokens=16, do_sample=False)
        answer = checkpoint.processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        caption = f"{question} {answer.strip()}"
        report = handle.report()
        settings: dict[str, Any] = {"order": order, "size": size, "caption": caption}
        if out.suffix.lower() in ANIMATIONS:
            with replacing(out) as written:
                viz.save_animation(viz.animate(handle, inputs, checkpoint.processor, **settings), written)
        else:
            drawing = viz.show(handle, inputs, checkpoint.processor, **settings)
            if out.suffix.lower() in PICTURES:
                with replacing(out) as written:
                    drawing.save(written)
            else:
                moving = viz.animate(handle, inputs, checkpoint.processor, **settings)
                drawings: list[Any] = [
                    ("kept visual tokens", drawing),
                    ("kept visual tokens, one stage after the other", moving),
                ]
                write_text(out, page(f"{handle.method.title}: {image.name}", report, drawings))
        typer.echo(str(report))
        segments = [s for images in handle.last_layouts or [] for layout in images for s in layout.segments]
        if any(segment.grid is None and segment.kind != "newline" for segment in segments):
            typer.echo("[this model does not tell where its tokens lie: they are drawn in their order]", err=True)
        typer.echo(f"[kept tokens drawn on {out}]", err=True)


def _check_out(out: Path) -> None:
    kinds = (*PICTURES, *ANIMATIONS, *PAGES)
    if out.suffix.lower() not in kinds:
        raise ValueError(f"--out {shown(str(out))} ends in none of {', '.join(kinds)}")
    if not out.resolve().parent.is_dir():
        raise ValueError(f"--out {shown(str(out))}: there is no folder {shown(str(out.resolve().parent))}")
