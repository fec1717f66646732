"""MQT: a prefix of the resampler's tokens, compact, is a prompt of so many placeholders; and who is refused."""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import FAMILIES, GREEDY, NEW_TOKENS, get_model, make_batch

import vtc
from vtc.modules import MatryoshkaQueryTransformer
from vtc.zoo.parts import IMAGE

FAMILY, QUERIES = "llava_mqt", 9
COUNTS = (1, 2, 4, 8)


def shorter(sample: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The same prompt with ``count`` placeholders for each picture."""
    ids = sample["input_ids"][0].tolist()
    at = [i for i, token in enumerate(ids) if token == IMAGE]
    runs = [at[i : i + QUERIES] for i in range(0, len(at), QUERIES)]
    left = {i for run in runs for i in run[count:]}
    ids = [token for i, token in enumerate(ids) if i not in left]
    return sample | {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}


def with_queries(count: int) -> Any:
    """A copy of the model that computes ``count`` queries and no more, unpatched."""
    model = copy.deepcopy(get_model(FAMILY))
    model.model.multi_modal_projector.keep = count
    return model


@pytest.mark.parametrize("count", COUNTS)
@torch.no_grad()
def test_a_prefix_is_a_prompt_with_so_many_placeholders(count: int) -> None:
    """Logits of the text behind the pictures, alone; and greedy answers."""
    model, reference = get_model(FAMILY), with_queries(count)
    for sample in make_batch(FAMILY).samples[:2]:
        short = shorter(sample, count)
        text = 9  # the shortest closing text
        with vtc.patch(model, "mqt", keep=count) as handle:
            found = model(**sample).logits[:, -text:]
            said = model.generate(**sample, **GREEDY)[:, -NEW_TOKENS:]
            assert handle.last_keep[0][0].tolist() == list(range(count))
        torch.testing.assert_close(found, reference(**short).logits[:, -text:], rtol=0, atol=1e-5)
        assert torch.equal(said, reference.generate(**short, **GREEDY)[:, -NEW_TOKENS:])


@torch.no_grad()
def test_original_positions_would_be_another_model() -> None:
    """The control of the test above: what a gap behind the prefix costs."""
    model, sample = get_model(FAMILY), make_batch(FAMILY).samples[0]
    with vtc.patch(model, vtc.DivPrune(keep=4), positions="compact") as handle:
        model(**sample)
        kept = handle.last_keep[0][0].tolist()
    assert kept != [0, 1, 2, 3]  # not what any method keeps
    short = with_queries(4)(**shorter(sample, 4)).logits[:, -9:]
    ids = sample["input_ids"]
    stays = torch.ones_like(ids, dtype=torch.bool)
    stays[0, (ids[0] == IMAGE).nonzero()[4:, 0]] = False
    places = torch.arange(ids.shape[1])[None][stays][None]
    gap = with_queries(4)(**shorter(sample, 4), position_ids=places).logits[:, -9:]
    assert (gap - short).abs().max() > 1e-2


@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_in_a_batch_as_alone(padding: str) -> None:
    model, batch = get_model(FAMILY), make_batch(FAMILY, padding=padding)
    with vtc.patch(model, "mqt", keep=4):
        alone = [model(**sample).logits[0, -1] for sample in batch.samples]
        logits = model(**batch).logits
    ends = [-1] * 3
    if padding == "right":
        stays = [int(s["attention_mask"].sum()) - sum(len(c) - 4 for c in at) for s, at in zip(
            batch.samples, batch.images, strict=True)]  # fmt: skip
        ends = [n - 1 for n in stays]
    for row, end, want in zip(logits, ends, alone, strict=True):
        torch.testing.assert_close(row[end], want, rtol=0, atol=2e-5)


@torch.no_grad()
def test_a_prompt_shortened_ahead() -> None:
    """Without hooks, by `vtc.compress_inputs`, where images can be encoded ahead."""
    model, sample = get_model(FAMILY), make_batch(FAMILY).samples[1]
    if "mm_encoder_outputs" not in inspect.signature(model.model.forward).parameters:
        pytest.skip("this release cannot")
    found = model(**vtc.compress_inputs(model, dict(sample), "mqt", keep=4)).logits
    want = with_queries(4)(**shorter(sample, 4)).logits
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)


def test_by_hand() -> None:
    sample = make_batch(FAMILY).samples[1]
    assert vtc.verify(get_model(FAMILY), sample, method="mqt", keep=4).ok


@pytest.mark.parametrize(("keep", "count"), [(0.25, 2), (1, 1), (8, 8), (100, 9), (1.0, 9)])
def test_counts_are_known_ahead(keep: float, count: int) -> None:
    layouts = [vtc.tokens.Layout.plain(QUERIES)] * 2
    assert vtc.MQT(keep=keep).counts(layouts) == (count, count)


def test_bare_tensors() -> None:
    chosen = vtc.select("mqt", torch.randn(36, 8), keep=8)
    assert chosen.index.tolist() == chosen.order.tolist() == list(range(8))


def test_keep_one_is_the_unpatched_model() -> None:
    model, batch = get_model(FAMILY), make_batch(FAMILY)
    with torch.no_grad():
        want = model(**batch).logits
        with vtc.patch(model, "mqt", keep=1.0):
            assert torch.equal(model(**batch).logits, want)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != FAMILY])
def test_other_projectors_are_refused_by_name(family: str) -> None:
    with pytest.raises(ValueError, match=re.escape("'mqt' keeps the first tokens of a Matryoshka Query")) as why:
        vtc.patch(get_model(family), "mqt", keep=4)
    assert repr(get_model(family).config.model_type) in str(why.value)
    if family == "llava":
        assert "is LlavaMultiModalProjector" in str(why.value)


def test_original_positions_are_refused_with_the_reason() -> None:
    words = "positions='original' does not fit 'mqt': it keeps a prefix"
    for ask in (
        lambda: vtc.patch(get_model(FAMILY), "mqt", keep=4, positions="original"),
        lambda: vtc.CompressionConfig("mqt", {"keep": 4}, positions="original"),
        lambda: vtc.CompressionConfig.of(vtc.Adaptive(vtc.MQT()), "original"),
        lambda: vtc.CompressionConfig.of(vtc.InTower(then=vtc.MQT(keep=4)), "original"),
        lambda: vtc.CompressionConfig.of(vtc.Chain(vtc.MQT(), vtc.FastV()), "original"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            ask()


def test_compact_is_the_default_and_is_written_down() -> None:
    config = vtc.CompressionConfig("mqt", {"keep": 4})
    assert config.positions == "compact"
    assert vtc.CompressionConfig.from_dict(config.to_dict()) == config
    assert vtc.CompressionConfig.from_dict({"version": 1, "method": "mqt"}).positions == "compact"
    assert vtc.CompressionConfig.of(vtc.Adaptive(vtc.MQT())).positions == "compact"
    assert vtc.CompressionConfig("divprune").positions == "original"
    with vtc.patch(get_model(FAMILY), vtc.MQT(keep=4)) as handle:
        assert handle.config.positions == "compact"


def test_signals_of_patches_are_not_read_as_if_of_tokens() -> None:
    """A token of the resampler has no patch; nor where somebody puts one into a LLaVA by hand."""
    with pytest.raises(ValueError, match="needs 'cls', which this LlavaMqtForConditionalGeneration cannot give") as why:
        vtc.patch(get_model(FAMILY), "fastervlm")
    assert "divprune" in str(why.value)
    assert "mqt" not in str(why.value).partition("What would work")[2]
    model = copy.deepcopy(get_model("llava"))
    model.model.multi_modal_projector = MatryoshkaQueryTransformer(9, 32, 32, heads=4).eval()
    with (
        vtc.patch(model, "fastervlm", keep=4),
        pytest.raises(ValueError, match="16 patches are not among 9 tokens"),
        torch.no_grad(),
    ):
        model(**make_batch(FAMILY).samples[0])
