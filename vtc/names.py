"""What the name of a model means: a model that comes with vtc, something on this machine, or a name on the hub."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vtc import hub
from vtc.values import shown


@dataclass(frozen=True)
class Shipped:
    """A model that comes with vtc.

    Attributes:
        module: has ``load()``, and ``CHECKPOINT``, or ``whole()`` where the checkpoint is put together first.
        task: the questions that it was trained for.
    """

    module: str
    task: str


SHIPPED = {
    "tinyvlm": Shipped("vtc_tinyvlm", "tinyvlm"),
    "tinyvlm-next": Shipped("vtc_tinyvlm_next", "tinyvlm-next"),
    "tinyvlm-mqt": Shipped("vtc_tinyvlm.mqt_model", "tinyvlm"),
    "photovlm": Shipped("vtc_photovlm", "photovlm"),
}
"""By short name."""


def folder_of(name: str) -> str:
    """The checkpoint's folder of a model that comes with vtc (photovlm is put together first); another name as it is.

    Raises:
        ImportError: it is not installed.
        OSError: parts of it cannot be had.
    """
    if name not in SHIPPED:
        return name
    package = _module(name)
    return str(package.whole() if hasattr(package, "whole") else package.CHECKPOINT)


def load(name: str) -> tuple[Any, Any]:
    """Model and processor of a model that comes with vtc.

    Raises:
        ImportError: it is not installed.
        OSError: parts of it cannot be had.
    """
    try:
        return _module(name).load()
    except ModuleNotFoundError as missing:
        raise ImportError(f"the model {shown(name)} needs {missing.name}") from missing


@contextlib.contextmanager
def at_hand(name: str, also: str = "") -> Iterator[None]:
    """Inside, transformers is asked for a folder or a name on the hub: it is refused first if it cannot be had.

    Where the hub cannot be asked, what was fetched from it before is taken.

    Args:
        name: a folder, a file, or a name on the hub; short names were replaced by :func:`folder_of`.
        also: what else would have worked, for the message.

    Raises:
        OSError: within seconds; with what would work.
    """
    if os.path.exists(name):
        yield
        return
    if _is_path(name):
        raise FileNotFoundError(f"there is no {shown(name)}. {_what_works(also)}")
    if name.count("/") != 1:
        near = difflib.get_close_matches(name, SHIPPED, n=1, cutoff=0.75)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise FileNotFoundError(
            f"{shown(name)} is no folder here, no model that comes with vtc and no name on the hub, which is "
            f"OWNER/NAME; {hint}{_what_works(also)}"
        )
    if not (reason := hub.trouble()):
        yield
    elif hub.is_cached(name):
        with hub.from_cache():
            yield
    else:
        raise ConnectionError(
            f"{shown(name)} is no folder here, was not fetched from the hub before, and {hub.endpoint()} cannot be "
            f"asked: {reason}. {_what_works(also)}"
        )


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith(".json") or name.count("/") > 1


def _what_works(also: str) -> str:
    return (
        f"What would work: a folder with a checkpoint; one of {', '.join(SHIPPED)}; {also}or HF_ENDPOINT set to a hub "
        "that can be reached"
    )


def _module(name: str) -> Any:
    return importlib.import_module(SHIPPED[name].module)
