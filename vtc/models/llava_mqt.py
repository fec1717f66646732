"""LLaVA with a Matryoshka Query Transformer for a projector (:mod:`vtc.modules.llava`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vtc.feed import Feed, Picture
from vtc.models import pictures as sizes
from vtc.models.base import Adapter, Parts, register_model
from vtc.tokens import Layout


@register_model
class LlavaMqt(Adapter):
    """Each token is made of the whole picture: it has no place in it, and no patch is its own."""

    families = {"llava_mqt": ("image",)}
    notes = "LLaVA with a Matryoshka Query Transformer: tokens have no places"
    matryoshka = True

    def layouts(self, base: Any, modality: str, lengths: list[int], arguments: Mapping[str, Any]) -> list[Layout]:
        return [Layout.plain(n) for n in lengths]

    def feed(self, parts: Parts, picture: Picture, settings: Mapping[str, Any]) -> Feed:
        return sizes.squares(
            parts,
            picture,
            1,
            sizes.features(parts, picture),
            "one picture",
            lengths=(parts.config.num_queries,),
        )
