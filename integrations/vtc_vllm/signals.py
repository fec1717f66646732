"""The CLS row of the vision tower's last layer, which vLLM does not build: it stops where LLaVA takes its features.

vLLM's attention is fused and, with tensor parallelism, split by heads. The row needs only the layer's first norm and
its q and k projections: they are kept here once more, whole, on every rank, so that all ranks compute the same numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vtc.signals import Cls, ClsLogits, TowerSignal
from vtc.signals.cls import cls_logit_row, cls_row

_ROWS = {Cls(): cls_row, ClsLogits(): cls_logit_row}


class ClsRow(nn.Module):
    """A part of one layer of a CLIP tower.

    Args:
        config: the CLIPVisionConfig.
        signals: those wanted, of the last layer: ``Cls()`` and ``ClsLogits()``.
    """

    def __init__(self, config: Any, signals: Iterable[TowerSignal]) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer_norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.num_heads = config.num_attention_heads
        self.scale = (width // self.num_heads) ** -0.5
        self.signals = tuple(signals)
        self.heard: dict[TowerSignal, Tensor] = {}
        last = config.num_hidden_layers - 1
        self._name = re.compile(
            rf"(?:^|\.)vision_tower\.(?:vision_model\.)?encoder\.layers\.{last}\."
            r"(?:self_attn\.)?((?:layer_norm1|q_proj|k_proj)\.(?:weight|bias))$"
        )

    def listen(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook of the layer before: its output [pictures, 1 + patches, width] is what the layer would get."""
        hidden = self.layer_norm1(output)
        self.heard = {signal: _ROWS[signal](self, hidden) for signal in self.signals}

    def take(self) -> dict[TowerSignal, Tensor]:
        """What was heard since the last call, float32 [pictures, patches] by signal."""
        heard, self.heard = self.heard, {}
        return heard

    def loading(self, weights: Iterable[tuple[str, Tensor]], loaded: set[str]) -> Iterator[tuple[str, Tensor]]:
        """Pass weights on, and keep a copy of ours; their names are added to ``loaded``."""
        own = dict(self.named_parameters())
        for name, weight in weights:
            if found := self._name.search(name):
                target = own[found[1]]
                if target.shape != weight.shape or not weight.is_floating_point():
                    raise ValueError(
                        f"{name} is {weight.dtype} {list(weight.shape)}, not {list(target.shape)}: the CLS row cannot "
                        "be had from a quantised tower; methods that need no such signal work, e.g. divprune"
                    )
                with torch.no_grad():
                    target.copy_(weight)
                loaded.add(found[1])
            yield name, weight
        if missing := own.keys() - loaded:
            raise ValueError(f"the checkpoint has no {', '.join(sorted(missing))} for the vision tower's last layer")
