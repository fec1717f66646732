"""What a model makes of a picture, asked of its family's adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vtc.feed import Feed, Picture
from vtc.models import Adapter, Parts, families
from vtc.models.base import adapter_of


def feed_of(parts: Parts, picture: Picture, settings: Mapping[str, Any] | None = None) -> Feed:
    """What a model makes of a picture or video, as counts.

    Args:
        parts: of the model; its weights are not looked at.
        picture: the size.
        settings: entries of ``preprocessor_config.json`` (of a video: ``video_preprocessor_config.json``).

    Raises:
        ValueError: the processor would refuse the size, the family has no rule, or none for videos.
    """
    family = parts.config.model_type
    known = [f for f in families() if type(adapter_of(f.model_type)).feed is not Adapter.feed]
    if family not in [f.model_type for f in known]:
        raise ValueError(
            f"how many visual tokens a {family!r} model makes of a picture is not known here; known: "
            f"{', '.join(f.model_type for f in known)}"
        )
    with_video = [f.model_type for f in known if "video" in f.modalities]
    if picture.frames is not None and family not in with_video:
        raise ValueError(f"{family!r} models are estimated for images only; with video: {', '.join(with_video)}")
    try:
        feed = adapter_of(family).feed(parts, picture, settings or {})
    except (ValueError, ZeroDivisionError, RuntimeError) as error:
        raise ValueError(f"the processor of {family!r} would refuse {picture}: {error}") from error
    if min(feed.lengths, default=0) < 1:
        raise ValueError(f"{picture} is too narrow for {family!r}: no visual token is left of it")
    return feed
