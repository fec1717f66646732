"""Which models of lmms-eval can be patched, and whether the method fits: all of it asked before a weight is loaded."""

from __future__ import annotations

import ast
import difflib
import inspect
import sys
import textwrap
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from vtc.binding import bind
from vtc.config import CompressionConfig
from vtc.models import resolve
from vtc.modules import LlavaMqtConfig, LlavaMqtForConditionalGeneration
from vtc.names import at_hand
from vtc.profiling.configs import builds
from vtc.values import shown
from vtc_lmms_eval import MODEL_ID

OLDEST, NEWEST = (0, 7, 3), (0, 7, 3)
"""Versions of lmms-eval that the tests were run with; other patch releases of the newest are taken, too."""
SERVED = ("vllm", "sglang")
"""Bases with these in their names run the model in another program, out of reach."""


def check_version(installed: str | None = None) -> None:
    """Refuse an lmms-eval outside the tested range.

    Raises:
        ValueError: naming the version and the range.
    """
    installed = version("lmms-eval") if installed is None else installed
    parts = tuple(int(part) for part in installed.split("+")[0].split(".")[:3] if part.isdigit())
    parts += (0,) * (3 - len(parts))
    if parts < OLDEST or parts[:2] > NEWEST[:2]:
        oldest, newest = ".".join(map(str, OLDEST)), ".".join(map(str, NEWEST[:2]))
        raise ValueError(
            f"lmms-eval {installed} is outside the range that vtc is tested with, {oldest} to {newest}.*; "
            f"pip install 'lmms-eval>={oldest},<{NEWEST[0]}.{NEWEST[1] + 1}'"
        )


def find(base: str, simple: bool) -> type[Any]:
    """The class of lmms-eval behind a model id.

    Args:
        base: the id.
        simple: prefer the class without chat messages (``--force_simple``).

    Raises:
        ValueError: unknown, ourselves, not a Hugging Face model, or its module cannot be imported.
    """
    from lmms_eval.models import MODEL_REGISTRY_V2 as registry

    known = [name for name in registry.list_model_names() if name != MODEL_ID]
    if base not in known:
        near = difflib.get_close_matches(base, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "`lmms-eval models` lists them"
        raise ValueError(f"base={shown(base)} is no model of lmms-eval; {hint}")
    if any(name in base for name in SERVED):
        raise ValueError(f"base={shown(base)} runs its model in another program, where it cannot be patched. {_WORKS}")
    try:
        cls = registry.get_model_class(base, force_simple=simple)
    except Exception as error:  # whatever the imports of that module raise
        raise ValueError(f"base={shown(base)} cannot be imported: {type(error).__name__}: {error}") from error
    if _default(cls, "pretrained") is None:
        raise ValueError(
            f"base={shown(base)} loads no checkpoint by `pretrained`: it is no Hugging Face model. {_WORKS}"
        )
    teach(cls)
    return cls


def teach(cls: type[Any]) -> None:
    """Let a base that picks classes by model type, from a table in its module, load what ``vtc convert mqt`` writes.

    ``llava_hf`` in lmms-eval 0.7 does; without an entry it ends with a KeyError. Nothing that it knows changes.
    """
    table = getattr(sys.modules[cls.__module__], "model_map", None)
    if isinstance(table, dict) and "llava" in table:
        table.setdefault(LlavaMqtConfig.model_type, LlavaMqtForConditionalGeneration)


_WORKS = "What works: bases that load a transformers model, such as llava_hf, qwen2_5_vl, internvl_hf"


def _default(cls: type[Any], name: str) -> Any:
    """The default of an argument of a class's constructor, inherited ones too; ``None`` when there is none."""
    for each in cls.__mro__:
        parameter = inspect.signature(each.__init__).parameters.get(name) if "__init__" in vars(each) else None
        if parameter is not None and parameter.default is not inspect.Parameter.empty:
            return parameter.default
    return None


def placed(cls: type[Any], arguments: Mapping[str, Any], processes: int) -> dict[str, Any]:
    """The arguments, with a device map where the base's own default is an empty one that transformers 5 refuses.

    With several processes the empty default stays, unless they are to run on the CPU: there it means "the GPU of this
    process".
    """
    device = str(arguments.get("device") or _default(cls, "device") or "cuda")
    if "device_map" not in arguments and _default(cls, "device_map") == "" and (processes == 1 or device == "cpu"):
        return {**arguments, "device_map": device}
    return dict(arguments)


def check_batch(cls: type[Any], base: str, batch: Any) -> None:
    """Refuse a batch size that the base takes one sample of: most say so by an assertion, after the weights are loaded.

    Args:
        cls: of the base.
        base: its id.
        batch: the batch size, as lmms-eval hands it over.

    Raises:
        ValueError: the base asserts ``batch_size == 1`` somewhere, and this is more.
    """
    if not str(batch).strip().isdecimal() or int(batch) <= 1:
        return
    for name, function in inspect.getmembers(cls, inspect.isfunction):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, SyntaxError):
            continue
        if any(isinstance(node, ast.Assert) and _wants_one(node.test) for node in ast.walk(tree)):
            raise ValueError(
                f"base={base!r} takes one sample at a time (its {name} asserts a batch size of 1, in lmms-eval "
                f"{version('lmms-eval')}), not --batch_size {batch}. What would work: --batch_size 1, or a base that "
                "takes batches, such as qwen2_5_vl"
            )


def _wants_one(test: ast.expr) -> bool:
    """Whether an expression says that some ``batch_size`` is 1."""
    if not isinstance(test, ast.Compare) or len(test.ops) != 1 or not isinstance(test.ops[0], ast.Eq):
        return False
    sides = test.left, test.comparators[0]
    names = [getattr(side, "attr", getattr(side, "id", "")) for side in sides]
    return any("batch_size" in str(n) for n in names) and any(getattr(side, "value", None) == 1 for side in sides)


def check_family(cls: type[Any], arguments: Mapping[str, Any], config: CompressionConfig | None) -> None:
    """Refuse a method that the checkpoint's family cannot take, from its config alone.

    A config that transformers has no class for is let through: :func:`vtc.patch` will judge the loaded model.

    Raises:
        ValueError: the method does not fit.
        OSError: the checkpoint's config cannot be had: no such folder, or the hub cannot be reached.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    name = arguments.get("pretrained", _default(cls, "pretrained"))
    settings = {n: arguments[n] for n in ("revision", "trust_remote_code") if n in arguments}
    try:
        with at_hand(str(name)):
            checkpoint = AutoConfig.from_pretrained(name, **settings)
    except OSError as error:
        raise OSError(
            f"pretrained={name}: its config, the first thing wanted from the hub, cannot be had ({_first_line(error)})"
        ) from error
    if config is None or not builds(checkpoint):
        return
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(checkpoint)
    adapter, parts = resolve(model)
    bind(adapter, parts, config.build(), config.positions, config.calibration, config.when)


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split("\n")[0].split()) or type(error).__name__


def module_of(lm: Any, base: str) -> nn.Module:
    """The transformers model inside a model of lmms-eval, without its data-parallel wrapper.

    Raises:
        ValueError: there is none.
    """
    for name in ("model", "_model"):
        if isinstance(model := getattr(lm, name, None), nn.Module):
            return model
    raise ValueError(f"base={shown(base)} holds no torch model that could be patched. {_WORKS}")
