"""Inputs that trainers and their ablations make: masks that hide image tokens, masks of their own, packed samples,
logits of some columns only, copies of an encoder's output.

The right value comes from the unpatched model: dropping a token is the same as hiding it from everything, at the
positions it had.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
import transformers
from release import CACHE
from torch import Tensor
from zoo import GREEDY, Batch, get_model, make_batch

import vtc

FAMILIES = ["llava", "llava_next", "internvl", "idefics3", "mistral3", "ministral3", "gemma3"]
ONE_MASK = ["llava", "llava_next", "internvl", "idefics3", "mistral3"]
ENCODES_AHEAD = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)
INSIDE = vtc.TransPrune(layers=(1, 2), ratios=(0.6, 0.3))


def visual(batch: Batch) -> Tensor:
    """Bool [B, N]: the columns of image tokens."""
    where = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for row, (images, offset) in enumerate(zip(batch.images, batch.offsets, strict=True)):
        for columns in images:
            where[row, columns + offset] = True
    return where


def hidden(batch: Batch, seed: int = 0) -> Tensor:
    """The batch's mask, with about half of the image tokens hidden."""
    lot = torch.rand(batch["input_ids"].shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return batch["attention_mask"].masked_fill(visual(batch) & lot, 0)


def positions(batch: Batch) -> Tensor:
    return torch.arange(batch["input_ids"].shape[1])[None].expand_as(batch["input_ids"])


def stays(batch: Batch, keep: Sequence[Sequence[Tensor]]) -> Tensor:
    """Bool [B, N]: text, and the kept image tokens."""
    where = ~visual(batch)
    for row, (images, offset, kept) in enumerate(zip(batch.images, batch.offsets, keep, strict=True)):
        for columns, chosen in zip(images, kept, strict=True):
            where[row, columns[chosen] + offset] = True
    return where


def logits_at(patch: vtc.Patch, logits: Tensor, padding: str) -> list[Tensor]:
    """The logits [M, V] of each row's real columns."""
    counts = [len(columns) for columns in patch.last_columns or []]
    return [row[:n] if padding == "right" else row[len(row) - n :] for row, n in zip(logits, counts, strict=True)]


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=2e-4)


# -------------------------------------------------------------------------------------------------------- hidden images


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("cache", [True, False])
@torch.no_grad()
def test_a_mask_that_hides_image_tokens_hides_no_text(family: str, padding: str, cache: bool) -> None:
    model, batch = get_model(family), make_batch(family, images_per_sample=(1, 2), padding=padding)
    mask, ids = hidden(batch), positions(batch)
    inputs = {**batch, "position_ids": ids, "use_cache": cache}
    with vtc.patch(model, "grid", keep=0.5) as patch:
        logits = model(**{**inputs, "attention_mask": mask}).logits
        keep, columns = patch.last_keep, patch.last_columns
        rows = logits_at(patch, logits, padding)
    assert keep is not None
    assert columns is not None
    seen = mask.bool() & stays(batch, keep)
    for row, kept in enumerate(columns):
        assert torch.equal(kept, seen[row].nonzero()[:, 0])  # all text, and nothing that is hidden
    expected = model(**{**inputs, "attention_mask": seen.long()}).logits
    for row, kept in enumerate(columns):
        close(rows[row], expected[row, kept])


@torch.no_grad()
def test_hidden_image_tokens_in_generate() -> None:
    model, batch = get_model("llava"), make_batch("llava", images_per_sample=(1, 2))
    mask = hidden(batch)
    inputs = {**batch, "position_ids": positions(batch), "attention_mask": mask}
    for extra in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        with vtc.patch(model, "grid", keep=0.5) as patch:
            tokens = model.generate(**inputs, **GREEDY, **extra)
            seen = mask.bool() & stays(batch, patch.last_keep or [])
        assert torch.equal(tokens, model.generate(**{**inputs, "attention_mask": seen.long()}, **GREEDY)), extra


