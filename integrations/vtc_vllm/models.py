"""vLLM's models with fewer visual tokens behind the encoder: embeddings that stay, and the positions they had."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tp_group
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration, LlavaNextProcessingInfo
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import Qwen3VLDummyInputsBuilder, Qwen3VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtc.signals import TowerSignal
from vtc_vllm import positions
from vtc_vllm.metrics import Meter
from vtc_vllm.processing import (
    FIELD,
    LlavaNextProcessor,
    LlavaProcessor,
    Qwen2VLProcessor,
    Qwen3VLInfo,
    Qwen3VLMoeInfo,
    Qwen3VLProcessor,
    Qwen25VLProcessor,
    keeps_of,
    media_ids,
)
from vtc_vllm.selection import Selector
from vtc_vllm.settings import read
from vtc_vllm.signals import ClsRow
from vtc_vllm.watch import Place, Watch, unpruned

SIZES = ("image_sizes", "image_grid_thw", "video_grid_thw")
"""What tells an image's layout, among the encoder's arguments."""


class PrunedModel:
    """What our models share; stands before vLLM's class in the bases."""

    rows = 1
    """Rows of positions that mean something: 3 with M-RoPE."""
    # vLLM's protocols, not inherited: a protocol's __init__ would end the chain of super().__init__
    supports_multimodal_pruning = True
    supported_video_pruning_methods = ("evs",)
    supports_mrope = True

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.is_multimodal_pruning_enabled = False  # vLLM's own way of appending positions
        self.vtc = Selector(self.config, read(self.config.vtc))
        self._keeps_positions = self.vtc.config.positions == "original"
        self._media = list(media_ids(self.config).values())
        self._watch = Watch(self.rows)
        self._meter = Meter(vllm_config.model_config.served_model_name, vllm_config.parallel_config.data_parallel_rank)

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """Encode, choose, leave the rest out; put offsets behind what stays."""
        asked = {m: kwargs.pop(FIELD.format(m), None) for m in ("image", "video")}
        sizes = {name: kwargs[name] for name in SIZES if kwargs.get(name) is not None}
        embeddings = super().embed_multimodal(**kwargs)  # type: ignore[misc]
        modality = next(m for m, field in asked.items() if field is not None)  # a call has items of one modality
        seen = [e[:, : self.width(e)] for e in embeddings]
        group, begun = get_tp_group(), self._meter.begin(embeddings[0].device)
        index = self.vtc.select(modality, seen, keeps_of(asked[modality]), sizes, self.heard())
        if group.is_first_rank:
            self._meter.end(begun, sum(len(own) < len(e) for own, e in zip(index, seen, strict=True)))
        if group.world_size > 1:  # every rank has computed it; that they agree is not left to luck
            index = [group.broadcast(own.contiguous(), 0) for own in index]
        short = [e[own] for e, own in zip(embeddings, index, strict=True)]
        if not self._keeps_positions:
            return short
        offsets = self.offsets(modality, [len(e) for e in embeddings], kwargs)
        digits = [positions.digits(own).to(short[0]) for own in offsets]
        return [torch.cat([e, d[own]], dim=1) for e, d, own in zip(short, digits, index, strict=True)]

    def width(self, embeddings: Tensor) -> int:
        """Columns of an image's embeddings [n, columns] that the method sees."""
        return embeddings.shape[1]

    def heard(self) -> Mapping[TowerSignal, Tensor]:
        """Rows of the tower that the method listens to, since the last call."""
        return {}

    def offsets(self, modality: str, lengths: list[int], arguments: Mapping[str, Any]) -> list[Tensor]:
        """Of each image LongTensor [n, rows] on the host: where its tokens are, from where it begins."""
        return [torch.arange(n)[:, None] for n in lengths]

    def spans(self, features: Sequence[Any]) -> list[positions.Span]:
        """The images of a prompt, in order."""
        ordered = sorted(features, key=lambda f: f.mm_position.offset)
        return [
            positions.Span(f.mm_position.offset, f.mm_position.length, extent)
            for f, extent in zip(ordered, self.extents(ordered), strict=True)
        ]

    def extents(self, features: Sequence[Any]) -> list[int]:
        """How many positions each image takes; here its length before pruning."""
        return [int(f.data[FIELD.format(f.modality)].data[2]) for f in features]

    def wholes(self, features: Sequence[Any]) -> list[int]:
        """How many tokens each image has before pruning."""
        return self.extents(features)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Text where it stood in the whole prompt; image tokens are marked, until their offsets are known."""
        if not self._watch.done:
            self._begin_to_watch(input_tokens, mm_features)
        return positions.provisional(len(input_tokens), self.spans(mm_features), self.rows)

    def _begin_to_watch(self, ids: list[int], features: Sequence[Any]) -> None:
        images = sorted((f for f in features if f.modality == "image"), key=lambda f: f.mm_position.offset)
        if len(images) < len(features):  # where a video's time goes on, vLLM itself differs from the original
            images = []
        wholes = self.wholes(images)
        places = [Place(f.mm_position.offset, f.mm_position.length, n) for f, n in zip(images, wholes, strict=True)]
        whole, starts = unpruned(ids, places)
        expected, delta = torch.arange(len(whole))[None], 0
        if self.rows > 1:
            given = [
                dataclasses.replace(f, mm_position=dataclasses.replace(f.mm_position, offset=start, length=n))
                for f, start, n in zip(images, starts, wholes, strict=True)
            ]
            expected, delta = super().get_mrope_input_positions(whole, given)  # type: ignore[misc]
        self._watch.prompt(ids, places, expected, len(whole) + delta)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Before a chunk runs: give its image tokens their positions, and their embeddings without offsets back."""
        if not multimodal_embeddings:  # every decode step comes by here
            return multimodal_embeddings, mrope_positions, positions.ahead(mrope_positions, self.rows)
        both = [positions.detach(columns, self.rows) for columns in multimodal_embeddings]
        place = mrope_positions.device
        ids = torch.as_tensor(input_ids, device=place)
        offsets = torch.cat([own for _, own in both])
        media = torch.isin(ids, torch.tensor(self._media, device=place))
        now, delta = positions.filled(mrope_positions, media, offsets.to(place), num_computed_tokens, self.rows)
        if not self._watch.done:
            self._watch.chunk(input_ids, now, delta, len(offsets), num_computed_tokens)
        return [embeddings for embeddings, _ in both], now, delta

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As before; a language model without M-RoPE gets the one row of positions that it knows.

        Raises:
            RuntimeError: this vLLM brings no positions of ours, see :mod:`vtc_vllm.watch`.
        """
        if self._keeps_positions and not self._watch.done:
            if positions.ndim == 1:
                raise RuntimeError(
                    "vLLM counts positions by itself, and original ones cannot be kept; see vtc's README"
                )
            self._watch.forward(positions)
        if self.rows == 1 and positions.ndim == 2:
            positions = positions[0]
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)  # type: ignore[misc]


class _WithCls(PrunedModel):
    """LLaVA's families: a CLIP tower may give the CLS token's attention."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.vtc_cls: ClsRow | None = None
        if needs := self.vtc.signals:
            layers = self.vision_tower.vision_model.encoder.layers
            before = self.config.vision_config.num_hidden_layers - 2
            if not 0 <= before < len(layers):
                keys = ", ".join(signal.key for signal in needs)
                raise ValueError(
                    f"{self.vtc.method.name} needs {keys} of the tower's last layer, but with "
                    f"vision_feature_layer={self.config.vision_feature_layer} vLLM runs only {len(layers)} of its "
                    f"{before + 2}. What would work: {self.vtc.method.remedy}"
                )
            self.vtc_cls = ClsRow(self.config.vision_config, needs)
            layers[before].register_forward_hook(self.vtc_cls.listen)

    def heard(self) -> Mapping[TowerSignal, Tensor]:
        return {} if self.vtc_cls is None else self.vtc_cls.take()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Also those of the CLS row."""
        if self.vtc_cls is None:
            return super().load_weights(weights)  # type: ignore[misc]
        own: set[str] = set()
        return super().load_weights(self.vtc_cls.loading(weights, own)) | {f"vtc_cls.{n}" for n in own}  # type: ignore[misc]


class _Grids(PrunedModel):
    """The Qwen-VL families: (time, height, width) by M-RoPE."""

    rows = 3

    def offsets(self, modality: str, lengths: list[int], arguments: Mapping[str, Any]) -> list[Tensor]:
        merge = self.config.vision_config.spatial_merge_size
        grids = torch.as_tensor(arguments[f"{modality}_grid_thw"]).tolist()
        seconds = arguments.get("second_per_grid_ts") if modality == "video" else None
        speed = getattr(self.config.vision_config, "tokens_per_second", 1.0)
        steps = [1.0] * len(grids)
        if seconds is not None:
            steps = [s * speed for s in torch.as_tensor(seconds).flatten().tolist()]
        found = []
        for (t, h, w), step in zip(grids, steps, strict=True):
            time = (torch.arange(t, dtype=torch.float64) * step).long()
            sides = torch.meshgrid(time, torch.arange(h // merge), torch.arange(w // merge), indexing="ij")
            found.append(torch.stack(sides, dim=-1).reshape(-1, 3))
        return found

    def wholes(self, features: Sequence[Any]) -> list[int]:
        merge = self.config.vision_config.spatial_merge_size
        return [int(f.data["image_grid_thw"].data.prod()) // merge**2 for f in features]

    def extents(self, features: Sequence[Any]) -> list[int]:
        return [max(int((t - 1) * step) + 1, h, w) for _, t, h, w, step in self.iter_mm_grid_thw(features)]


class _DeepStack(_Grids):
    """Qwen3-VL: what DeepStack adds in the first layers stands behind the embeddings, and stays or goes with them."""

    def width(self, embeddings: Tensor) -> int:
        return self.visual_dim

    def extents(self, features: Sequence[Any]) -> list[int]:
        merge = self.config.vision_config.spatial_merge_size
        return [int(f.data["image_grid_thw"].data[1:].max()) // merge for f in features]


@MULTIMODAL_REGISTRY.register_processor(LlavaProcessor, info=LlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder)
class VTCLlavaForConditionalGeneration(_WithCls, LlavaForConditionalGeneration):
    """LLaVA-1.5, pruned."""


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextProcessor, info=LlavaNextProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class VTCLlavaNextForConditionalGeneration(_WithCls, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT, pruned."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2VLProcessor, info=Qwen2VLProcessingInfo, dummy_inputs=Qwen2VLDummyInputsBuilder
)
class VTCQwen2VLForConditionalGeneration(_Grids, Qwen2VLForConditionalGeneration):
    """Qwen2-VL, pruned."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen25VLProcessor, info=Qwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class VTCQwen2_5_VLForConditionalGeneration(_Grids, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL, pruned."""


@MULTIMODAL_REGISTRY.register_processor(Qwen3VLProcessor, info=Qwen3VLInfo, dummy_inputs=Qwen3VLDummyInputsBuilder)
class VTCQwen3VLForConditionalGeneration(_DeepStack, Qwen3VLForConditionalGeneration):
    """Qwen3-VL, pruned."""


@MULTIMODAL_REGISTRY.register_processor(Qwen3VLProcessor, info=Qwen3VLMoeInfo, dummy_inputs=Qwen3VLDummyInputsBuilder)
class VTCQwen3VLMoeForConditionalGeneration(_DeepStack, Qwen3VLMoeForConditionalGeneration):
    """Qwen3-VL with experts, pruned."""
