"""Prompts with the placeholders of kept tokens only: vLLM's processors, with the count decided by the image's size."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.models.llava import LlavaMultiModalProcessor
from vllm.model_executor.models.llava_next import LlavaNextMultiModalProcessor
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLMultiModalProcessor
from vllm.model_executor.models.qwen2_vl import Qwen2VLMultiModalProcessor
from vllm.model_executor.models.qwen3_vl import Qwen3VLMultiModalProcessor, Qwen3VLProcessingInfo
from vllm.model_executor.models.qwen3_vl_moe import Qwen3VLMoeProcessingInfo
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems

from vtc.budget import Keep
from vtc_vllm import metrics
from vtc_vllm.selection import Selector
from vtc_vllm.settings import REQUEST_KEEP, identity, read, refuse_unknown, with_keep

FIELD = "vtc_{}"
"""By modality, the name of what goes to the model beside each image: float64 [3], its keep, whether that counts tokens,
and :meth:`PruningProcessor.length`."""


class Cut(list[int]):
    """The placeholders of kept tokens.

    Attributes:
        whole: how many there are of all tokens. vLLM's caches keep this object, so it is known of cached images too.
    """

    def __init__(self, tokens: list[int], kept: int) -> None:
        super().__init__(tokens[:kept])
        self.whole = len(tokens)


class PruningProcessor:
    """What our processors share; stands before vLLM's class in the bases."""

    families = ("image",)

    @functools.cached_property
    def selector(self) -> Selector:
        """As the model has it, to count with."""
        hf = self.info.get_hf_config()  # type: ignore[attr-defined]
        return Selector(hf, read(hf.vtc))

    def arguments(self, modality: str, index: int, items: Any, fields: Any) -> Mapping[str, Any]:
        """What the adapter needs to lay one image out."""
        return {}

    def length(self, index: int, items: Any) -> int:
        """Tokens of an image before pruning, where its position depends on that; else 0."""
        return 0

    # ------------------------------------------------------------------------------------------- vLLM's steps, in order

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """The most that a request can ask for, by which vLLM sizes its encoder cache: all tokens."""
        inputs = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        return dataclasses.replace(inputs, hf_processor_mm_kwargs={REQUEST_KEEP: 1.0})

    def get_dummy_mm_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """These, prepared."""
        with metrics.rehearsing():
            return super().get_dummy_mm_inputs(*args, **kwargs)  # type: ignore[misc]

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """All that can be wrong with a request is found here, in the frontend: an encoder that raises stops the engine.

        Raises:
            ValueError: a bad keep, an unknown name that begins as ours do, embeddings instead of pixels, placeholders
                and images that do not match.
        """
        inputs = dataclasses.replace(inputs, prompt=self._begun_once(inputs.prompt))
        refuse_unknown(inputs.hf_processor_mm_kwargs)
        self._method(inputs.hf_processor_mm_kwargs)
        for modality, items in inputs.mm_data_items.items():
            if isinstance(items, (EmbeddingItems, DictEmbeddingItems)):
                raise ValueError(f"{modality} embeddings cannot be pruned; send the {modality} itself")
        self._check_placeholders(self._postprocess_prompt(inputs.prompt), inputs.mm_data_items.get_all_counts())  # type: ignore[attr-defined]
        return super().apply(inputs, timing_ctx)  # type: ignore[misc]

    def _check_placeholders(self, prompt: list[int], counts: Mapping[str, int]) -> None:
        """Before vLLM remembers the images: what is refused later leaves them half known to it, and the next request
        for one of them fails.
        """
        ids = media_ids(self.info.get_hf_config())  # type: ignore[attr-defined]
        for modality, token in ids.items():
            here, given = prompt.count(token), counts.get(modality, 0)
            if here != given:
                raise ValueError(
                    f"the prompt has {here} {modality} placeholders for {given} {modality}s; write one for each, and "
                    "leave it to vLLM to repeat them"
                )
        if len(ids) > 1 and prompt and prompt[-1] in ids.values():
            raise ValueError("the prompt ends inside an image; the family's chat template closes it")

    def _begun_once(self, prompt: Any) -> Any:
        """A chat template writes BOS, and some endpoints (/v1/responses) let the tokenizer write it again."""
        bos = self.info.get_tokenizer().bos_token_id  # type: ignore[attr-defined]
        doubled = bos is not None and not isinstance(prompt, str) and list(prompt[:2]) == [bos, bos]
        return prompt[1:] if doubled else prompt

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        data = super()._apply_hf_processor_main(mm_items, _others(hf_kwargs))  # type: ignore[misc]
        keep = self._method(hf_kwargs).keep
        for modality, count in mm_items.get_all_counts().items():
            if count:
                number = min(keep, 2**53)  # as a float64 can hold it, and more than any image has
                rows = [(number, isinstance(keep, int), self.length(i, mm_items)) for i in range(count)]
                data[FIELD.format(modality)] = torch.tensor(rows, dtype=torch.float64)
        return data

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        fields = super()._get_mm_fields_config(hf_inputs, _others(hf_processor_mm_kwargs))  # type: ignore[misc]
        own = {FIELD.format(m): MultiModalFieldConfig.batched(m, keep_on_cpu=True) for m in self.families}
        return {**fields, **own}

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """The key of a cached image, here and in the encoder and prefix caches: also how it is pruned, and by what."""
        kwargs = inputs.hf_processor_mm_kwargs
        how = identity(self.selector.config, self._method(kwargs).keep)
        return super()._get_mm_hashes(  # type: ignore[misc]
            dataclasses.replace(inputs, hf_processor_mm_kwargs={**_others(kwargs), "vtc": how})
        )

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Any:
        others, keep = _others(hf_processor_mm_kwargs), self._method(hf_processor_mm_kwargs).keep
        updates = super()._get_prompt_updates(mm_items, others, out_mm_kwargs)  # type: ignore[misc]

        def shortened(index: int, modality: str, whole: Any) -> Cut:
            tokens = whole(index)
            arguments = self.arguments(modality, index, mm_items, out_mm_kwargs)
            return Cut(tokens, self.selector.kept(modality, len(tokens), arguments, keep))

        return [
            dataclasses.replace(
                update, replacement=functools.partial(shortened, modality=update.modality, whole=update.replacement)
            )
            for update in updates
        ]

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
        prompt, places = super()._maybe_apply_prompt_updates(mm_items, mm_res)  # type: ignore[misc]
        self._count(places)
        return prompt, places

    def _count(self, places: Mapping[str, Any]) -> None:
        name = self.info.ctx.model_config.served_model_name  # type: ignore[attr-defined]
        for modality, items in places.items():
            for item in items:
                metrics.prepared(name, modality, item.tokens.whole, len(item.tokens))

    def _method(self, kwargs: Mapping[str, Any]) -> Any:
        keep: Keep | None = kwargs.get(REQUEST_KEEP)
        return self.selector.method if keep is None else with_keep(self.selector.method, keep)