@torch.no_grad()
def test_hidden_image_tokens_inside_the_language_model() -> None:
    """The text's own logits depend on what each stage left; hidden tokens never count among it."""
    model, batch = get_model("llava"), make_batch("llava", images_per_sample=(1, 2))
    mask = hidden(batch)
    with vtc.patch(model, INSIDE) as patch:
        model(**{**batch, "attention_mask": mask})
        stages = patch.last_stages
    real = mask.bool()
    for _, keep in stages:
        assert not (stays(batch, keep) & visual(batch) & ~real).any()
    assert sum(len(kept) for kept in stages[-1][1][1]) < sum(len(kept) for kept in stages[0][1][1])


@torch.no_grad()
def test_an_image_that_is_hidden_as_a_whole() -> None:
    model, batch = get_model("llava"), make_batch("llava", images_per_sample=(1, 2))
    mask = batch["attention_mask"].masked_fill(visual(batch), 0)
    inputs = {**batch, "attention_mask": mask, "position_ids": positions(batch)}
    for method in (vtc.Grid(keep=0.5), INSIDE):
        with vtc.patch(model, method) as patch:
            logits = model(**inputs).logits
            assert [len(kept) for images in patch.last_keep or [] for kept in images] == [0, 0, 0]
        close(logits[:, -1], model(**inputs).logits[:, -1])


@torch.no_grad()
def test_keep_everything_leaves_hidden_tokens_where_they_are() -> None:
    model, batch = get_model("llava"), make_batch("llava", images_per_sample=(1, 2))
    inputs = {**batch, "attention_mask": hidden(batch)}
    expected = model(**inputs).logits
    with vtc.patch(model, "divprune", keep=1.0):
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.skipif(not ENCODES_AHEAD, reason="from 5.23 on, models take features encoded ahead")
@torch.no_grad()
def test_hidden_image_tokens_in_compress_inputs() -> None:
    model, batch = get_model("llava"), make_batch("llava", images_per_sample=(1, 2))
    inputs = {**batch, "attention_mask": hidden(batch), "position_ids": positions(batch)}
    short = vtc.compress_inputs(model, inputs, "grid", keep=0.5)
    with vtc.patch(model, "grid", keep=0.5):
        expected = model(**inputs).logits[:, -1]
    close(model(**short).logits[:, -1], expected)


# --------------------------------------------------------------------------------------------------- masks of one's own


def four_d(mask: Tensor, backend: str) -> Tensor:
    """Causal, nobody sees padding, and every text column is blind to the first text column: not what anybody builds."""
    width = mask.shape[1]
    allowed = torch.ones(width, width, dtype=torch.bool).tril()[None, None] & mask.bool()[:, None, None]
    allowed[..., -4:, :3] = False
    allowed = allowed | torch.eye(width, dtype=torch.bool)
    return allowed if backend == "sdpa" else torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo().min)


@pytest.mark.parametrize("family", ONE_MASK)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("method", [vtc.Grid(keep=0.5), INSIDE], ids=["entry", "inside"])
@torch.no_grad()
def test_a_4d_mask_of_ones_own_is_obeyed(family: str, backend: str, method: vtc.Method) -> None:
    model, batch = get_model(family), make_batch(family, images_per_sample=(1,), padding="left")
    model.set_attn_implementation(backend)
    try:
        own = four_d(batch["attention_mask"], backend)
        inputs = {name: value for name, value in batch.items() if name != "attention_mask"}
        with vtc.patch(model, method) as patch:
            logits = model(**inputs, attention_mask=own).logits
            plain = model(**inputs).logits
            stages = patch.last_stages
        assert (logits[:, -1] - plain[:, -1]).abs().max() > 1e-3, "the mask says nothing"
        if method is INSIDE:
            assert len(stages) == 3
            return
        gone = ~stays(batch, stages[-1][1])
        blocked = own.clone()
        blocked[..., gone[0]] = False if backend == "sdpa" else torch.finfo().min
        close(logits[:, -1], model(**inputs, attention_mask=blocked).logits[:, -1])
    finally:
        model.set_attn_implementation("sdpa")


