"""What a configuration asks for: the ``vtc`` entry of a model's config, and the keep of a single request.

``{"method": NAME, "keep": 0.25, "options": {...}, "positions": "original"}``, or the content of a vtc_config.json,
where ``keep`` is among the options. No vLLM in here.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

from vtc.binding import bind
from vtc.budget import Keep, check_keep
from vtc.config import CompressionConfig
from vtc.methods import Method
from vtc.methods.globalcom2 import GlobalCom2
from vtc.methods.stages import steps_of
from vtc.models import Adapter, Parts
from vtc.places import Layer, Tower
from vtc.signals import Cls, ClsLogits, TowerSignal
from vtc.tokens import Layout
from vtc.values import shortened, shown

SERVED = (Cls(), ClsLogits())
"""What can be had of a vision tower here, see :mod:`vtc_vllm.signals`."""
ARGUMENTS, REQUEST_KEEP = "mm_processor_kwargs", "vtc_keep"
KNOWN = f"{ARGUMENTS}.{REQUEST_KEEP}"
"""The one field of ours that a request may have: its keep."""


def places(value: Any) -> Iterator[str]:
    """Where in a JSON value names stand that are meant for vtc, such as ``messages[0].content[1].vtc_keep``."""
    todo = [("", value)]
    while todo:
        at, value = todo.pop()
        if isinstance(value, Mapping):
            for name, inner in value.items():
                if str(name).lower().startswith("vtc"):
                    yield f"{at}{name}"
                else:
                    todo.append((f"{at}{name}.", inner))
        elif isinstance(value, list):
            todo += [(f"{at.removesuffix('.')}[{i}].", inner) for i, inner in enumerate(value)]


def read(entry: Any) -> CompressionConfig:
    """The ``vtc`` entry of a config.

    Raises:
        ValueError: no mapping, no method, or anything that :class:`vtc.CompressionConfig` refuses.
        TypeError: an option of a wrong type.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(
            f"vtc={shown(entry)} in the model's config does not say how to prune; give "
            '{"method": "divprune", "keep": 0.25}, for instance with --hf-overrides'
        )
    data = {"version": 1, **entry}
    keep = data.pop("keep", None)
    options = data.get("options", {})
    if keep is not None:
        if not isinstance(options, Mapping) or "keep" in options:
            raise ValueError(f"vtc={shown(dict(entry))} gives keep twice; leave one out")
        data["options"] = {**options, "keep": keep}
    config = CompressionConfig.from_dict(data)
    return config.with_method(config.build())


def settled(adapter: Adapter, parts: Parts, config: CompressionConfig) -> CompressionConfig:
    """The config with everything decided that the method leaves open, for this model inside vLLM.

    Args:
        adapter: of the family.
        parts: of the transformers model, which may be on the meta device.
        config: what was asked for.

    Raises:
        ValueError: the method cannot work here; the message says why and what would.
    """
    if config.calibration is not None:
        raise ValueError(
            f"calibration={config.calibration!r} adds a bias to the logits of attention, and vLLM's attention takes "
            "none. What would work: no calibration; or transformers with vtc.patch"
        )
    if config.when != "always":
        raise ValueError(
            f"when={config.when!r} decides for each batch of prompts, and vLLM fixes the number of placeholders when a "
            "request arrives, before anybody knows what it will run beside. What would work: when='always'; or "
            "transformers with vtc.patch"
        )
    method = bind(adapter, parts, config.build(), config.positions)
    steps = steps_of(method, adapter.facts(parts))
    if any(isinstance(step.stage.at, Tower) for step in steps):
        raise ValueError(
            f"{method.name} lets patches leave inside the vision tower, and vLLM runs towers of its own. What would "
            "work: a method that chooses behind it, such as divprune; or transformers with vtc.patch"
        )
    if any(isinstance(step.stage.at, Layer) for step in steps):
        raise ValueError(
            f"{method.name} drops tokens between the layers of the language model, and vLLM has one length for all "
            "layers: its paged cache, its chunks and its compiled graphs. What would work: a method that drops them "
            "before it, such as divprune; or transformers with vtc.patch"
        )
    if method.query_aware:
        raise ValueError(
            f"{method.name} chooses by the question, which vLLM's encoder never sees: it caches images by their "
            "content. What would work: divprune, todre, idpruner; or transformers with vtc.patch"
        )
    if method.merges:
        raise ValueError(
            f"{method.name} writes new values into the tokens that stay, which this plugin does not do in vLLM yet. "
            "What would work: divprune, todre, idpruner; or transformers with vtc.patch"
        )
    if odd := [s for s in method.signals() if isinstance(s, TowerSignal) and s not in SERVED]:
        raise ValueError(
            f"{method.name} needs {odd[0]}, and in vLLM the vision tower gives the CLS row of its last layer only. "
            "What would work: divprune, todre, idpruner; or transformers with vtc.patch"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that keep=64 is more than there is
        countable = type(method) is GlobalCom2 or method.counts([Layout.plain(4)]) is not None
    if not countable:
        raise ValueError(
            f"how many tokens {method.name} keeps depends on what is in the image, but vLLM has to know it before the "
            "image is encoded. What would work: divprune, todre, idpruner"
        )
    return CompressionConfig.of(method, config.positions)


def with_keep(method: Method, keep: Keep) -> Method:
    """The same method at another keep.

    Raises:
        ValueError: keep out of range, or no number.
    """
    keep = request_keep(keep)
    return method if _same(keep, method.keep) else dataclasses.replace(method, keep=keep)


def refuse_unknown(kwargs: Mapping[str, Any]) -> None:
    """Look for names in ``mm_processor_kwargs`` that are meant for vtc, and that nothing reads.

    Raises:
        ValueError: there is one.
    """
    for place in places(kwargs):
        if place != REQUEST_KEEP:
            raise ValueError(f"{shortened(place)} in mm_processor_kwargs: all that vtc knows there is {REQUEST_KEEP}")


def request_keep(value: Any) -> Keep:
    """The keep that a request asks for.

    Raises:
        ValueError: out of range, or no number.
    """
    try:
        return check_keep(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{REQUEST_KEEP} of this request: {error}") from None


def _same(a: Keep, b: Keep) -> bool:
    return type(a) is type(b) and a == b


def kept(method: Method, layout: Layout) -> int:
    """How many tokens of an image stay: by its layout alone, so that the frontend knows before the encoder runs."""
    counts = method.counts([layout])
    assert counts is not None  # or it was refused
    return counts[0]


def identity(config: CompressionConfig, keep: Keep) -> str:
    """What a cached image depends on beside its pixels: method, options, the request's keep, and vtc's version."""
    text = json.dumps({**config.to_dict(), "keep": keep}, sort_keys=True)
    return f"vtc {version('visual-token-compression')} {text}"
