"""Every method on every family it applies to.

What it keeps is the same however the model runs, and what the model then says is what it says when it cannot see the
dropped tokens. The keep-sets come from the patched run (`last_stages`); whether they are the right ones is for the
tests of the methods.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from every import SAMPLES, SCHEDULE, missing, refusal
from flash import flash_attention
from masked_tower import BlindTower, Departures, overheard_departures
from reference import blind
from release import CACHE, OLD, RELEASE
from torch import Tensor
from zoo import FAMILIES, GREEDY, NEW_TOKENS, Batch, get_model, make_batch

import vtc
from vtc.methods.base import ModelFacts
from vtc.methods.stages import Kept, Step
from vtc.places import Layer, Place, Projector, Tower

FACTS = ModelFacts(model_type="any", width=1, depth=4)
HYBRID = "qwen3_5"
# Ministral 3 scales its queries, so that softmax magnifies rounding: sdpa and eager attention differ by up to 3e-4,
# and in float64, where softmax and norms stay fp32, by a sixth of it. A wrong mask or position costs 0.05 and more.
ROUGH = (HYBRID, "ministral3")
# Caches, backends and releases are the engine's: one method of each kind (before the model, inside it, merging, two of
# them) is enough to see that. The others run on the newest release, with sdpa and flash attention.
NEWEST = (5, 24)
EVERYWHERE = (
    "intower",
    "divprune",
    "fastv",
    "transprune",
    "visionzip",
    "chain",
    "todre",
    "idpruner",
    "fastervlm",
    "globalcom2",
)
PREFIX_LM = ("gemma3", "gemma3_window8", "gemma4", "gemma4_bidirectional", "paligemma")
RUNS = {
    "sdpa": ("sdpa", {}),
    "static": ("sdpa", {"cache_implementation": "static"}),
    "eager": ("eager", {}),
    "uncached": ("eager", {"use_cache": False}),
    "flash": ("flash", {}),
}


# Who refuses what: what keeps a family from a method is a property of its vision tower or of its language model.
NO_TOWER = ("gemma4", "gemma4_bidirectional", "llava_mqt")  # patches and tokens cannot be matched
WITH_CLS = (
    "llava", "llava_adjacent", "vipllava", "llava_next", "llava_next_video", "llava_next_video_image", "video_llava",
    "internvl",
)  # fmt: skip
PROJECTOR = ("llava", "llava_adjacent", "vipllava", "llava_next")  # a patch becomes a token there
UNITS = (  # one sequence for all pictures in the tower, in which the patches of a token stand together
    "qwen2_vl", "qwen2_5_vl", "qwen2_5_vl_video", "qwen3_vl", "qwen3_vl_video", "qwen3_vl_moe", "qwen3_5", "glm46v",
    "glm46v_video",
)  # fmt: skip
RECTANGULAR = (  # one sequence a picture there
    *WITH_CLS, "llava_onevision", "llava_onevision_video", "idefics3", "smolvlm", "gemma3", "gemma3_window8",
    "paligemma",
)  # fmt: skip
OTHERS = ("llava_next_video", "llava_next_video_image", "video_llava")
MERGES = (*PROJECTOR, *OTHERS, "paligemma")  # a patch is a token there
THUMBNAIL = ("llava_next", "llava_next_video", "llava_next_video_image", "llava_onevision", "llava_onevision_video")
SALIENT = ("fastervlm", "scope", "vispruner", "hiprune", "holov", "vscan", "visionzip", "fastvid", "holitom")


def refusing(family: str) -> set[str]:
    """The samples that a family is expected to refuse."""
    found = set()
    for name, method in SAMPLES.items():
        inside = any(isinstance(s.at, Layer) for m in method.members for s in m.stages(FACTS))
        first = method.members[0].name
        if (
            (inside and family == HYBRID)
            or (method.name in SALIENT and family in NO_TOWER)
            or (name == "todre" and family not in WITH_CLS)
            or (name.startswith("prumerge") and family not in PROJECTOR)
            or (method.name == "globalcom2" and family not in THUMBNAIL)
            or (method.name == "intower" and family not in (*RECTANGULAR, *UNITS))
            or (first == "zero-tprune" and family not in RECTANGULAR)
            or (first == "tome" and family not in MERGES)
            or (first == "evit" and family not in (*PROJECTOR, *OTHERS))
            or (method.name == "mqt" and family != "llava_mqt")
            or (first == "pixelprune" and family not in UNITS)
        ):
            found.add(name)
    return found


@functools.cache
def methods_for(family: str) -> dict[str, vtc.Method]:
    """The samples that a family takes."""
    return {name: method for name, method in SAMPLES.items() if name not in refusing(family)}


@pytest.mark.parametrize("family", FAMILIES)
def test_who_refuses_what(family: str) -> None:
    model = get_model(family)
    assert {name for name, method in SAMPLES.items() if refusal(model, method) is not None} == refusing(family)


def test_every_method_is_tried() -> None:
    assert not missing()


def applies(family: str, method: vtc.Method, run: str) -> bool:
    """Not: prefixes and prepared windows with flash attention, which loses them upstream; and methods that read the
    question without a cache, where every step chooses anew and takes the answer so far for part of the question.
    """
    if method.members[0].name in ("tome", "evit") and family == "llava_next_video":
        return False  # its pictures merge, and its videos, which are this family's input, are pooled
    if method.name == "mqt":
        return False  # its positions are compact, and the reference's are not: test_methods_mqt.py
    if run == "flash":
        return family not in (*PREFIX_LM, HYBRID)
    if method.name not in EVERYWHERE and (RELEASE < NEWEST or run not in ("sdpa", "flash")):
        return False
    return run != "uncached" or not method.query_aware


CELLS = [
    (family, name, run)
    for family in FAMILIES
    for name, method in methods_for(family).items()
    for run in RUNS
    if applies(family, method, run)
]


def upstream_bug(family: str, arguments: dict[str, Any]) -> str | None:
    if OLD and family == "paligemma":
        return "before 5.23, the reference, which has no cache, lets generated tokens join PaliGemma's prefix"
    if OLD and family == "gemma4_bidirectional" and "cache_implementation" in arguments:
        return "before 5.23, Gemma4's bidirectional masks do not fit a static cache"
    return None


Stages = list[tuple[int, list[list[list[int]]]]]
Write = tuple[Place, list[tuple[Tensor, Tensor]]]
"""What a method that merges put somewhere: per image, indices among its tokens and the rows that stand there."""
REFERENCES: dict[tuple[str, str], tuple[Stages, Tensor, Tensor]] = {}


@contextmanager
def overheard(model: Any) -> Iterator[list[Write]]:
    """Collect the new values of a prefill, as methods returned them; those in front of the projector go through it."""
    found: list[Write] = []
    real = Step.reduce

    def reduce(step: Step, tokens: Any, *args: Any, **kwargs: Any) -> Kept:
        kept = real(step, tokens, *args, **kwargs)
        if kept.features is not None and not isinstance(step.stage.at, Tower):  # those are written into the tower
            rows = [(w.nonzero()[:, 0], f[w]) for w, f in zip(kept.written, kept.features, strict=True)]
            if step.stage.at == Projector():
                patches = tokens.where("image", "thumbnail", "crops", "frame")
                rows = [(i[p[i]], f[p[i]]) for (i, f), p in zip(rows, patches, strict=True)]
                rows = [(i, model.model.multi_modal_projector(f.to(torch.float32)[None])[0]) for i, f in rows]
            found.append((step.stage.at, rows))
        return kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "reduce", reduce)
        yield found


@contextmanager
def written(model: Any, writes: list[tuple[Place, list[tuple[Tensor, Tensor]]]]) -> Iterator[None]:
    """Put rows at columns of an unpatched model's prompt: of the embeddings, or of what enters a layer."""

    def put(hidden: Tensor, rows: list[tuple[Tensor, Tensor]]) -> Tensor:
        hidden = hidden.clone()
        for columns, values in rows:
            hidden[0, columns] = values.to(hidden.dtype)
        return hidden

    def enters(rows: Any, module: Any, args: Any, kwargs: Any) -> Any:
        return args, kwargs | {"inputs_embeds": put(kwargs["inputs_embeds"], rows)}

    def between(rows: Any, module: Any, args: Any, kwargs: Any) -> Any:
        return (put(args[0], rows), *args[1:]), kwargs

    hooks = []
    for at, rows in writes:
        inside = isinstance(at, Layer)
        module = model.get_decoder().layers[at.after] if inside else model.get_decoder()
        hook = functools.partial(between if inside else enters, rows)
        hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def reference(
    family: str, name: str, stages: Stages, batch: Batch, writes: list[Write], departures: Departures
) -> tuple[Stages, Tensor, Tensor]:
    """Of the first run of a family and method: later runs must have the same keep-sets, and get the same answer."""
    if (family, name) not in REFERENCES:
        model = get_model(family)
        model.set_attn_implementation("eager")
        depth = len(model.get_decoder().layers)
        logits, tokens, tower = [], [], BlindTower(model, departures)
        first = 0  # of the sample's images, among those of the batch
        for row, (sample, images) in enumerate(zip(batch.samples, batch.images, strict=True)):
            gone = []
            for layer in range(depth):
                kept = next(kept[row] for after, kept in reversed(stages) if after <= layer)
                mask = torch.zeros(sample["input_ids"].shape[1], dtype=torch.bool)
                for columns, left in zip(images, kept, strict=True):
                    mask[columns] = True
                    mask[columns[left]] = False
                gone.append(mask)
            own = [
                (at, [(columns[i], values) for columns, (i, values) in zip(images, rows[first:], strict=False)])
                for at, rows in writes
            ]
            first += len(images)
            with blind(model, gone), written(model, own), tower.sample():
                out = model.generate(
                    **sample, **GREEDY, use_cache=False, output_logits=True, return_dict_in_generate=True
                )
            logits.append(torch.stack(out.logits, 1))
            tokens.append(out.sequences[:, -NEW_TOKENS:])
        REFERENCES[family, name] = stages, torch.cat(logits), torch.cat(tokens)
    return REFERENCES[family, name]


