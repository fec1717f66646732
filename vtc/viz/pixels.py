"""Pixels as Pillow pictures: read from a file, or taken back from the tensors that a processor made."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtc.values import shown

if TYPE_CHECKING:
    from PIL.Image import Image


def open_image(path: Path) -> Image:
    """The picture as RGB, upright as its EXIF orientation says: as transformers' ``load_image`` opens it.

    Raises:
        ValueError: there is no such file, or it is no image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not os.path.isfile(path):
        raise ValueError(f"there is no image file {shown(str(path))}")
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"{shown(str(path))} is not an image that Pillow can read") from None


def to_picture(pixels: Tensor, image_processor: Any) -> Image:
    """Undo the normalisation of a processor's float pixels [3, H, W]."""
    from PIL import Image

    for name, undo in (("image_std", torch.mul), ("image_mean", torch.add)):
        if (value := getattr(image_processor, name, None)) is not None:
            pixels = undo(pixels, torch.tensor(value, device=pixels.device).view(-1, 1, 1))
    bytes_ = (pixels.float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(bytes_.permute(1, 2, 0).cpu().numpy(), "RGB")
