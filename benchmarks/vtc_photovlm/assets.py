"""Cut-outs, backgrounds and fonts, out of the fetched packages, shrunk to what pictures need and kept in memory."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

from PIL import Image, ImageFont

from . import rcc
from .sources import FONTS, GCOMPRIS, OPENCV, STAMPS, WALLPAPERS

CUTOUT_SIDE = 128
"""Longest side of a cut-out in memory; none is pasted larger."""
BACKGROUND_SIDE = 360
"""Shortest side of a background in memory."""


class Assets:
    """What scenes are made of. Tests have another with the same methods, which needs no files."""

    @functools.cache  # noqa: B019  # there is one, and it stays
    def cutout(self, path: str) -> Image.Image:
        """An RGBA picture without empty borders, at most :data:`CUTOUT_SIDE` px.

        Raises:
            Unavailable: its package cannot be had.
        """
        file = STAMPS.fetched() / "usr/share/tuxpaint/stamps" / f"{path}.png"
        image: Image.Image = Image.open(file).convert("RGBA")
        image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 24)).getbbox())
        image.thumbnail((CUTOUT_SIDE, CUTOUT_SIDE), Image.Resampling.LANCZOS)
        return image

    @functools.cache  # noqa: B019
    def background(self, path: str) -> Image.Image:
        """An RGB photograph, :data:`BACKGROUND_SIDE` px on its shorter side, or less where it is smaller.

        Raises:
            Unavailable: its package cannot be had.
        """
        package, _, rest = path.partition("/")
        if package == "gcompris":
            image: Image.Image = Image.open(io.BytesIO(_gcompris(rest.split("/")[2])[path]))
        elif package == "opencv":
            image = Image.open(OPENCV.fetched() / "usr/share/doc/opencv-doc/examples" / rest)
        else:
            image = Image.open(WALLPAPERS.fetched() / "usr/share/backgrounds" / rest)
        image = image.convert("RGB")
        scale = BACKGROUND_SIDE / min(image.size)
        if scale < 1:
            image = image.resize((round(image.width * scale), round(image.height * scale)), reducing_gap=2.0)
        return image

    @functools.cache  # noqa: B019
    def font(self, name: str, size: int) -> Any:
        """A font by ``package:file`` at a size in px.

        Raises:
            Unavailable: its package cannot be had.
        """
        package, _, stem = name.partition(":")
        return ImageFont.truetype(str(_font_file(package, stem)), size)


@functools.cache
def _gcompris(activity: str) -> dict[str, bytes]:
    archive = GCOMPRIS.fetched() / "usr/share/gcompris-qt/rcc" / f"{activity}.rcc"
    return dict(rcc.files(archive))


@functools.cache
def _font_file(package: str, stem: str) -> Path:
    found = [p for p in sorted(FONTS[package].fetched().rglob(f"{stem}.*")) if p.suffix in (".ttf", ".otf")]
    return found[0]
