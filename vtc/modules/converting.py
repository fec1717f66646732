"""From a published MQT-LLaVA checkpoint, in the layout of the original LLaVA code, to one that transformers loads.

Every tensor of the checkpoint is either written, under its new name and bit for bit, or named in a refusal. Two kinds
are neither: rotary frequencies and position numbers, which old releases saved; they are compared with what the model
computes by itself. Read are JSON and safetensors only, never a pickle, and of a config only the fields listed here.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtc.modules.llava import LlavaMqtConfig, LlavaMqtForConditionalGeneration
from vtc.modules.mqt import PUBLISHED
from vtc.modules.shards import Move, Report, Source, read_json, write
from vtc.values import shown

IMAGE_TOKEN = "<image>"
CONVERSATION = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
    "{% for message in messages %}{% set said = message['content'] %}"
    "{{ ' USER: ' if message['role'] == 'user' else ' ASSISTANT: ' }}"
    "{% if said is string %}{{ said }}{% else %}"
    "{% for part in said if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in said if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '' if message['role'] == 'user' else '</s>' }}{% endfor %}"
    "{{ ' ASSISTANT:' if add_generation_prompt else '' }}"
)
"""Vicuna's way of asking (`--version v1` in the authors' training scripts), where the tokenizer brings no other."""
FREQUENCIES = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
RESAMPLER, LANGUAGE, TOWER = "model.multi_modal_projector.", "model.language_model.", "model.vision_tower."
EMBEDDING, HEAD = LANGUAGE + "embed_tokens.weight", "lm_head.weight"

Sizes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Conversion:
    """What became of a checkpoint.

    Attributes:
        folder: the result.
        written: tensors in it.
        recomputed: tensors that were compared with what the model computes, and left out.
        left_out: of the vision tower's folder, what belongs to CLIP's text model.
        processor: whether a processor was written: where the checkpoint has a tokenizer.
    """

    folder: Path
    written: int
    recomputed: tuple[str, ...]
    left_out: tuple[str, ...]
    processor: bool


def convert_mqt(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    vision_tower: str | os.PathLike[str],
    heads: int = 16,
    report: Report = lambda what, done, of: None,
) -> Conversion:
    """Write a checkpoint for :func:`vtc.modules.load_mqt`.

    Args:
        checkpoint: folder of the published one: ``config.json`` with ``query_abstractor_type`` "matry_query",
            safetensors with ``model.query_abstractor.*`` and the language model.
        out: folder to be made; it must not exist, or be empty.
        vision_tower: folder of the CLIP model it was trained with, in transformers' layout, which the checkpoint lacks.
        heads: of the resampler, which no published field tells.
        report: called as tensors are written.

    Raises:
        FileNotFoundError: a folder without ``config.json`` or safetensors.
        FileExistsError: ``out`` has something in it.
        ValueError: a config or tensor that is not understood; the message names it. Nothing was written then.
    """
    source, tower, target = Path(checkpoint), Path(vision_tower), Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{shown(str(target))} is there already, and is not overwritten")
    theirs, clip = read_json(source / "config.json"), read_json(tower / "config.json")
    parts, seen = Source.of(source), Source.of(tower)
    tokenizer, image = _tokenizer(source, theirs)
    config = _config(theirs, clip, parts.shapes(), heads, image)
    moves, recomputed, left_out = _plan(config, parts, seen)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".vtc-{secrets.token_hex(6)}")
    work.mkdir()
    try:
        write(work, moves, report)
        config.architectures = [LlavaMqtForConditionalGeneration.__name__]
        config.save_pretrained(work)
        _generation(config).save_pretrained(work)
        if tokenizer is not None:
            _processor(tokenizer, theirs, config).save_pretrained(work)
        if target.exists():
            target.rmdir()
        os.replace(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return Conversion(target, len(moves), recomputed, left_out, tokenizer is not None)


# -------------------------------------------------------------------------------------------------------------- configs

_REQUIRED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llava", "llava_llama"),
    "query_abstractor_type": ("matry_query",),
    "mm_vision_select_feature": ("patch", None),
    "mm_use_im_start_end": (False, None),
    "tie_word_embeddings": (False, None),
    "image_aspect_ratio": ("pad", "square", None),
}
"""Fields of the original config that decide what a model computes, and the values that are understood."""


def _config(theirs: Mapping[str, Any], clip: Mapping[str, Any], shapes: Sizes, heads: int, image: int) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig

    for name, values in _REQUIRED.items():
        if theirs.get(name) not in values:
            works = " or ".join(repr(v) for v in values if v is not None)
            raise ValueError(f"config.json has {name}={shown(theirs.get(name))}; only {works} is understood")
    if clip.get("model_type") not in ("clip", "clip_vision_model"):
        raise ValueError(f"the vision tower is a {shown(clip.get('model_type'))} model; only CLIP is understood")
    if (query := shapes.get(PUBLISHED + "query")) is None or len(query) != 2:
        raise ValueError(f"no {PUBLISHED}query [n, width] in the checkpoint: it is no MQT-LLaVA")
    asked = theirs.get("num_visual_tokens", query[0])
    if asked not in ("first_stage", "second_stage", *range(1, query[0] + 1)):  # names of training's two ways to choose
        raise ValueError(f"config.json has num_visual_tokens={shown(asked)}, and the resampler has {query[0]} queries")
    tower_fields = clip.get("vision_config", {}) if clip["model_type"] == "clip" else clip
    vision = _built(CLIPVisionConfig, tower_fields)
    if vision.hidden_size != query[1]:
        raise ValueError(f"the resampler reads patches of width {query[1]}, and this tower's have {vision.hidden_size}")
    text = _built(LlamaConfig, theirs, vocab_size=max(theirs["vocab_size"], image + 1))
    dtype = str(theirs.get("torch_dtype", theirs.get("dtype", "float16")))
    return LlavaMqtConfig(
        vision_config=vision,
        text_config=text,
        num_queries=query[0],
        query_heads=heads,
        image_seq_length=query[0],
        image_token_index=image,
        vision_feature_layer=theirs.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        dtype=dtype,
    )


def _built(kind: type, fields: Mapping[str, Any], **more: Any) -> Any:
    """A config of those fields that its class has.

    Raises:
        ValueError: it refuses one.
    """
    names = {*kind().to_dict(), "rope_theta", "rope_scaling"} - {
        *("vocab_size", "model_type", "architectures", "transformers_version", "dtype", "torch_dtype"),
        *("_name_or_path", "auto_map", "tie_word_embeddings"),
    }
    known = {name: value for name, value in fields.items() if name in names}
    try:
        return kind(**known, **more)
    except Exception as error:  # of its own kind, in some releases
        raise ValueError(f"config.json makes no {kind.__name__}: {error}") from error


def _generation(config: Any) -> Any:
    from transformers import GenerationConfig

    ids = {name: getattr(config.text_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GenerationConfig(**ids, suppress_tokens=[config.image_token_id])  # it has no meaning in an answer


def _tokenizer(folder: Path, theirs: Mapping[str, Any]) -> tuple[Any, int]:
    """The tokenizer with a token for images, ``None`` where the checkpoint has none, and that token's id."""
    if not isinstance(theirs.get("vocab_size"), int):
        raise ValueError(f"config.json has vocab_size={shown(theirs.get('vocab_size'))}")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None, theirs["vocab_size"]
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(folder, extra_special_tokens={"image_token": IMAGE_TOKEN})
    image: Any = found.convert_tokens_to_ids(IMAGE_TOKEN)
    if not 0 <= image <= theirs["vocab_size"]:
        raise ValueError(f"{IMAGE_TOKEN} would be token {image}, and the embedding has {theirs['vocab_size']} rows")
    return found, image


