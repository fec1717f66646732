"""From the size of a picture to counts: pictures, patches and visual tokens, by the rules of each family.

The rules are transformers' own functions wherever it has them without needing pixels. What a processor may decide is
given as settings (:func:`vtc.profiling.configs.settings_beside`); without, it is what the family was published with.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from vtc.dialect.towers import Tower
from vtc.models import Parts, clip
from vtc.profiling.feed import Feed, Picture
from vtc.profiling.towers import tower_of

Rule = Callable[[Parts, Picture, Mapping[str, Any]], Feed]
_RULES: dict[str, Rule] = {}
_VIDEO = {
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "glm46v",
    "llava_next_video",
    "llava_onevision",
    "video_llava",
}


def feed_of(parts: Parts, picture: Picture, settings: Mapping[str, Any] | None = None) -> Feed:
    """What a model makes of a picture or video.

    Args:
        parts: of the model; its weights are not looked at.
        picture: the size.
        settings: entries of ``preprocessor_config.json`` (of a video: ``video_preprocessor_config.json``).

    Raises:
        ValueError: the processor would refuse the size, the family has no rule here, or none for videos.
    """
    family = parts.config.model_type
    if family not in _RULES:
        raise ValueError(
            f"how many visual tokens a {family!r} model makes of a picture is not known here; known: "
            f"{', '.join(sorted(_RULES))}"
        )
    if picture.frames is not None and family not in _VIDEO:
        raise ValueError(f"{family!r} models are estimated for images only; with video: {', '.join(sorted(_VIDEO))}")
    try:
        feed = _RULES[family](parts, picture, settings or {})
    except (ValueError, ZeroDivisionError, RuntimeError) as error:
        raise ValueError(f"the processor of {family!r} would refuse {picture}: {error}") from error
    if min(feed.lengths, default=0) < 1:
        raise ValueError(f"{picture} is too narrow for {family!r}: no visual token is left of it")
    return feed


def _rule(*families: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(families, rule))
        return rule

    return register


# ------------------------------------------------------------------------------------------------------ square pictures


def _one(value: Any) -> int:
    """A side that some configs write twice."""
    return int(value[0] if isinstance(value, (list, tuple)) else value)


def _side(parts: Parts) -> int:
    """Patches along a side of one picture."""
    vision = parts.config.vision_config
    return _one(vision.image_size) // _one(vision.patch_size)


def _has_cls(parts: Parts, picture: Picture) -> bool:
    tower = Tower.of(tower_of(parts, picture.modality))
    return tower is not None and bool(tower.special)


def _pictures(parts: Parts, picture: Picture, count: int, each: int, words: str, **more: Any) -> Feed:
    """``count`` square pictures that become ``each`` tokens; the projector gets one row for each token."""
    patches = _side(parts) ** 2
    rows = patches + _has_cls(parts, picture)
    size = _one(parts.config.vision_config.image_size)
    values: dict[str, Any] = {
        "projected": count * each,
        "lengths": (each,) * count,
        "words": f"{words} of {size}x{size}",
    } | more
    return Feed(sequences=(rows,) * count, patches=count * patches, **values)


def _features(parts: Parts, picture: Picture) -> int:
    """Features of one picture: its patches, and CLS where that is not left out."""
    return _side(parts) ** 2 + (clip.keeps_cls(parts.base, {}) and _has_cls(parts, picture))


@_rule("llava", "vipllava")
def _llava(parts: Parts, picture: Picture, settings: Mapping[str, Any]) -> Feed:
    if parts.config.vision_config.model_type == "pixtral":
        return _pixtral(parts, picture, settings)
    return _pictures(parts, picture, 1, _features(parts, picture), "one picture")


@_rule("paligemma")
def _paligemma(parts: Parts, picture: Picture, settings: Mapping[str, Any]) -> Feed:
    return _pictures(parts, picture, 1, _side(parts) ** 2, "one picture")


@_rule("gemma3")
def _gemma3(parts: Parts, picture: Picture, settings: Mapping[str, Any]) -> Feed:
    return _pictures(parts, picture, 1, parts.config.mm_tokens_per_image, "one picture")


@_rule("video_llava")
def _video_llava(parts: Parts, picture: Picture, settings: Mapping[str, Any]) -> Feed:
    if picture.frames is None:
        return _pictures(parts, picture, 1, _features(parts, picture), "one picture")
    every = _side(parts) ** 2 + _has_cls(parts, picture)  # of a frame, CLS stays
    return _pictures(parts, picture, picture.frames, every, "frames", arguments=_frames(picture))


def _frames(picture: Picture) -> dict[str, Any]:
    return {"pixel_values_videos": torch.empty(1, picture.frames or 1, device="meta")}


# -------------------------------------------------------------------------------------------------- tiles and crops


@_rule("internvl")
def _internvl(parts: Parts, picture: Picture, settings: Mapping[str, Any]) -> Feed:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    size = _one(parts.config.vision_config.image_size)
    bounds = settings.get("min_patches", 1), settings.get("max_patches", 12)
    columns, rows = get_optimal_tiled_canvas((picture.height, picture.width), (size, size), *bounds)
    tiles = columns * rows
    count = tiles + (tiles > 1)
    each = int(_side(parts) * parts.config.downsample_ratio) ** 2
    words = f"{columns}x{rows} tiles and a thumbnail" if tiles > 1 else "one tile"
    return _pictures(parts, picture, count, each, words)


@_rule("idefics3", "smolvlm")
def _tiles(parts: Parts, picture: Picture, settings: Mapping[str, Any]) -> Feed:
    from transformers.models.idefics3.image_processing_pil_idefics3 import get_resize_output_image_size

    side = _side(parts) // parts.config.scale_factor
    tile = settings.get("max_image_size", {}).get("longest_edge", _one(parts.config.vision_config.image_size))
    if not settings.get("do_image_splitting", True):
        return _pictures(parts, picture, 1, side**2, "one picture", lengths=(side**2,))
    longest = settings.get("size", {}).get("longest_edge", 4 * tile)
    blank: Any = torch.empty(3, picture.height, picture.width, device="meta")
    height, width = get_resize_output_image_size(blank, longest)
    across, down = -(-width // tile), -(-height // tile)
    if width >= height:  # the longer side goes up to whole tiles first, the other follows
        down = -(-int(across * tile / (width / height)) // tile)
    else:
        across = -(-int(down * tile * (width / height)) // tile)
    count = across * down + 1 if across * down > 1 else 1
    words = f"{across}x{down} tiles and a thumbnail" if count > 1 else "one picture"
    return _pictures(parts, picture, count, side**2, words, lengths=(count * side**2,))


@_rule("llava_next", "llava_next_video", "llava_onevision")
def _anyres(parts: Parts, picture: Picture, settings: Mapping[str, Any]) -> Feed:
    config, base = parts.config, parts.base
    if picture.frames is not None:
        return _video(parts, picture)
    size = _one(config.vision_config.image_size)
    sizes = torch.tensor([[picture.height, picture.width]])
    module = sys.modules[type(base).__module__]
    count = module.image_size_to_num_patches(sizes[0], config.image_grid_pinpoints, size)
    each = _features(parts, picture)
    blank = torch.zeros(count, each, 1)
    options = {n: getattr(config, n, None) for n in ("vision_feature_select_strategy", "vision_aspect_ratio")}
    known = inspect.signature(base.pack_image_features).parameters
    packed, _ = base.pack_image_features(
        [blank], sizes, image_newline=blank.new_zeros(1), **{n: v for n, v in options.items() if n in known}
    )
    return _pictures(
        parts,
        picture,
        count,
        each,
        f"a thumbnail and {count - 1} crops" if count > 1 else "one picture",
        lengths=(len(packed[0]),),
        arguments={"image_sizes": sizes},
    )


def _video(parts: Parts, picture: Picture) -> Feed:
    """Frames, pooled to half the side; LLaVA-NeXT-Video pools before the projector, OneVision behind it."""
    frames, arguments = picture.frames or 1, _frames(picture)
    if parts.config.model_type == "llava_next_video":
        pooled = (_side(parts) // parts.config.spatial_pool_stride) ** 2
        return _pictures(parts, picture, frames, pooled, "frames", lengths=(frames * pooled,), arguments=arguments)
    pooled = (-(-_side(parts) // 2)) ** 2
    lengths = (frames * pooled,)  # the adapter adds the newline
    return _pictures(parts, picture, frames, _side(parts) ** 2, "frames", lengths=lengths, arguments=arguments)


# ------------------------------------------------------------------------------------------------- native resolution


@_rule("mistral3")
def _pixtral(parts: Parts, picture: Picture, settings: Mapping[str, Any]) -> Feed:
    from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size

    vision, merge = parts.config.vision_config, getattr(parts.config, "spatial_merge_size", 1)
    size = settings.get("size", {})
    longest = size.get("longest_edge") or size.get("height") or _one(vision.image_size)
    blank, cell = torch.empty(3, picture.height, picture.width, device="meta"), _one(vision.patch_size) * merge
    height, width = get_resize_output_image_size(blank, longest, cell, "channels_first")
    rows, columns = height // cell, width // cell
    return Feed(
        sequences=(rows * columns * merge**2,),
        patches=rows * columns * merge**2,
        projected=rows * columns,
        lengths=(rows * columns,),
        words=f"resized to {width}x{height}: {columns}x{rows} tokens",
        arguments={"image_sizes": [[height, width]]},
    )


@_rule("gemma4")
def _gemma4(parts: Parts, picture: Picture, settings: Mapping[str, Any]) -> Feed:
    from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

    vision = parts.config.vision_config
    pool, patch = vision.pooling_kernel_size, vision.patch_size
    most = settings.get("max_soft_tokens", 280) * pool**2
    height, width = get_aspect_ratio_preserving_size(picture.height, picture.width, patch, most, pool)
    rows, columns = height // (patch * pool), width // (patch * pool)
    return Feed(
        sequences=(most,),  # the processor pads to it, and the tower runs on padding too
        patches=most,
        projected=rows * columns,
        lengths=(rows * columns,),
        words=f"resized to {width}x{height}: {columns}x{rows} tokens",
    )


_PIXELS = {  # (fewest, most) pixels of an image, and of a video; as published with the checkpoints
    "qwen2_vl": ((3136, 12845056), (128 * 28**2, 768 * 28**2)),
    "qwen2_5_vl": ((3136, 12845056), (128 * 28**2, 768 * 28**2)),
    "qwen3_vl": ((65536, 16777216), (4096, 25165824)),
    "qwen3_vl_moe": ((65536, 16777216), (4096, 25165824)),
    "qwen3_5": ((65536, 16777216), (4096, 25165824)),
    "glm46v": ((112**2, 15000 * 28**2), (112**2, 60000 * 28**2)),
}


@_rule(*_PIXELS)
def _grids(parts: Parts, picture: Picture, settings: Mapping[str, Any]) -> Feed:
    from transformers.models.glm46v.image_processing_pil_glm46v import smart_resize as resize_video
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as resize_image

    family, vision = parts.config.model_type, parts.config.vision_config
    merge, patch = vision.spatial_merge_size, vision.patch_size
    pair = vision.temporal_patch_size
    size = settings.get("size") or {}
    fewest, most = _PIXELS[family][picture.frames is not None]
    fewest = settings.get("min_pixels") or size.get("shortest_edge") or fewest
    most = settings.get("max_pixels") or size.get("longest_edge") or most
    bounds = {"factor": patch * merge, "min_pixels": fewest, "max_pixels": most}
    shape = {"height": picture.height, "width": picture.width}
    if family == "glm46v" or (picture.frames is not None and family not in ("qwen2_vl", "qwen2_5_vl")):
        # a bound on the pixels of all frames together; an image counts as one pair of frames
        frames = max(picture.frames or pair, pair)
        height, width = resize_video(num_frames=frames, temporal_factor=pair, **shape, **bounds)
    else:
        height, width = resize_image(**shape, **bounds)
    times = -(-(picture.frames or 1) // pair)
    rows, columns = height // patch, width // patch
    tokens = rows * columns // merge**2
    words = f"resized to {width}x{height}: {columns // merge}x{rows // merge} tokens"
    if picture.frames is not None:
        words += f", {times} times ({pair} frames each)"
    return Feed(
        sequences=(rows * columns,) * times,
        patches=times * rows * columns,
        projected=times * tokens,
        lengths=(times * tokens,),
        words=words,
        windows=_windows(vision, rows // merge, columns // merge, merge, times),
        arguments={f"{picture.modality}_grid_thw": [[times, rows, columns]]},
    )


def _windows(vision: Any, rows: int, columns: int, merge: int, times: int) -> tuple[tuple[int, int], ...]:
    """Qwen2.5-VL's windows over the merged grid; those at the far edges are what is left."""
    if not hasattr(vision, "window_size"):
        return ()
    side = vision.window_size // (merge * vision.patch_size)
    counts: dict[int, int] = {}
    for height in _pieces(rows, side):
        for width in _pieces(columns, side):
            size = height * width * merge**2
            counts[size] = counts.get(size, 0) + times
    return tuple(counts.items())


def _pieces(length: int, side: int) -> list[int]:
    whole, rest = divmod(length, side)
    return [side] * whole + [rest] * bool(rest)
