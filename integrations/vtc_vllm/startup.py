"""What is decided when an engine starts, before a weight loads: refusals, and the few settings that vLLM needs.

vLLM asks a table for such things, by architecture; ours are added to it.
"""

from __future__ import annotations

import json
import logging
from importlib.metadata import version
from typing import Any

from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from vtc_vllm import ARCHITECTURES, gate, metrics, upstream
from vtc_vllm.selection import settle
from vtc_vllm.settings import places, read

logger = logging.getLogger("vllm.vtc")

_NEXT_TO_NOTHING = 1e-17
"""A video_pruning_rate that drops no video token (1 - 1e-17 == 1.0), but makes vLLM ask the model for positions."""


class Pruning(VerifyAndUpdateConfig):
    """Of an architecture that prunes."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Settle the method for this model; ask for positions of our own where they are not simply counted."""
        upstream.check()
        hf, ours = model_config.hf_config, model_config.architecture
        stock = ARCHITECTURES[ours]
        if ARCHITECTURES.get(f"VTC{_architecture(hf.model_type)}") != stock:
            raise ValueError(f"{ours} prunes models of {stock}, and this one's model_type is {hf.model_type!r}")
        if getattr(hf.vision_config, "model_type", None) == "pixtral":
            raise ValueError(f"{ours}: a Pixtral tower puts tokens between the rows of an image, which is not done")
        config = settle(hf, read(getattr(hf, "vtc", None)))
        hf.vtc = config.to_dict()
        multimodal = model_config.multimodal_config
        if multimodal.video_pruning_rate not in (None, 0.0, _NEXT_TO_NOTHING):
            raise ValueError(
                f"--video-pruning-rate {multimodal.video_pruning_rate} and vtc would both drop tokens; leave it out"
            )
        if misplaced := list(places(multimodal.mm_processor_kwargs)):
            raise ValueError(
                f"{misplaced[0]} among the engine's mm_processor_kwargs: there only requests give it; for all of them, "
                "the config's 'vtc' entry has a keep"
            )
        if config.positions == "original":
            multimodal.video_pruning_rate = _NEXT_TO_NOTHING
            if not model_config.uses_mrope:
                hf.mrope_section = [1]  # on the top config: its language model rotates as before, see models.py
        name = model_config.served_model_name
        metrics.announce(name, config, json.dumps(hf.vtc, sort_keys=True))
        gate.admit()
        logger.info(
            "vtc %s prunes the visual tokens of %s (%s): %s, positions %s; a request may ask for another keep",
            version("visual-token-compression"), name, stock, config.build(), config.positions,
        )  # fmt: skip

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Settings of the engine."""
        from vllm.platforms import current_platform

        if vllm_config.speculative_config is not None:
            raise ValueError("speculative decoding with pruned prompts is not tested; leave --speculative-config out")
        if vllm_config.compilation_config.cudagraph_mm_encoder:
            logger.warning("cudagraph_mm_encoder is turned off: its graphs would go past the selection")
            vllm_config.compilation_config.cudagraph_mm_encoder = False
        parallel = vllm_config.parallel_config
        if current_platform.is_cpu() and parallel.worker_cls == "auto":
            parallel.worker_cls = "vtc_vllm.cpu.Worker"


class Unpruned(VerifyAndUpdateConfig):
    """Of vLLM's own architectures that have a pruning one: a ``vtc`` entry would silently do nothing there."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Refuse the entry."""
        if getattr(model_config.hf_config, "vtc", None) is not None:
            stock = model_config.architecture
            raise ValueError(
                f"the config has a 'vtc' entry, but {stock} does not prune; add "
                f'"architectures": ["VTC{stock}"] to it, or to --hf-overrides'
            )


def install() -> None:
    """Add our entries to vLLM's table; those that are there already stay."""
    for ours, stock in ARCHITECTURES.items():
        MODELS_CONFIG_MAP[ours] = Pruning
        MODELS_CONFIG_MAP.setdefault(stock, Unpruned)


def _architecture(model_type: str) -> str | None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

    return NAMES.get(model_type)
