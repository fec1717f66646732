"""Listen to the image and video encoders: how many features each image got, their layout, their signals.

``generate`` may encode images long before the forward pass that uses them, so what was heard is attached to the
encoder's output and travels with it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtc.dialect.modules import features_in
from vtc.engine.context import FRAME, cls_rows, is_bypassed, recording_cls_rows
from vtc.engine.locate import Encoded
from vtc.models import Adapter

_ATTACHED = "_vtc_encoded"


def listening(
    adapter: Adapter, base: nn.Module, modality: str, needs: frozenset[str], encode: Callable[..., Any]
) -> Callable[..., Any]:
    """Wrap the encoder of a modality; the signature stays, since transformers inspects it."""
    signature = inspect.signature(encode)

    @functools.wraps(encode)
    def call(*args: Any, **kwargs: Any) -> Any:
        nested = cls_rows() is not None  # some families encode videos by way of their image encoder
        if torch.compiler.is_compiling() or is_bypassed() or nested:
            return encode(*args, **kwargs)
        with recording_cls_rows() as rows:
            output = encode(*args, **kwargs)
        if (lengths := feature_lengths(output)) is None:
            return output
        arguments = _flat(signature, args, kwargs)
        layouts = adapter.layouts(base, modality, lengths, arguments)
        signals = {}
        for name, heard in {"cls": rows, "cls_logits": rows.logits}.items():
            if name in needs and heard:
                signals[name] = adapter.cls_scores(base, modality, torch.cat(heard), layouts, arguments)
        encoded = Encoded(tuple(layouts), signals, adapter.merge)
        setattr(output, _ATTACHED, encoded)
        if (frame := FRAME.get()) is not None:
            frame.encoded[modality] = encoded
        return output

    return call


def attached(adapter: Adapter, base: nn.Module, modality: str, output: Any) -> Encoded | None:
    """What :func:`listening` left on an encoder's output; made without listening, it has only its own shape to tell."""
    if (encoded := getattr(output, _ATTACHED, None)) is not None:
        return encoded
    lengths = feature_lengths(output)
    return (
        None if lengths is None else Encoded(tuple(adapter.layouts(base, modality, lengths, {})), merge=adapter.merge)
    )


def feature_lengths(output: Any) -> list[int] | None:
    """Features of each entry of an encoder's output, ``None`` where it has no such list."""
    features = features_in(output)
    if isinstance(features, Tensor):
        return [features.shape[1]] * features.shape[0] if features.dim() == 3 else None
    if isinstance(features, (list, tuple)) and all(isinstance(f, Tensor) for f in features):
        return [f.shape[:-1].numel() for f in features]  # [n, d], or [frames, n, d] for a video in older releases
    return None


def _flat(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Any]:
    """Arguments by name, those in ``**kwargs`` among them."""
    bound = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    return bound
