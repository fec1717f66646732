"""The part of ``--model_args`` that is ours: which model of lmms-eval, which method, which options.

``base=ID``
    a model id of lmms-eval. Required.
``method=NAME``, ``keep=0.25`` (a fraction) or ``keep=64`` (tokens per image), ``positions=original``,
``calibration=size+distance``
    as in :func:`vtc.patch`. ``method=none`` measures the model unpruned.
``method.OPTION=VALUE``
    an option of the method, such as ``method.stage2=true``. Values are read as JSON where they are JSON:
    ``method.layers=[7,9,12]``, ``method.selector={"method":"divprune"}``; else they are text.
``vtc_config=FILE``
    instead of all of these: a file written by ``CompressionConfig.save_pretrained``, or the folder it is in. For what
    commas cannot say: nested methods, paths with commas.

Everything else goes to the base.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtc.config import CompressionConfig
from vtc.values import shown

UNPRUNED = "none"
OPTION = "method."
OURS = ("base", "method", "keep", "positions", "calibration", "when", "vtc_config")


@dataclass(frozen=True)
class Asked:
    """What the arguments ask for.

    Attributes:
        base: a model id of lmms-eval.
        config: how to prune; ``None``: not at all.
        rest: the base's own arguments.
    """

    base: str
    config: CompressionConfig | None
    rest: dict[str, Any]


def split(arguments: Mapping[str, Any]) -> Asked:
    """Take our arguments out of parsed ``--model_args``.

    Raises:
        ValueError: no base, no method, a method and a config, or anything that :func:`vtc.patch` refuses.
        TypeError: options that the method does not have.
        FileNotFoundError: there is no such config.
    """
    base = arguments.get("base")
    if not isinstance(base, str) or not base:
        raise ValueError(f"model_args need base=ID, a model id of lmms-eval such as llava_hf, not base={shown(base)}")
    rest = {name: value for name, value in arguments.items() if name not in OURS and not name.startswith(OPTION)}
    return Asked(base, _config({name: value for name, value in arguments.items() if name not in rest}), rest)


def _config(given: Mapping[str, Any]) -> CompressionConfig | None:
    named = [name for name in given if name not in ("base", "vtc_config")]
    if "vtc_config" in given:
        if named:
            raise ValueError(f"vtc_config={given['vtc_config']} says everything; leave out {', '.join(named)}")
        return read_config(Path(str(given["vtc_config"])))
    method = given.get("method")
    if method is None:
        raise ValueError("model_args need method=NAME (see `vtc methods`; none: unpruned) or vtc_config=FILE")
    if method == UNPRUNED:
        if len(named) > 1:
            others = ", ".join(name for name in named if name != "method")
            raise ValueError(f"method={UNPRUNED} prunes nothing; leave out {others}")
        return None
    options = {name.removeprefix(OPTION): _value(value) for name, value in given.items() if name.startswith(OPTION)}
    if "keep" in given:
        options["keep"] = given["keep"]
    # through the config format, which turns {"method": ...} into a method and lists into tuples
    plain = {"version": 1, "method": str(method), "options": options}
    plain |= {"positions": given.get("positions"), "calibration": given.get("calibration")}
    plain |= {"when": given.get("when", "always")}
    config = CompressionConfig.from_dict(plain)
    return config.with_method(config.build())


def _value(value: Any) -> Any:
    if isinstance(value, str):
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(value)
    return value


def read_config(path: Path) -> CompressionConfig:
    """A config from its file or folder.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no config; the message names the file.
    """
    if os.path.isdir(path):
        return CompressionConfig.from_pretrained(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"vtc_config={shown(str(path))}: no such file; CompressionConfig.save_pretrained writes one"
        )
    try:
        return CompressionConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"vtc_config={path}: {error}") from error