def plain(stages: Any) -> Stages:
    return [(after, [[kept.tolist() for kept in images] for images in samples]) for after, samples in stages]


@pytest.mark.sampled(newest=2, older=3, by=("family", "name"))
@pytest.mark.parametrize(("family", "name", "run"), CELLS, ids=["-".join(cell) for cell in CELLS])
def test_what_is_kept_decides_what_is_said(family: str, name: str, run: str) -> None:
    backend, arguments = RUNS[run]
    if reason := upstream_bug(family, arguments):
        pytest.skip(reason)
    model, batch = get_model(family), make_batch(family)
    model.set_attn_implementation("sdpa" if backend == "flash" else backend)
    options = {**GREEDY, **arguments, "output_logits": True, "return_dict_in_generate": True}

    def generate() -> tuple[Any, Stages, list[Write], Departures]:
        with (
            overheard_departures() as departures,  # before hooks are made
            vtc.patch(model, methods_for(family)[name]) as p,
            overheard(model) as writes,
        ):
            out = model.generate(**batch, **options)
            return out, plain(p.last_stages), writes, departures

    if backend == "flash":
        with flash_attention(model):
            out, stages, writes, departures = generate()
    else:
        out, stages, writes, departures = generate()
    if family == HYBRID:
        first, logits, tokens = hybrid(name, stages, out)
    else:
        first, logits, tokens = reference(family, name, stages, batch, writes, departures)
    assert stages == first, "the keep-set depends on how the model runs"
    torch.testing.assert_close(torch.stack(out.logits, 1), logits, rtol=0, atol=5e-4 if family in ROUGH else 1e-4)
    assert torch.equal(out.sequences[:, -NEW_TOKENS:], tokens)


