"""CompressionConfig: what :func:`vtc.patch` needs to know, as data: typed, versioned, kept beside a model as JSON.

Reading is from an allow-list: a registered method, the fields of its dataclass, plain JSON values, further methods and
registered importances.
Nothing is imported, evaluated or unpickled on the file's word.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from vtc.files import write_text
from vtc.methods.base import Method
from vtc.methods.importance import Importance, importance_class
from vtc.methods.registry import list_methods, method_class
from vtc.values import shown

Positions = Literal["original", "compact"]
When = Literal["always", "worthwhile"]
Calibration = Literal["size", "size+distance", "size+visual-distance"]


@dataclass(frozen=True)
class CompressionConfig:
    """A method, its options, and what happens to positions.

    Attributes:
        method: name of a registered method.
        options: values of the method's dataclass fields, ``keep`` among them; what is left out has its default. A
            value may itself be a :class:`~vtc.methods.Method`.
        positions: ``original`` or ``compact``; default: what the method asks for, ``original`` as a rule.
        version: of the format. This vtc writes version 1 and reads no newer one.
        calibration: what is added to the logits of attention, see :func:`vtc.patch`; ``None``: nothing. Only written
            down where it is something; releases that do not know it then refuse the file.
        when: ``always``, or ``worthwhile``: prompts where pruning cannot pay are left alone, see :func:`vtc.patch`.
            Written down as ``calibration`` is.

    Raises:
        ValueError: anything unknown or out of range; the message carries the offending value.
        TypeError: an option of the wrong type, where the method checks it.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    positions: Positions = None  # type: ignore[assignment]
    version: int = 1
    calibration: Calibration | None = None
    when: When = "always"

    VERSION: ClassVar[int] = 1
    FILE_NAME: ClassVar[str] = "vtc_config.json"

    def __post_init__(self) -> None:
        if isinstance(self.version, bool) or not isinstance(self.version, int) or self.version < 1:
            raise ValueError(f"version={shown(self.version)} is not a version of the config format; this vtc writes 1")
        if self.version > self.VERSION:
            raise ValueError(
                f"config version {self.version} is newer than {self.VERSION}, the newest this vtc reads; update vtc"
            )
        if self.positions not in (None, "original", "compact"):
            raise ValueError(f"positions={shown(self.positions)} is neither 'original' nor 'compact'")
        if self.calibration is not None and self.calibration not in get_args(Calibration):
            known = ", ".join(map(repr, get_args(Calibration)))
            raise ValueError(f"calibration={shown(self.calibration)} is neither None nor one of {known}")
        if self.when not in get_args(When):
            raise ValueError(f"when={shown(self.when)} is neither 'always' nor 'worthwhile'")
        if not isinstance(self.method, str):
            raise ValueError(
                f"method={shown(self.method)} is not the name of a method; see CompressionConfig.of(method)"
            )
        if not isinstance(self.options, Mapping):
            raise ValueError(f"options={shown(self.options)} is not a mapping of option names to values")
        object.__setattr__(self, "options", dict(self.options))
        method = self.build()  # refuses what is wrong while the caller is still near
        object.__setattr__(self, "positions", method.positions_for(self.positions))

    @classmethod
    def of(
        cls,
        method: Method,
        positions: Positions | None = None,
        calibration: Calibration | None = None,
        when: When = "always",
    ) -> CompressionConfig:
        """The config of a method as it is, with every option written down, defaults too.

        Raises:
            ValueError: the method's class is not registered, so that it could not be built again from its name.
        """
        _check_registered(method)
        return cls(method.name, _options_of(method), positions, calibration=calibration, when=when)  # type: ignore[arg-type]

    def with_method(self, method: Method) -> CompressionConfig:
        """The same for another method, or for other options; as :meth:`of`."""
        return self.of(method, self.positions, self.calibration, self.when)

    def build(self) -> Method:
        """The method described."""
        return _build(self.method, self.options)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; nested methods become ``{"method": name, "options": {...}}``."""
        return {
            "version": self.version,
            "method": self.method,
            "options": {name: _encode(value, name) for name, value in self.options.items()},
            "positions": self.positions,
            **({} if self.calibration is None else {"calibration": self.calibration}),
            **({} if self.when == "always" else {"when": self.when}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CompressionConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: no mapping, no version or method, or anything this class refuses.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"a config is a mapping, not {shown(data)}")
        version = data.get("version")
        if isinstance(version, int) and version > cls.VERSION:  # before the fields: newer formats may have others
            raise ValueError(
                f"config version {version} is newer than {cls.VERSION}, the newest this vtc reads; update vtc"
            )
        known = [f.name for f in dataclasses.fields(cls)]
        _refuse_unknown("a config", "field", data, known)
        for name in ("version", "method"):
            if name not in data:
                raise ValueError(f"the config {shown(dict(data))} has no {shown(name)}")
        if not isinstance(data.get("options", {}), Mapping):
            raise ValueError(f"options={shown(data['options'])} is not a mapping of option names to values")
        options = {name: decode(value) for name, value in data.get("options", {}).items()}
        return cls(**{**data, "options": options})

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Write ``vtc_config.json`` into a folder (made if missing), beside a model's own files; returns its path.

        Whole or not at all: whoever reads it meanwhile sees the old one.
        """
        path = Path(directory) / self.FILE_NAME
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text + "\n")
        return path

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> CompressionConfig:
        """Read ``vtc_config.json`` from a local folder.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it is not JSON, or not a config; the message names the file.
        """
        path = Path(directory) / cls.FILE_NAME
        if not os.path.isfile(path):  # unlike Path.is_file, whatever the system thinks of the name
            raise FileNotFoundError(
                f"no {cls.FILE_NAME} in {shown(os.fspath(directory))}; save_pretrained() writes one"
            )
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error


