"""`vtc estimate`: what pruning can save, by arithmetic on a config."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from vtc.commands.shared import (
    A_MODEL,
    KeepTexts,
    MethodNames,
    Options,
    build_config,
    clear_errors,
    listed,
    parse_methods,
    parse_size,
)
from vtc.values import shown

if TYPE_CHECKING:
    from vtc.profiling.estimate import Estimate


def estimate(
    model: Annotated[
        str | None,
        typer.Argument(
            help=f"A config.json, {A_MODEL}. Popular models are known without a hub. With --table: a part of a name."
        ),
    ] = None,
    image: Annotated[str, typer.Option(help="WIDTHxHEIGHT of the picture, in pixels.")] = "1024x1024",
    frames: Annotated[int | None, typer.Option(help="A video of so many such frames.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Visual tokens, instead of those that the picture makes.")] = None,
    text: Annotated[int, typer.Option(help="Other tokens of the prompt.")] = 64,
    batch: Annotated[int, typer.Option(help="Prompts at once.")] = 1,
    method: MethodNames = "divprune",
    keep: KeepTexts = "0.25",
    option: Options = None,
    device: Annotated[str, typer.Option(help="Whose roofline: a100, h100, h200, 4090 or cpu.")] = "h200",
    table: Annotated[
        bool, typer.Option("--table", help="One line for each model that is known without a hub.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="All numbers, as JSON.")] = False,
) -> None:
    """Say what pruning can save before anything is loaded: FLOPs, bytes, ceilings and a verdict.

    Times are floors at the data sheet's peak; `vtc profile` measures.
    """
    with clear_errors():
        import transformers
        from rich.console import Console

        from vtc.commands import estimate_page as page
        from vtc.profiling.configs import config_of, published_as, settings_beside
        from vtc.profiling.estimate import estimate as compute

        transformers.utils.logging.set_verbosity_error()
        size = parse_size(image)
        named: dict[str, Estimate]
        if table:
            if frames is not None or tokens is not None:
                raise ValueError("--frames and --tokens are for one model; --table compares models on one picture")
            chosen = build_config(*_single(method, keep), option, None)
            named = {
                name: compute(name, size, text=text, batch=batch, method=chosen, device=device)
                for name in _known(model)
            }
            if as_json:
                typer.echo(json.dumps([{"name": name, **each.to_dict()} for name, each in named.items()], indent=1))
            else:
                page.print_models(Console(), named)
            return
        if model is None:
            raise ValueError("name a model, or --table for those that are known without a hub")
        known = published_as(model)
        config, settings = config_of(model), settings_beside(model, "image" if frames is None else "video")

        def one(name: str, kept: str) -> Estimate:
            return compute(
                config,
                size,
                frames=frames,
                tokens=tokens,
                text=text,
                batch=batch,
                method=build_config(name, kept, option, None),
                device=device,
                settings=settings,
            )

        keeps, errors = listed(keep, "keep"), Console(stderr=True)
        methods = parse_methods(
            method,
            lambda name: one(name, keeps[0]),
            lambda line: errors.print(line, style="dim", markup=False, highlight=False),
            videos=frames is not None,
        )
        named = {f"{name} {kept}": one(name, kept) for name in methods for kept in keeps}
        found = list(named.values())
        if as_json:
            told = [each.to_dict() for each in found]
            typer.echo(json.dumps(told[0] if len(told) == 1 else told, indent=1))
        elif len(found) == 1:
            page.print_estimate(Console(), model, found[0])
        else:
            page.print_methods(Console(), model, named)
        if known is not None and not as_json:
            page.print_source(Console(), known)


def _known(part: str | None) -> list[str]:
    """Names of models that are known without a hub, and have ``part`` in them."""
    from vtc import published

    names = [name for name in published.models() if part is None or part.lower() in name.lower()]
    if not names:
        raise ValueError(f"--table: no model that is known without a hub has {shown(part)} in its name")
    return names


def _single(method: str, keep: str) -> tuple[str, str]:
    if "," in method + keep or method == "all":
        raise ValueError("--table compares models, with one --method and one --keep; name a model to compare methods")
    return method, keep
