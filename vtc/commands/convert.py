"""`vtc convert`: published checkpoints in other layouts, as ones that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtc.commands.shared import clear_errors

convert = typer.Typer(help="Make a checkpoint that transformers loads of one in another layout.", no_args_is_help=True)


@convert.callback()
def _kinds() -> None:
    """So that the kind of checkpoint is named, though there is one."""


@convert.command()
def mqt(
    checkpoint: Annotated[
        Path, typer.Argument(help="Folder of a published MQT-LLaVA checkpoint: config.json and safetensors.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    vision_tower: Annotated[
        Path, typer.Option(help="Folder of the CLIP model it was trained with, which the checkpoint does not contain.")
    ],
    heads: Annotated[int, typer.Option(min=1, help="Attention heads of the resampler; no published field tells.")] = 16,
) -> None:
    """MQT-LLaVA in the layout of the original LLaVA code, for vtc.modules.load_mqt and `--method mqt`.

    Reads JSON and safetensors, never a pickle; a tensor that it does not know is refused by name.
    """
    with clear_errors():
        from tqdm import tqdm

        from vtc.modules.converting import convert_mqt

        with tqdm(desc="tensors", unit="") as bar:

            def report(name: str, done: int, of: int) -> None:
                bar.total, bar.n = of, done
                bar.set_postfix_str(name)

            made = convert_mqt(checkpoint, out, vision_tower, heads, report)
        typer.echo(f"{made.written} tensors written to {made.folder}")
        for what, names in (("recomputed when loaded", made.recomputed), ("of CLIP's text model", made.left_out)):
            if names:
                typer.echo(f"{len(names)} tensors left out, {what}: {names[0]} ...")
        if not made.processor:
            typer.echo("no processor was written: the checkpoint has no tokenizer")
