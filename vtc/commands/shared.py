"""What the commands share: options, how errors are shown, and what a model argument means."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from vtc.names import SHIPPED
from vtc.values import shortened, shown

if TYPE_CHECKING:
    from rich.table import Table

    from vtc.config import CompressionConfig

A_MODEL = f"a local folder, a name on the hub, or {', '.join(list(SHIPPED)[:-1])} or {list(SHIPPED)[-1]}"
"""What every command that loads a model takes, for its help."""

MethodName = Annotated[str, typer.Option("--method", "-m", help="One of `vtc methods`.")]
KeepText = Annotated[
    str, typer.Option("--keep", "-k", help="0.25: a quarter of each image's tokens stays; 64: that many tokens stay.")
]
MethodNames = Annotated[
    str,
    typer.Option("--method", "--methods", "-m", help="Some of `vtc methods`, with commas; all: every one that fits."),
]
KeepTexts = Annotated[
    str, typer.Option("--keep", "-k", help="One or several of 0.25 or 64, with commas; every method gets each.")
]
Options = Annotated[
    list[str] | None, typer.Option("--option", "-o", help="An option of the method, as name=value; repeatable.")
]
Positions = Annotated[
    str | None,
    typer.Option(help="original: kept tokens keep their positions; compact: renumbered. Without: as the method needs."),
]
Calibration = Annotated[
    str | None, typer.Option(help="Added to attention logits: size, size+distance or size+visual-distance.")
]
When = Annotated[
    str,
    typer.Option(help="worthwhile: leaves prompts alone where pruning would take longer than it saves; else: always."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps ...; auto: a GPU where there is one.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads of torch; 0 leaves them alone.")]

TRACEBACK: ContextVar[bool] = ContextVar("vtc_traceback", default=False)
"""Whether errors are to be shown as they are: ``vtc --traceback``."""


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Turn the errors a user can cause into one line and exit code 2; ``vtc --traceback`` lets them through."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
        if TRACEBACK.get():
            raise
        message = " ".join(shortened(word) for word in str(error).split()) or type(error).__name__
        if isinstance(error, ModuleNotFoundError):
            message += "; pip install 'visual-token-compression[demo]' brings what the commands need"
        typer.echo(f"vtc: {message}", err=True)
        raise typer.Exit(2) from None


def parse_keep(text: str) -> float | int:
    """``"64"`` is 64 tokens, ``"0.25"`` a quarter, ``"1"`` one token and ``"1.0"`` all of them."""
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            raise ValueError(
                f"--keep {shown(text)} is neither a fraction such as 0.25 nor a count such as 64"
            ) from None


def parse_keeps(text: str) -> list[float | int]:
    """Several of what :func:`parse_keep` takes, with commas."""
    return [parse_keep(each) for each in listed(text, "keep")]


def parse_methods(
    text: str, attempt: Callable[[str], object], tell: Callable[[str], object], videos: bool = False
) -> list[str]:
    """Methods by name, with commas. ``all`` is every registered one that fits; the others are told with the reason.

    Args:
        text: what was asked for.
        attempt: called with a name, raises ValueError where the model or the task is not for it; only for ``all``.
        tell: called with a line of text for each method left out.
        videos: whether there are frames to choose between.

    Raises:
        ValueError: the list is empty. A name that there is no method of is refused by who builds it.
    """
    from vtc.methods import list_methods, method_class
    from vtc.methods.video import VideoMethod

    if text.strip() != "all":
        return listed(text, "method")
    fitting = []
    for name in list_methods():
        try:
            if not videos and issubclass(method_class(name), VideoMethod):
                raise ValueError(f"{name} chooses between the frames of a video, and there is a picture here")
            attempt(name)
            fitting.append(name)
        except ValueError as error:
            tell(f"left out: {error}")
    return fitting


def parse_options(options: list[str] | None) -> dict[str, Any]:
    """``["seed=3", "variant=k_center"]`` as names and values: JSON where a value is JSON, else text.

    ``selector={"method": "fastervlm"}`` is a method, as in a config.
    """
    from vtc.config import decode

    named: dict[str, Any] = {}
    for option in options or []:
        key, found, value = option.partition("=")
        if not found:
            raise ValueError(f"--option {shown(option)} is not of the form name=value")
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
        named[key] = decode(value) if isinstance(value, dict) else value
    return named


def build_config(
    method: str,
    keep: str,
    options: list[str] | None,
    positions: str | None,
    calibration: str | None = None,
    when: str = "always",
) -> CompressionConfig:
    """What ``--method``, ``--keep``, ``--option``, ``--positions``, ``--calibration`` and ``--when`` ask for."""
    from vtc.config import CompressionConfig
    from vtc.methods import make_method

    named = parse_options(options)
    chosen = make_method(method, keep=parse_keep(keep), **named)
    return CompressionConfig.of(chosen, cast(Any, positions), cast(Any, calibration), cast(Any, when))


def pick_device(name: str) -> str:
    """The device of that name, or for ``auto`` a GPU where there is one.

    Raises:
        ValueError: there is no such device.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return str(torch.zeros(0, device=name).device)
    except (RuntimeError, AssertionError) as error:  # unknown, or not on this machine
        raise ValueError(f"--device {shown(name)}: {str(error).splitlines()[0]}") from None


def listed(text: str, what: str) -> list[str]:
    """The entries of a list with commas.

    Raises:
        ValueError: it has none.
    """
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    if not entries:
        raise ValueError(f"--{what} {shown(text)} is an empty list")
    return entries


def numbers(text: str, what: str) -> list[int]:
    """The whole numbers of a list with commas, each at least 1.

    Raises:
        ValueError: something else is in it.
    """
    try:
        values = [int(entry) for entry in listed(text, what)]
    except ValueError:
        raise ValueError(f"--{what} {shown(text)} is not a list of whole numbers such as 1,8,32") from None
    if min(values) < 1:
        raise ValueError(f"--{what} {shown(text)}: {min(values)} is below 1")
    return values


def parse_size(text: str) -> tuple[int, int]:
    """``"672x336"`` as (width, height).

    Raises:
        ValueError: it is not of that form.
    """
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.strip().isdecimal() for side in sides):
        raise ValueError(f"--image {shown(text)} is not of the form WIDTHxHEIGHT, such as 672x336")
    return int(sides[0]), int(sides[1])


def numbers_table(title: str | None, *names: str) -> Table:
    """An empty table: what a row is about at the left, numbers at the right of their columns, little space lost."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for at, name in enumerate(names):
        table.add_column(name, justify="right" if at else "left", no_wrap=True)
    return table