@torch.no_grad()
def test_a_4d_mask_on_a_cache_that_was_pruned() -> None:
    model, batch = get_model("llava"), make_batch("llava", images_per_sample=(1, 2))
    width = batch["input_ids"].shape[1]
    more = torch.full((2, 3), 50)
    flat = torch.cat([batch["attention_mask"], torch.ones(2, 3, dtype=torch.long)], 1)
    flat[0, batch.offsets[0] + 1] = 0  # one word of the prompt is hidden from the second turn
    own = (torch.ones(3, width + 3, dtype=torch.bool).tril(width)[None, None] & flat.bool()[:, None, None]).clone()
    with vtc.patch(model, "grid", keep=0.5):
        cache = model(**batch).get(CACHE)
        kept = copy.deepcopy(cache)
        expected = model(input_ids=more, attention_mask=flat, **{CACHE: cache}).logits
        close(model(input_ids=more, attention_mask=own, **{CACHE: kept}).logits, expected)
        with pytest.raises(ValueError, match="must have a column for each of the"):
            model(input_ids=more, attention_mask=own[..., 5:], **{CACHE: kept})


# ---------------------------------------------------------------------------------------------------------- packed rows


@pytest.mark.parametrize("method", [vtc.Grid(keep=0.5), INSIDE], ids=["entry", "inside"])
@torch.no_grad()
def test_packed_samples_do_not_see_each_other(method: vtc.Method) -> None:
    """Two samples in one row, told apart by positions that restart; as in training: no mask, no cache."""
    model = get_model("llava")
    batch = make_batch("llava", images_per_sample=(1, 1))
    first, second = batch.samples
    packed = {
        "input_ids": torch.cat([first["input_ids"], second["input_ids"]], 1),
        "pixel_values": torch.cat([first["pixel_values"], second["pixel_values"]]),
        "position_ids": torch.cat([torch.arange(s["input_ids"].shape[1]) for s in batch.samples])[None],
        "use_cache": False,
    }
    with vtc.patch(model, method) as patch:
        logits = model(**packed).logits[0]
        alone = []
        for sample in batch.samples:
            alone.append(model(**{**sample, "use_cache": False}).logits[0])
        assert patch.last_keep
    if method is INSIDE:  # what it keeps of the first image depends on the text behind the last one: not alike
        close(logits[:1], alone[0][:1])
        return
    close(logits, torch.cat(alone))


def test_packed_samples_are_refused_where_they_cannot_be_kept_apart() -> None:
    model, batch = get_model("llava"), make_batch("llava", images_per_sample=(1,), padding="none")
    ids = torch.arange(batch["input_ids"].shape[1])[None] % 20
    inputs = {"input_ids": batch["input_ids"], "pixel_values": batch["pixel_values"], "position_ids": ids}
    with (
        vtc.patch(model, "grid", keep=0.5, positions="compact"),
        pytest.raises(ValueError, match=r"pack several samples into it.*positions='original'"),
    ):
        model(**inputs, use_cache=False)


# ---------------------------------------------------------------------------------------------------------- some logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_the_logits_that_were_asked_for(family: str, padding: str) -> None:
    model, batch = get_model(family), make_batch(family, images_per_sample=(1, 2), padding=padding)
    width = batch["input_ids"].shape[1]
    text = ~visual(batch).any(0)
    wanted = text.nonzero()[:, 0]
    with vtc.patch(model, "grid", keep=0.5) as patch:
        rows = logits_at(patch, model(**batch).logits, padding)
        columns = patch.last_columns or []
        last = min(5, int(text.flip(0).long().cumprod(0).sum()))
        picked = {
            "tensor": (wanted, model(**batch, logits_to_keep=wanted).logits),
            "negative": (wanted - width, model(**batch, logits_to_keep=wanted - width).logits),
            "int": (torch.arange(width - last, width), model(**batch, logits_to_keep=last).logits),
        }
    compared = 0
    for asked, logits in picked.values():
        assert logits.shape[:2] == (2, len(asked))
        for row in range(2):
            place = {int(column): index for index, column in enumerate(columns[row])}
            for index, column in enumerate((asked % width).tolist()):
                if column in place:  # of padding nothing is promised
                    close(logits[row, index], rows[row][place[column]])
                    compared += 1
    assert compared > 2 * len(wanted)