def _refuse_unknown(what: str, kind: str, given: Mapping[str, Any], known: list[str]) -> None:
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"{what} has no {kind} {', '.join(map(shown, unknown))}; known: {', '.join(known)}")


def _check_registered(method: Method) -> None:
    cls = type(method)
    name = getattr(cls, "name", None)
    if name not in list_methods() or method_class(name) is not cls:
        raise ValueError(
            f"{cls.__name__} is not registered under name={shown(name)}; decorate it with @register_method"
        )


def _options_of(method: Method) -> dict[str, Any]:
    return {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init}


def _build(name: str, options: Mapping[str, Any]) -> Method:
    cls = method_class(name)
    _refuse_unknown(f"method {shown(name)}", "option", options, [f.name for f in dataclasses.fields(cls) if f.init])
    return cls(**options)


def _encode(value: Any, name: str) -> Any:
    if isinstance(value, Importance):
        if importance_class(value.name) is not type(value):
            raise ValueError(f"{type(value).__name__} is not registered; decorate it with @register_importance")
        fields = {f.name: _encode(getattr(value, f.name), f.name) for f in dataclasses.fields(value)}
        return {"importance": value.name, "options": fields}
    if isinstance(value, Method):
        _check_registered(value)
        return {"method": value.name, "options": {n: _encode(v, n) for n, v in _options_of(value).items()}}
    if isinstance(value, (list, tuple)):
        return [_encode(v, name) for v in value]
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    raise ValueError(f"option {name}={shown(value)} of type {type(value).__name__} has no place in a config")


def decode(value: Any) -> Any:
    """An option's value from JSON: what describes a method becomes one.

    Raises:
        ValueError: it describes none.
    """
    if isinstance(value, Mapping) and "importance" in value:
        _refuse_unknown("a nested importance", "field", value, ["importance", "options"])
        name, options = value["importance"], value.get("options", {})
        if not isinstance(name, str) or not isinstance(options, Mapping):
            raise ValueError(f"{shown(dict(value))} does not describe an importance")
        kind = importance_class(name)
        _refuse_unknown(f"importance {shown(name)}", "option", options, [f.name for f in dataclasses.fields(kind)])
        return kind(**{n: decode(v) for n, v in options.items()})
    if isinstance(value, Mapping):
        _refuse_unknown("a nested method", "field", value, ["method", "options"])
        name, options = value.get("method"), value.get("options", {})
        if not isinstance(name, str) or not isinstance(options, Mapping):
            raise ValueError(f"{shown(dict(value))} does not describe a method")
        return _build(name, {n: decode(v) for n, v in options.items()})
    if isinstance(value, list):
        return tuple(decode(v) for v in value)
    return value
