"""A picture of one of three sorts: a photograph (60 %), a document or a chart (20 % each)."""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from . import charts, documents, photos
from .assets import Assets
from .charts import Chart
from .documents import Document
from .photos import Photo

Scene: TypeAlias = Photo | Document | Chart
SORTS = {"photo": photos, "document": documents, "chart": charts}
SHARES = {"photo": 0.6, "document": 0.2, "chart": 0.2}


@functools.cache
def shipped_assets() -> Assets:
    """What pictures are made of, once per process."""
    return Assets()


def sample(split: str, rng: np.random.Generator, assets: Any, sort: str | None = None) -> Scene:
    """Draw a scene of a split, of this sort or of any."""
    drawn = str(rng.choice(list(SHARES), p=list(SHARES.values())))
    return SORTS[sort or drawn].sample(split, rng, assets)  # type: ignore[attr-defined,no-any-return]


def render(scene: Scene, assets: Any) -> Image.Image:
    """Draw it: RGB, 224 px square."""
    sort = {Photo: photos, Document: documents, Chart: charts}[type(scene)]
    return sort.render(scene, assets)  # type: ignore[attr-defined,no-any-return]