def hybrid(name: str, stages: Stages, out: Any) -> tuple[Stages, Tensor, Tensor]:
    """Linear attention cannot be told not to look: the matrix compares its entry stage, here its runs agree."""
    logits = torch.stack(out.logits, 1)
    return REFERENCES.setdefault((HYBRID, name), (stages, logits, out.sequences[:, -NEW_TOKENS:]))


ALONE = [(family, name) for family, name, run in CELLS if run == "sdpa"]


@pytest.mark.sampled(newest=3, older=6, by=("family", "name"))
@pytest.mark.parametrize(("family", "name"), ALONE, ids=["-".join(cell) for cell in ALONE])
def test_a_sample_is_the_same_alone_and_among_eight(family: str, name: str) -> None:
    """Ragged: other images, other lengths, some without an image. Same keep-sets in every stage, same greedy tokens."""
    model, batch = get_model(family), make_batch(family, images_per_sample=(1, 2, 0, 1, 0, 2, 1, 3))
    model.set_attn_implementation("sdpa")
    with vtc.patch(model, methods_for(family)[name]) as p:
        together = model.generate(**batch, **GREEDY)[:, -NEW_TOKENS:]
        stages = plain(p.last_stages)
        for row, sample in enumerate(batch.samples):
            if not batch.images[row]:
                continue
            alone = model.generate(**sample, **GREEDY)[:, -NEW_TOKENS:]
            assert [(after, samples[0]) for after, samples in plain(p.last_stages)] == [
                (after, samples[row]) for after, samples in stages
            ]
            assert torch.equal(together[row], alone[0])


def test_query_aware_methods_warn_once_in_a_later_turn() -> None:
    from generating import generate, prepared, second_turn
    from transformers import DynamicCache

    model, batch = prepared("llava")
    earlier = "chose by the earlier question"
    for method, warns in ((vtc.TransPrune(**SCHEDULE), True), (vtc.DivPrune(keep=0.5), False)):
        cache = DynamicCache(config=model.config.get_text_config())
        with vtc.patch(model, method), pytest.warns(UserWarning, match=earlier) if warns else nothing() as seen:
            first = generate(model, batch, **{CACHE: cache})
            _, text = second_turn(batch, first)
            second = generate(model, text, **{CACHE: cache})
            third = second_turn(batch, second)[1]
            generate(model, third, **{CACHE: cache})
        told = [w for w in seen or [] if earlier in str(w.message)]
        assert len(told) == warns
        if warns:
            assert "of 48 visual tokens are gone" in str(told[0].message)


class nothing:
    """Stands in for pytest.warns where no warning is expected."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *args: Any) -> None:
        return None
