"""What vtc relies on inside vLLM, and whether it is there: read from vLLM's sources, before anything starts.

Nothing is imported, so that this is quick, loads no device, and can be asked of any copy of the sources.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

TESTED, READ = "0.32", "0.33"
"""The version that tests run with, and the newest whose sources were compared with it."""

_MODELS = "vllm.model_executor.models"
_RECOMPUTE = "recompute_mrope_positions(input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens)"

NEEDS: dict[str, tuple[str, ...]] = {
    "vllm.multimodal.processing.processor": (
        "BaseMultiModalProcessor.get_dummy_inputs()",
        "BaseMultiModalProcessor.get_dummy_mm_inputs()",
        "BaseMultiModalProcessor.apply(inputs, timing_ctx)",
        "BaseMultiModalProcessor._apply_hf_processor_main(mm_items, hf_kwargs)",
        "BaseMultiModalProcessor._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)",
        "BaseMultiModalProcessor._get_mm_hashes(inputs)",
        "BaseMultiModalProcessor._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)",
        "BaseMultiModalProcessor._maybe_apply_prompt_updates(mm_items, mm_res)",
        "BaseMultiModalProcessor._postprocess_prompt(prompt)",
        "PlaceholderFeaturesInfo.tokens",
    ),
    "vllm.multimodal.processing.inputs": (
        "ProcessorInputs.prompt",
        "ProcessorInputs.mm_data_items",
        "ProcessorInputs.hf_processor_mm_kwargs",
    ),
    "vllm.multimodal.inputs": (
        "MultiModalFieldConfig.batched(modality, keep_on_cpu)",
        "PlaceholderRange.offset",
        "PlaceholderRange.length",
        "MultiModalFeatureSpec.mm_position",
    ),
    "vllm.multimodal.parse": ("EmbeddingItems", "DictEmbeddingItems"),
    f"{_MODELS}.interfaces": (
        "supports_multimodal_pruning(model)",
        "SupportsMultiModal.embed_multimodal()",
        "SupportsMRoPE.get_mrope_input_positions(input_tokens, mm_features)",
        f"SupportsMultiModalPruning.{_RECOMPUTE}",
    ),
    f"{_MODELS}.config": (
        "MODELS_CONFIG_MAP",
        "VerifyAndUpdateConfig.verify_and_update_config(vllm_config)",
        "VerifyAndUpdateConfig.verify_and_update_model_config(model_config)",
    ),
    f"{_MODELS}.llava": (
        "LlavaForConditionalGeneration",
        "LlavaMultiModalProcessor",
        "LlavaProcessingInfo",
        "LlavaDummyInputsBuilder",
    ),
    f"{_MODELS}.llava_next": (
        "LlavaNextForConditionalGeneration",
        "LlavaNextMultiModalProcessor",
        "LlavaNextProcessingInfo",
    ),
    f"{_MODELS}.qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLMultiModalProcessor",
        "Qwen2VLProcessingInfo",
        "Qwen2VLDummyInputsBuilder",
    ),
    f"{_MODELS}.qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration.iter_mm_grid_thw(mm_features)",
        "Qwen2_5_VLMultiModalProcessor",
        "Qwen2_5_VLProcessingInfo",
        "Qwen2_5_VLDummyInputsBuilder",
    ),
    f"{_MODELS}.qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLMultiModalProcessor",
        "Qwen3VLProcessingInfo",
        "Qwen3VLDummyInputsBuilder",
    ),
    f"{_MODELS}.qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeProcessingInfo"),
    "vllm.config.model": ("ModelConfig.served_model_name", "ModelConfig.uses_mrope()", "ModelConfig.architecture()"),
    "vllm.config.multimodal": (
        "MultiModalConfig.video_pruning_rate",
        "MultiModalConfig.mm_processor_kwargs",
        "MultiModalConfig.is_multimodal_pruning_enabled()",
    ),
    "vllm.config.parallel": ("ParallelConfig.worker_cls", "ParallelConfig.data_parallel_rank"),
    "vllm.config.compilation": ("CompilationConfig.cudagraph_mm_encoder",),
    "vllm.distributed.parallel_state": ("get_tp_group()", "GroupCoordinator.broadcast(input_, src)"),
    "vllm.v1.worker.cpu_worker": ("CPUWorker",),
    # what hands our positions on: the model runner, and its second version, which GPUs may have by default
    "vllm.v1.worker.gpu_model_runner": (f"calls {_RECOMPUTE}", "calls get_mrope_input_positions()"),
    "vllm.v1.worker.gpu.model_states.mm_pruning": (f"calls {_RECOMPUTE}",),
    "vllm.v1.worker.gpu.mm.rope": ("calls get_mrope_input_positions()",),
}
"""By module: a name; ``Class.attribute``; a function or method with parameters it takes, among others; and after
``calls``, a method of ours that the module calls, with arguments of these names."""

_NEED = re.compile(r"(?:(?P<calls>calls) )?(?P<name>[\w.]+)(?P<brackets>\((?P<parameters>.*)\))?")


def check() -> None:
    """Look.

    Raises:
        ValueError: something is not there; all of it is named.
    """
    from vtc_vllm import installed_version

    if found := missing():
        raise ValueError(
            f"vLLM {installed_version()} has other insides than vtc relies on; missing: {'; '.join(found)}. "
            f"What works: vLLM {TESTED}"
        )


@functools.cache
def missing(root: Path | None = None) -> tuple[str, ...]:
    """What is not there, in the installed vLLM or in the sources at ``root`` (the folder of the package ``vllm``)."""
    found = []
    for module, needs in NEEDS.items():
        if (path := _source(module, root)) is None:
            found.append(f"{module}")
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [f"{module}: {need}" for need in needs if not _is_there(tree, need)]
    return tuple(found)


def _source(module: str, root: Path | None) -> Path | None:
    if root is None:
        spec = find_spec("vllm")
        if spec is None or spec.origin is None:
            return None
        root = Path(spec.origin).parent
    path = root.joinpath(*module.split(".")[1:])
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def _is_there(tree: ast.Module, need: str) -> bool:
    parts = _NEED.fullmatch(need)
    assert parts is not None, need
    wanted = {name.strip() for name in (parts["parameters"] or "").split(",")} - {""}
    if parts["calls"]:
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        ours = [c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == parts["name"]]
        return any(wanted <= {keyword.arg for keyword in call.keywords} for call in ours)
    scope: list[ast.stmt] = tree.body
    *outer, last = parts["name"].split(".")
    for name in outer:
        inside = next((node for node in scope if isinstance(node, ast.ClassDef) and node.name == name), None)
        if inside is None:
            return False
        scope = inside.body
    functions = [n for n in scope if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) and n.name == last]
    if parts["brackets"]:
        return any(wanted <= set(_parameters(function)) for function in functions)
    return bool(functions) or last in set(_names(scope))


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    given = function.args
    yield from (each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs))


def _names(scope: list[ast.stmt]) -> Iterator[str]:
    for node in scope:
        if isinstance(node, ast.ClassDef):
            yield node.name
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        yield from (target.id for target in targets if isinstance(target, ast.Name))