def _others(kwargs: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in kwargs.items() if name != REQUEST_KEEP}


def media_ids(hf_config: Any) -> dict[str, int]:
    """The placeholder token of each modality that the plugin prunes."""
    ids = {"image": getattr(hf_config, "image_token_id", None) or getattr(hf_config, "image_token_index", None)}
    if (video := getattr(hf_config, "video_token_id", None)) is not None:
        ids["video"] = video
    return {modality: int(token) for modality, token in ids.items() if token is not None}


def keeps_of(field: torch.Tensor) -> list[Keep]:
    """The keeps in what went beside the images, float64 [G, 3]."""
    return [int(keep) if counts else keep for keep, counts, _ in field.reshape(-1, 3).tolist()]


class LlavaProcessor(PruningProcessor, LlavaMultiModalProcessor):
    """LLaVA-1.5."""

    def length(self, index: int, items: Any) -> int:
        """By its size."""
        size = items["image"].get_image_size(index)
        return self.info.get_num_image_tokens(image_width=size.width, image_height=size.height)


class LlavaNextProcessor(PruningProcessor, LlavaNextMultiModalProcessor):
    """LLaVA-NeXT."""

    length = LlavaProcessor.length

    def arguments(self, modality: str, index: int, items: Any, fields: Any) -> Mapping[str, Any]:
        """Its size, which says how it is cut."""
        size = items["image"].get_image_size(index)
        return {"image_sizes": [(size.height, size.width)]}


class _GridsProcessor(PruningProcessor):
    families = ("image", "video")

    def arguments(self, modality: str, index: int, items: Any, fields: Any) -> Mapping[str, Any]:
        name = f"{modality}_grid_thw"
        return {name: fields[modality][index][name].data[None]}


class Qwen2VLProcessor(_GridsProcessor, Qwen2VLMultiModalProcessor):
    """Qwen2-VL."""


class Qwen25VLProcessor(_GridsProcessor, Qwen2_5_VLMultiModalProcessor):
    """Qwen2.5-VL."""


class _ImagesOnly:
    """Qwen3-VL without video, in which text stands between the frames: the time of each.

    A video has one budget, so what is in it decides how many placeholders go where; vLLM has to know before. Its own
    pruning therefore hides that text in the encoder's output.
    """

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None, "video": 0}

    def validate_num_items(self, modality: str, num_items: int) -> None:
        """Say why.

        Raises:
            ValueError: a video.
        """
        if modality == "video" and num_items:
            raise ValueError(
                "a video cannot be pruned with Qwen3-VL in vLLM: a time stands before each frame, and how many tokens "
                "of a frame stay is not known before the video is encoded. What would work: images; Qwen2.5-VL; or "
                "transformers with vtc.patch"
            )
        super().validate_num_items(modality, num_items)  # type: ignore[misc]


class Qwen3VLInfo(_ImagesOnly, Qwen3VLProcessingInfo):
    """Qwen3-VL."""


class Qwen3VLMoeInfo(_ImagesOnly, Qwen3VLMoeProcessingInfo):
    """Qwen3-VL with experts."""


class Qwen3VLProcessor(_GridsProcessor, Qwen3VLMultiModalProcessor):
    """Both of them."""

    families = ("image",)