def _processor(tokenizer: Any, theirs: Mapping[str, Any], config: Any) -> Any:
    """LLaVA's, which counts tokens by squares of pixels: here those of one query."""
    from transformers import LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    side, pixels = int(config.num_queries**0.5), config.vision_config.image_size
    if (pixels // (pixels // side)) != side:
        raise ValueError(f"a picture of {pixels} pixels is not cut into {side} x {side} squares by any whole size")
    images = LlavaImageProcessorPil(
        do_pad=theirs.get("image_aspect_ratio") == "pad",
        size={"shortest_edge": pixels},
        crop_size={"height": pixels, "width": pixels},
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=pixels // side,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template or CONVERSATION,
    )


# -------------------------------------------------------------------------------------------------------------- tensors


def _plan(config: Any, parts: Source, seen: Source) -> tuple[dict[str, Move], tuple[str, ...], tuple[str, ...]]:
    """How each tensor of the result is made; what was recomputed, and what of the tower's folder is left out.

    Raises:
        ValueError: a tensor is unknown, missing, of another shape, or not what is recomputed.
    """
    with torch.device("meta"):
        wanted = {k: tuple(v.shape) for k, v in LlavaMqtForConditionalGeneration(config).state_dict().items()}
    recomputed = [name for name in parts.files if FREQUENCIES.fullmatch(name)]
    recomputed += [name for name in seen.files if name.endswith("embeddings.position_ids")]
    clip = [name for name in seen.files if name.startswith("vision_model.")]
    left_out = [n for n in seen.files if n.startswith(("text_model.", "text_projection.", "visual_projection."))]
    left_out += [n for n in seen.files if n == "logit_scale"]
    rest = [n for n in (*parts.files, *seen.files) if n not in (*recomputed, *left_out)]
    named = {n: _renamed(n, n in clip) for n in rest}
    unknown = [n for n, to in named.items() if to not in wanted]
    doubled = len(named.values()) != len(set(named.values()))
    if unknown or doubled or len(rest) != len(named):
        raise ValueError(f"tensors that have no place in the result: {shown(unknown or 'two of the same name')}")
    if missing := sorted(set(wanted) - set(named.values())):
        raise ValueError(f"tensors that the checkpoint and the vision tower lack: {shown(missing)}")
    shapes = parts.shapes() | seen.shapes()
    moves: dict[str, Move] = {}
    for name, to in named.items():
        origin, grows = (
            seen if name in clip else parts,
            wanted[to][0] - shapes[name][0] if to in (EMBEDDING, HEAD) else 0,
        )
        if (shapes[name][0] + grows, *shapes[name][1:]) != wanted[to]:
            raise ValueError(f"{name} is {list(shapes[name])}, and {to} is {list(wanted[to])}")
        moves[to] = _reading(origin, name, grows)
    _check_recomputed(config, parts, seen, recomputed)
    return moves, tuple(recomputed), tuple(left_out)


def _renamed(name: str, tower: bool) -> str:
    if tower:
        return TOWER + name.removeprefix("vision_model.")
    if name.startswith(PUBLISHED):
        return RESAMPLER + name.removeprefix(PUBLISHED)
    return name if name == HEAD else LANGUAGE + name.removeprefix("model.") if name.startswith("model.") else name


def _reading(origin: Source, name: str, grows: int) -> Move:
    """Reads it; what stands for the image token is a row of zeros, which features replace."""

    def read() -> Tensor:
        found = origin.tensor(name)
        return torch.cat([found, found.new_zeros(grows, found.shape[1])]) if grows else found

    return read


def _check_recomputed(config: Any, parts: Source, seen: Source, names: list[str]) -> None:
    text = config.text_config
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    theta = text.rope_parameters["rope_theta"]
    plain = 1.0 / theta ** (torch.arange(0, width, 2).float() / width)
    for name in names:
        found = (parts if name in parts.files else seen).tensor(name)
        want = plain if FREQUENCIES.fullmatch(name) else torch.arange(found.numel())
        found = found.flatten().float()
        if found.shape != want.shape or not torch.allclose(found, want.float(), rtol=2e-3, atol=1e-6):
            raise ValueError(f"{name} is not what the model would compute, and there is no place for it")
