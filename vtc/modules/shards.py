"""A checkpoint's tensors in safetensors, one file or several with an index: read and written one at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vtc.values import shown

SHARD = 4 << 30
"""Bytes of a file that is written."""

Move = Callable[[], Tensor]
"""Makes a tensor when it is its turn."""
Report = Callable[[str, int, int], None]
"""Of what is done now, how many of how many tensors are done."""


@dataclass(frozen=True)
class Source:
    """A folder's tensors, read one at a time.

    Attributes:
        folder: local.
        files: which of its files has each tensor.
    """

    folder: Path
    files: Mapping[str, str]

    @classmethod
    def of(cls, folder: Path) -> Source:
        """Look into ``model.safetensors``, or the shards that its index names.

        Raises:
            FileNotFoundError: there is none; a pickle is no substitute.
            ValueError: the index names other folders.
        """
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.is_file():
            files = {str(k): str(v) for k, v in read_json(index).get("weight_map", {}).items()}
            if outside := [name for name in files.values() if Path(name).name != name]:
                raise ValueError(f"{index} names files outside of its folder: {shown(outside[0])}")
            return cls(folder, files)
        if single.is_file():
            with safe_open(single, "pt") as opened:
                return cls(folder, dict.fromkeys(opened.keys(), single.name))
        pickles = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        raise FileNotFoundError(
            f"no safetensors in {shown(str(folder))}"
            + (f", and {', '.join(pickles)} are pickles, which may run code and are not opened" if pickles else "")
            + ". What would work: model.safetensors, written by safetensors.torch.save_file(torch.load(file, "
            "weights_only=True), 'model.safetensors') where the file can be trusted"
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor, without reading it.

        Raises:
            ValueError: the index names a tensor that its file lacks.
        """
        found: dict[str, tuple[int, ...]] = {}
        for file in sorted(set(self.files.values())):
            with safe_open(self.folder / file, "pt") as opened:
                there = set(opened.keys())
                own = [name for name, where in self.files.items() if where == file]
                if lacks := sorted(set(own) - there):
                    raise ValueError(f"the index says that {file} has {shown(lacks[0])}, and it has not")
                if more := sorted(there - set(own)):
                    raise ValueError(f"{file} has {shown(more[0])}, and the index does not name it")
                found |= {name: tuple(opened.get_slice(name).get_shape()) for name in own}
        return found

    def tensor(self, name: str) -> Tensor:
        """One of them."""
        with safe_open(self.folder / self.files[name], "pt") as opened:
            return opened.get_tensor(name)


def write(folder: Path, moves: Mapping[str, Move], report: Report) -> None:
    """Safetensors of at most :data:`SHARD` bytes, or one tensor, and their index."""
    shard: dict[str, Tensor] = {}
    files: list[list[str]] = []
    total = held = 0

    def close() -> None:
        nonlocal held
        save_file(shard, folder / f"{len(files)}.part", metadata={"format": "pt"})
        files.append(list(shard))
        shard.clear()
        held = 0

    for done, (name, move) in enumerate(moves.items()):
        report(name, done, len(moves))
        tensor = move().contiguous()
        size = tensor.numel() * tensor.element_size()
        if shard and held + size > SHARD:
            close()
        shard[name], held, total = tensor, held + size, total + size
    close()
    report("", len(moves), len(moves))
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    names = names if len(files) > 1 else ["model.safetensors"]
    for i, name in enumerate(names):
        os.replace(folder / f"{i}.part", folder / name)
    if len(files) > 1:
        where = {tensor: name for name, inside in zip(names, files, strict=True) for tensor in inside}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {shown(str(path))}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no JSON object")
    return found
