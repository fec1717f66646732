"""From encoded images to the tokens that stay: methods, layouts and signals as with transformers. No vLLM in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtc.budget import Keep
from vtc.config import CompressionConfig
from vtc.methods import Method
from vtc.methods.base import ANY_MODEL
from vtc.methods.globalcom2 import GlobalCom2
from vtc.methods.stages import Kept, steps_of
from vtc.models import Adapter, resolve
from vtc.models.base import adapter_of
from vtc.signals import TowerSignal
from vtc.tokens import Layout, VisualTokens
from vtc_vllm.globalcom2 import FixedGlobalCom2
from vtc_vllm.settings import kept, settled, with_keep


def settle(model_config: Any, config: CompressionConfig) -> CompressionConfig:
    """The config settled for a model, judged by the transformers model of the same configuration, without weights.

    Raises:
        ValueError: it cannot work.
    """
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(model_config)
    return settled(*resolve(model), config)


class Selector:
    """A settled method for one model.

    Args:
        model_config: of transformers, for the layout of images.
        config: from :func:`settle`.
    """

    def __init__(self, model_config: Any, config: CompressionConfig) -> None:
        self.config, self.method = config, _fixed(config.build())
        self.adapter: Adapter = adapter_of(model_config.model_type)
        self.base = _without_weights(model_config)

    @property
    def signals(self) -> tuple[TowerSignal, ...]:
        """What the method asks of the vision tower."""
        return tuple(signal for signal in self.method.signals() if isinstance(signal, TowerSignal))

    def layouts(self, modality: str, lengths: list[int], arguments: Mapping[str, Any]) -> list[Layout]:
        """The structure of images of these lengths; ``arguments`` are sizes or grids, as the encoder gets them.

        Raises:
            ValueError: vLLM and transformers disagree about an image's tokens.
        """
        layouts = self.adapter.layouts(self.base, modality, lengths, arguments)
        if [layout.length for layout in layouts] != lengths:
            raise ValueError(
                f"the {modality}s have {lengths} tokens in vLLM, but {[layout.length for layout in layouts]} by their "
                "sizes"
            )
        return layouts

    def kept(self, modality: str, length: int, arguments: Mapping[str, Any], keep: Keep) -> int:
        """How many tokens of one image stay; known without its content."""
        return kept(with_keep(self.method, keep), self.layouts(modality, [length], arguments)[0])

    def select(
        self,
        modality: str,
        embeddings: Sequence[Tensor],
        keeps: Sequence[Keep],
        arguments: Mapping[str, Any],
        rows: Mapping[TowerSignal, Tensor],
    ) -> list[Tensor]:
        """Choose.

        Args:
            modality: ``image`` or ``video``.
            embeddings: of each of G images, [n, d].
            keeps: of each.
            arguments: sizes or grids of all.
            rows: what the tower was asked for, [pictures, patches].

        Returns:
            For each image LongTensor [k] on its device, ascending; k is what :meth:`kept` said.
        """
        layouts = self.layouts(modality, [len(e) for e in embeddings], arguments)
        signals = {
            signal.key: self.adapter.per_token(self.base, modality, scores, layouts, arguments)
            for signal, scores in rows.items()
        }
        found: list[Tensor | None] = [None] * len(layouts)
        for keep in {(type(k), k): k for k in keeps}.values():  # 1 and 1.0 are different keeps
            group = [g for g, k in enumerate(keeps) if type(k) is type(keep) and k == keep]
            method = with_keep(self.method, keep)
            padded = {
                name: nn.utils.rnn.pad_sequence([scores[g] for g in group], batch_first=True)
                for name, scores in signals.items()
            }
            features = nn.utils.rnn.pad_sequence([embeddings[g].detach() for g in group], batch_first=True)
            own = tuple(layouts[g] for g in group)
            # an image is encoded once for all prompts it stands in, so it has no ordinal in any of them
            tokens = VisualTokens(features, own, (0,) * len(group), padded)
            for g, index in zip(group, picks(method, tokens), strict=True):
                found[g] = index
        return [index for index in found if index is not None]


def picks(method: Method, tokens: VisualTokens) -> list[Tensor]:
    """Of each image the tokens that stay, LongTensor [k], ascending; never waits for the device if the method does not.

    Raises:
        RuntimeError: the method kept another number than its budget: placeholders would not match.
    """
    steps = steps_of(method, ANY_MODEL)  # one at the most, before the language model: others were refused
    found = steps[0].reduce(tokens) if steps else Kept(tokens.mask, tokens.counts)
    expected = tuple(kept(method, layout) for layout in tokens.layouts)
    if found.counts != expected:
        raise RuntimeError(f"{method.name} kept {found.counts} tokens where its budget said {expected}")
    order = (~found.mask).to(torch.int8).argsort(dim=1, stable=True)
    return [row[:k] for row, k in zip(order, found.counts, strict=True)]


def _fixed(method: Method) -> Method:
    return FixedGlobalCom2.of(method) if type(method) is GlobalCom2 else method


def _without_weights(model_config: Any) -> nn.Module:
    """What an adapter asks of a base model when it lays images out: its class, for its functions, and its config."""
    from transformers import AutoModel

    cls = AutoModel._model_mapping[type(model_config)]
    base = cls.__new__(cls)
    nn.Module.__init__(base)
    base.config = model_config
    base.vision_tower = None
    return base
