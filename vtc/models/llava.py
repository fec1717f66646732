"""The LLaVA line: one picture, a thumbnail with crops and newlines (AnyRes), video."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vtc.dialect.towers import Tower
from vtc.feed import Feed, Picture
from vtc.models import clip, units
from vtc.models import pictures as sizes
from vtc.models.base import Adapter, Parts, register_model, square
from vtc.tokens import Layout, Segment


@register_model
class Llava(Adapter):
    """One picture, one grid. With a Pixtral tower the grid follows the picture's own shape."""

    families = {"llava": ("image",), "vipllava": ("image",)}
    has_cls = True
    notes = "cls with a CLIP tower only"

    def layouts(self, base: Any, modality: str, lengths: list[int], arguments: Mapping[str, Any]) -> list[Layout]:
        sizes, patch = arguments.get("image_sizes"), getattr(base.config.vision_config, "patch_size", None)
        if sizes is not None and patch is not None:
            grids = [(int(h) // patch, int(w) // patch) for h, w in torch.as_tensor(sizes).tolist()]
            if [rows * columns for rows, columns in grids] == lengths:
                return [Layout.plain(n, grid) for n, grid in zip(lengths, grids, strict=True)]
        return [Layout.plain(n, square(n)) for n in lengths]

    def tower(self, base: Any, modality: str) -> Tower | None:
        return Tower.of(base.vision_tower, projector=base.multi_modal_projector)

    def reduces(self, base: Any, modality: str) -> Literal["drop", "restore"] | None:
        tower = self.tower(base, modality)
        return None if tower is None or tower.packed else "drop"

    def per_token(
        self, base: Any, modality: str, values: Tensor, layouts: Sequence[Layout], arguments: Mapping[str, Any]
    ) -> list[Tensor]:
        tower = Tower.of(base.vision_tower)  # that of vLLM's models has no projector beside it
        if tower is not None and tower.packed:
            return units.split(values, [layout.length for layout in layouts])
        return clip.one_to_one(values, layouts)

    def feed(self, parts: Parts, picture: Picture, settings: Mapping[str, Any]) -> Feed:
        if parts.config.vision_config.model_type == "pixtral":
            return sizes.pixtral(parts, picture, settings)
        return sizes.squares(parts, picture, 1, sizes.features(parts, picture), "one picture")

    def budgets(
        self, parts: Parts, picture: Picture, settings: Mapping[str, Any]
    ) -> Iterable[tuple[str, Mapping[str, Any]]]:
        packed = parts.config.vision_config.model_type == "pixtral"
        return sizes.pixtral_budgets(parts, picture, settings) if packed else ()


class _AnyRes(Adapter):
    """Thumbnail first, then the mosaic of crops in raster order, unpadded, a newline after each row."""

    has_cls = True
    has_thumbnail = True
    video_newline = False

    def _pictures(self, base: Any, arguments: Mapping[str, Any]) -> list[int]:
        """Pictures (thumbnail and crops) that each image was cut into."""
        module = sys.modules[type(base).__module__]
        alone = arguments.get("batch_num_images")
        picture = base.config.vision_config.image_size
        split = [True] * len(arguments["image_sizes"])
        if alone is not None:
            split = [n == 1 for n in torch.as_tensor(alone).tolist() for _ in range(n)]
        return [
            module.image_size_to_num_patches(size, base.config.image_grid_pinpoints, picture) if cut else 1
            for size, cut in zip(arguments["image_sizes"], split, strict=True)
        ]

    def _pack(self, base: Any, scores: list[Tensor], arguments: Mapping[str, Any]) -> list[Tensor]:
        """Send per-patch scores [pictures, patches, C] the way the features go, to [n, C]; newlines become 0."""
        names = ("vision_feature_select_strategy", "vision_aspect_ratio")
        defaults = {"vision_aspect_ratio": getattr(base.config, "vision_aspect_ratio", None)}
        accepted = base.pack_image_features.__code__.co_varnames
        options = {n: arguments.get(n) or defaults.get(n) for n in names if n in accepted}
        packed, _ = base.pack_image_features(
            scores, arguments["image_sizes"], image_newline=scores[0].new_zeros(scores[0].shape[-1]), **options
        )
        return packed

    def _mosaics(self, base: Any, counts: list[int], arguments: Mapping[str, Any]) -> list[tuple[int, int]]:
        """(rows, columns) of each image's crops; of an image that was not cut, nothing of meaning."""
        module = sys.modules[type(base).__module__]
        pinpoints, picture = base.config.image_grid_pinpoints, base.config.vision_config.image_size
        return [
            tuple(module.get_anyres_image_grid_shape(size, pinpoints, picture)) if count > 1 else (1, 1)
            for size, count in zip(arguments["image_sizes"], counts, strict=True)
        ]

    def layouts(self, base: Any, modality: str, lengths: list[int], arguments: Mapping[str, Any]) -> list[Layout]:
        if not arguments:
            return super().layouts(base, modality, lengths, arguments)
        if modality == "video":
            return [self._video(n, arguments) for n in lengths]
        vision = base.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2 + clip.keeps_cls(base, arguments) * _has_cls(base)
        pictures = self._pictures(base, arguments)
        mosaics = self._mosaics(base, pictures, arguments)
        traces = [_trace(count, patches, mosaic) for count, mosaic in zip(pictures, mosaics, strict=True)]
        traced = self._pack(base, traces, arguments)
        return [self._image(t, patches, m, n) for t, m, n in zip(traced, mosaics, lengths, strict=True)]

    def _image(self, trace: Tensor, patches: int, mosaic: tuple[int, int], n: int) -> Layout:
        """From a trace of :func:`_trace` that went the way of the features."""
        newlines = (trace[:, 0] == 0).nonzero()[:, 0].tolist()
        if len(trace) != n or not newlines:
            return Layout.plain(n)
        thumbnail = Segment("thumbnail", 0, patches, square(patches))
        if newlines == [patches]:  # not cut: the thumbnail is the image, one newline ends it
            whole = Segment("image", 0, patches, square(patches))
            return Layout(n, (whole, Segment("newline", patches, 1)))
        columns = newlines[0] - patches
        grid = (len(newlines), columns)
        # the crop of each token; one that was interpolated halfway between two counts as the first's
        places = (trace[patches:, 1:].reshape(len(newlines), columns + 1, 2) - 1e-3).round().int()
        rows, across = places[:, 0, 0].tolist(), places[0, :-1, 1].tolist()
        crops = Segment("crops", patches, n - patches, grid, True, mosaic, tuple(rows), tuple(across))
        return Layout(n, (thumbnail, crops))

    def _video(self, n: int, arguments: Mapping[str, Any]) -> Layout:
        """Equal frames, and in LLaVA-OneVision one newline at the end, which older releases add after encoding."""
        frames = _frames(arguments)
        newline = 0
        if self.video_newline:
            newline, n = 1, n + (n % frames == 0)
        each = (n - newline) // frames
        segments = [Segment("frame", f * each, each, square(each)) for f in range(frames)]
        if newline:
            segments.append(Segment("newline", n - 1, 1))
        return Layout(n, tuple(segments))

    def tower(self, base: Any, modality: str) -> Tower | None:
        return Tower.of(base.vision_tower)

    def reduces(self, base: Any, modality: str) -> Literal["drop", "restore"] | None:
        return "drop" if modality == "image" else "restore"  # frames are pooled

    def per_token(
        self, base: Any, modality: str, values: Tensor, layouts: Sequence[Layout], arguments: Mapping[str, Any]
    ) -> list[Tensor]:
        flat = values.dim() == 2
        if clip.keeps_cls(base, arguments) and _has_cls(base):
            tokens = (base.config.vision_config.image_size // base.config.vision_config.patch_size) ** 2 + 1
            values = clip.in_front(values, tokens - values.shape[1])
        pictures = list((values[..., None] if flat else values).split(self._pictures(base, arguments)))
        packed = self._pack(base, pictures, arguments)
        return [scores[:, 0] for scores in packed] if flat else packed

    def feed(self, parts: Parts, picture: Picture, settings: Mapping[str, Any]) -> Feed:
        config, base = parts.config, parts.base
        if picture.frames is not None:
            return self._video_feed(parts, picture)
        size = sizes.one(config.vision_config.image_size)
        shape = torch.tensor([[picture.height, picture.width]])
        module = sys.modules[type(base).__module__]
        count = module.image_size_to_num_patches(shape[0], config.image_grid_pinpoints, size)
        each = sizes.features(parts, picture)
        blank = torch.zeros(count, each, 1)
        options = {n: getattr(config, n, None) for n in ("vision_feature_select_strategy", "vision_aspect_ratio")}
        known = inspect.signature(base.pack_image_features).parameters
        packed, _ = base.pack_image_features(
            [blank], shape, image_newline=blank.new_zeros(1), **{n: v for n, v in options.items() if n in known}
        )
        return sizes.squares(
            parts,
            picture,
            count,
            each,
            f"a thumbnail and {count - 1} crops" if count > 1 else "one picture",
            lengths=(len(packed[0]),),
            arguments={"image_sizes": shape},
        )

    def _video_feed(self, parts: Parts, picture: Picture) -> Feed:
        """Frames, pooled to half the side; LLaVA-NeXT-Video pools before the projector, OneVision behind it."""
        frames, arguments = picture.frames or 1, sizes.frames(picture)
        if parts.config.model_type == "llava_next_video":
            pooled = (sizes.side(parts) // parts.config.spatial_pool_stride) ** 2
            return sizes.squares(
                parts, picture, frames, pooled, "frames", lengths=(frames * pooled,), arguments=arguments
            )
        pooled = (-(-sizes.side(parts) // 2)) ** 2
        lengths = (frames * pooled,)  # the adapter adds the newline
        return sizes.squares(
            parts, picture, frames, sizes.side(parts) ** 2, "frames", lengths=lengths, arguments=arguments
        )


def _trace(pictures: int, patches: int, mosaic: tuple[int, int]) -> Tensor:
    """What to send along to see where patches go: [pictures, patches, 3], 1 and the row and column of the crop."""
    crops = torch.tensor([divmod(crop, mosaic[1]) for crop in range(pictures - 1)]).reshape(-1, 2)
    trace = torch.ones(pictures, patches, 3)
    trace[0, :, 1:] = 0
    trace[1:, :, 1:] = crops[:, None]
    return trace


def _frames(arguments: Mapping[str, Any]) -> int:
    """Frames per video, from pixels [videos, frames, ...]; releases name the argument differently."""
    pixels = arguments.get("pixel_values_videos")
    return (arguments["pixel_values"] if pixels is None else pixels).shape[1]


def _has_cls(base: Any) -> bool:
    tower = Tower.of(base.vision_tower)
    return tower is not None and bool(tower.special)


@register_model
class LlavaNext(_AnyRes):
    """LLaVA-NeXT (LLaVA-1.6)."""

    families = {"llava_next": ("image",)}
    notes = "thumbnail, crops and newlines; cls with a CLIP tower only"

    def tower(self, base: Any, modality: str) -> Tower | None:
        return Tower.of(base.vision_tower, projector=base.multi_modal_projector)


@register_model
class LlavaNextVideo(_AnyRes):
    """LLaVA-NeXT for images; video frames are pooled and have no newlines."""

    families = {"llava_next_video": ("image", "video")}
    notes = "frames are pooled 2x2; cls with a CLIP tower only"

    def per_token(
        self, base: Any, modality: str, values: Tensor, layouts: Sequence[Layout], arguments: Mapping[str, Any]
    ) -> list[Tensor]:
        if modality == "image":
            return super().per_token(base, modality, values, layouts, arguments)
        stride = base.config.spatial_pool_stride
        side = square(values.shape[1])
        if side is None:
            raise ValueError(f"{values.shape[1]} patches per frame are no square grid to pool")
        return list(units.pooled(values, side, stride).reshape(len(layouts), -1, *values.shape[2:]))


@register_model
class LlavaOnevision(_AnyRes):
    """LLaVA-OneVision: AnyRes images, scaled down when there are too many crops; video with one newline."""

    families = {"llava_onevision": ("image", "video")}
    notes = "thumbnail, crops and newlines; SigLIP has no CLS; one newline ends a video"
    has_cls = False
    video_newline = True

    def reduces(self, base: Any, modality: str) -> Literal["drop", "restore"] | None:
        return "restore"  # many crops are scaled down

    def per_token(
        self, base: Any, modality: str, values: Tensor, layouts: Sequence[Layout], arguments: Mapping[str, Any]
    ) -> list[Tensor]:
        if modality == "image":
            return super().per_token(base, modality, values, layouts, arguments)
        frames = base.apply_pooling(values if values.dim() > 2 else values[..., None])  # the model's own, bilinear
        videos = frames.reshape(len(layouts), -1, *values.shape[2:])
        behind = (0, 0) * (values.dim() - 2)
        newlines = [layout.length - videos.shape[1] for layout in layouts]
        return [nn.functional.pad(v, (*behind, 0, n)) for v, n in zip(videos, newlines, strict=True)]


@register_model
class VideoLlava(Adapter):
    """Every frame keeps its CLS feature as a token; frames come from the encoder as entries of their own."""

    families = {"video_llava": ("image", "video")}
    has_cls = True
    notes = "the CLS feature of every video frame is a visual token and scores 0"

    def layouts(self, base: Any, modality: str, lengths: list[int], arguments: Mapping[str, Any]) -> list[Layout]:
        if modality == "image":
            return super().layouts(base, modality, lengths, arguments)
        if not arguments:
            raise ValueError(
                "Video-LLaVA's encoder returns frames, and these were encoded before vtc could see how many make a "
                "video; vtc.patch(model, ...) before encoding"
            )
        frames = _frames(arguments)
        each = lengths[0]
        segments = tuple(Segment("frame", f * each, each) for f in range(frames))
        return [Layout(frames * each, segments) for _ in range(len(lengths) // frames)]

    def tower(self, base: Any, modality: str) -> Tower | None:
        return Tower.of(base.video_tower if modality == "video" else base.image_tower)

    def reduces(self, base: Any, modality: str) -> Literal["drop", "restore"] | None:
        return "drop"

    def per_token(
        self, base: Any, modality: str, values: Tensor, layouts: Sequence[Layout], arguments: Mapping[str, Any]
    ) -> list[Tensor]:
        if modality == "image":
            return clip.one_to_one(values, layouts)
        frames = len(layouts[0].segments)
        values = clip.in_front(values, layouts[0].length // frames - values.shape[1])
        return list(values.reshape(len(layouts), -1, *values.shape[2:]))

    def feed(self, parts: Parts, picture: Picture, settings: Mapping[str, Any]) -> Feed:
        if picture.frames is None:
            return sizes.squares(parts, picture, 1, sizes.features(parts, picture), "one picture")
        every = sizes.side(parts) ** 2 + sizes.has_cls(parts, picture)  # of a frame, CLS stays
        return sizes.squares(parts, picture, picture.frames, every, "frames", arguments=sizes.frames(picture))