@torch.no_grad()
def test_logits_of_a_completion_in_grpo() -> None:
    """Prompts padded on the left, completions on the right; the logits of the completion's columns."""
    model, batch = get_model("llava"), make_batch("llava", images_per_sample=(1, 2))
    completion = torch.full((2, 4), 60)
    mask = torch.cat([batch["attention_mask"], torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])], 1)
    ids = torch.cat([batch["input_ids"], completion.masked_fill(mask[:, -4:] == 0, 0)], 1)
    where = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": batch["pixel_values"], "position_ids": where}
    with vtc.patch(model, "grid", keep=0.5) as patch:
        logits = model(**inputs, logits_to_keep=5).logits
        last = model(**inputs, logits_to_keep=1).logits
        keep = patch.last_keep or []
    close(last[0], logits[0, -1:])  # a row that ends in no padding, beside one that does
    seen = torch.cat([stays(batch, keep), torch.ones(2, 4, dtype=torch.bool)], 1) & mask.bool()
    expected = model(**{**inputs, "attention_mask": seen.long()}, logits_to_keep=5).logits
    for row, real in enumerate((mask[:, -5:] > 0).unbind()):
        close(logits[row, real], expected[row, real])


def test_the_logits_of_a_dropped_token_are_refused() -> None:
    model, batch = get_model("llava"), make_batch("llava", images_per_sample=(1, 2))
    image = visual(batch)[1].nonzero()[:, 0]
    with (
        vtc.patch(model, "grid", keep=1),
        pytest.raises(IndexError, match=r"the logits of column \d+ of row . were asked for, and that visual token was"),
    ):
        model(**batch, logits_to_keep=image)


@torch.no_grad()
def test_some_logits_behind_stages_inside() -> None:
    model, batch = get_model("llava"), make_batch("llava", images_per_sample=(1, 2))
    with vtc.patch(model, INSIDE):
        close(model(**batch, logits_to_keep=4).logits, model(**batch).logits[:, -4:])


# -------------------------------------------------------------------------------------------- copies of encoder outputs


@pytest.mark.skipif(not ENCODES_AHEAD, reason="from 5.23 on, models take features encoded ahead")
@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl", "llava_onevision", "idefics3", "qwen2_5_vl"])
@torch.no_grad()
def test_a_copy_of_what_the_encoder_gave_is_as_good(family: str) -> None:
    """accelerate moves outputs between devices, tree_map rebuilds them: attributes are lost, numbers are not."""
    model, batch = get_model(family), make_batch(family, images_per_sample=(1, 2))
    newlines = "keep" if family in ("llava_next", "llava_onevision") else "candidates"
    methods = [vtc.Grid(keep=0.4, newlines=newlines)]
    if family in ("llava", "llava_next", "internvl"):
        methods.append(vtc.ToDRE(keep=0.4))
    names = [name for name in batch if name not in ("input_ids", "attention_mask", "mm_token_type_ids")]
    for method in methods:
        with vtc.patch(model, method) as patch:
            expected, keep = model(**batch).logits, patch.last_keep
            output = model.model.get_image_features(**{name: batch[name] for name in names}, return_dict=True)
            for _ in range(3):  # others are encoded meanwhile
                model(**make_batch(family, images_per_sample=(1, 2), seed=7))
            features = output.pooler_output
            moved = [f.clone() for f in features] if isinstance(features, (list, tuple)) else features.clone()
            copied = type(output)(pooler_output=moved)
            inputs = {name: value for name, value in batch.items() if not name.startswith("pixel_values")}
            logits = model(**inputs, mm_encoder_outputs={"image": copied}).logits
            assert str(patch.last_keep) == str(keep)
            close(logits, expected)


@pytest.mark.skipif(not ENCODES_AHEAD, reason="from 5.23 on, models take features encoded ahead")
def test_features_that_nobody_heard_are_not_guessed() -> None:
    model, batch = get_model("llava_next"), make_batch("llava_next", images_per_sample=(1, 2))
    with torch.no_grad():
        output = model.model.get_image_features(batch["pixel_values"], batch["image_sizes"], return_dict=True)
    inputs = {name: value for name, value in batch.items() if name != "pixel_values"}
    for method, error in ((vtc.Grid(keep=0.4, newlines="keep"), "reads the structure"), (vtc.ToDRE(keep=0.4), "'cls'")):
        with vtc.patch(model, method), pytest.raises(ValueError, match=error):
            model(**inputs, mm_encoder_outputs={"image": output})
