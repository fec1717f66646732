"""The CPU worker. In vLLM 0.32 its runner never learns that a model has positions of its own (`load_model`)."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.interfaces import supports_multimodal_pruning
from vllm.v1.worker.cpu_worker import CPUWorker


class Worker(CPUWorker):
    """Tells it, as the GPU's does."""

    def load_model(self, **kwargs: Any) -> None:
        """Load, then look."""
        super().load_model(**kwargs)
        runner: Any = self.model_runner
        runner.is_multimodal_pruning_enabled = (
            supports_multimodal_pruning(runner.get_model())
            and self.model_config.multimodal_config.is_multimodal_pruning_enabled()
        )
