"""What the frozen encoder says of N pictures, encoded once into a memory-mapped file that can be resumed.

`features.f16` is float16 [pictures, 256, 768]; `about.json` says what is in it and how far it is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import encoder
from .data import example
from .model import FEATURE_LAYERS, FEATURES, IMAGE_TOKENS
from .scenes import render, shipped_assets

GENERATOR = 1
"""Raised whenever the same index gives another picture than before: older caches are then refused."""
SAMPLE = 512
"""Pictures whose features give mean and deviation."""


@dataclass
class Store:
    """A cache of one split in a folder.

    Attributes:
        folder: where it lies.
        split: whose pictures.
        pictures: how many there are to be.
    """

    folder: Path
    split: str
    pictures: int

    def about(self) -> dict[str, Any]:
        """What has to be equal for a cache to be gone on with."""
        return {"split": self.split, "layers": list(FEATURE_LAYERS), "generator": GENERATOR}

    def done(self) -> int:
        """How many pictures are encoded.

        Raises:
            ValueError: the folder has a cache of something else.
        """
        file = self.folder / "about.json"
        if not file.exists():
            return 0
        found = json.loads(file.read_text())
        done = int(found.pop("done"))
        if found != self.about():
            raise ValueError(f"{self.folder} holds {found}, not {self.about()}; remove it or name another folder")
        return done

    def open(self) -> np.ndarray:
        """The file [pictures, 256, 768], made or lengthened if need be."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "features.f16"
        rows = max(self.pictures, self.done())
        file.touch()
        with file.open("r+b") as handle:
            handle.truncate(rows * IMAGE_TOKENS * FEATURES * 2)
        return np.memmap(file, np.float16, "r+", shape=(rows, IMAGE_TOKENS, FEATURES))

    def fill(self, tower: Any, batch: int = 16, assets: Any = None) -> None:
        """Encode what is missing, with a progress bar; can be stopped at any time and called again."""
        from tqdm import tqdm

        done, assets = self.done(), assets or shipped_assets()
        if done >= self.pictures:
            return
        features = self.open()
        bar = tqdm(total=self.pictures, initial=done, desc=f"encode {self.split}", mininterval=5)
        while done < self.pictures:
            some = range(done, min(done + batch, self.pictures))
            images = [render(example(self.split, i, assets)[0], assets) for i in some]
            features[some.start : some.stop] = encode(tower, images).numpy()
            done = some.stop
            if done % (16 * batch) == 0 or done == self.pictures:
                features.flush()  # type: ignore[attr-defined]
                part = self.folder / "about.part"
                part.write_text(json.dumps({"done": done} | self.about()))
                part.replace(self.folder / "about.json")
            bar.update(len(some))
        bar.close()


def pixels_of(images: list[Image.Image]) -> Tensor:
    """What the processor makes of pictures of the right size: [B, 3, 224, 224]."""
    mean, deviation = (torch.tensor(x)[:, None, None] for x in (encoder.IMAGE_MEAN, encoder.IMAGE_STD))
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    return (stacked.float() / 255 - mean) / deviation


@torch.inference_mode()
def encode(tower: Any, images: list[Image.Image]) -> Tensor:
    """The hidden states that the projector is given, without CLS: float16 [B, 256, 768], computed in bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        states = tower(pixels_of(images), output_hidden_states=True).hidden_states
    return torch.cat([states[layer][:, 1:] for layer in FEATURE_LAYERS], -1).half()


def statistics(features: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each feature over the first pictures: float32 [768] each."""
    some = torch.from_numpy(np.asarray(features[:SAMPLE], np.float32)).flatten(0, 1)
    return some.mean(0), some.std(0) + 1e-3
