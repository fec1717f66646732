"""Heads behind the base model: what they make of a pruned prompt is what they make of one that was pruned by hand.

The reference prunes what the unpatched model gives its decoder, runs the decoder on it, and then does by hand what the
head does: the score of the last text token, a normalised vector per token, the scores of all tokens.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from reference import hidden_by_hand
from torch import Tensor, nn
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.llava.modeling_llava import LlavaPreTrainedModel
from zoo import Batch, get_model, make_batch
from zoo.models import _finish

import vtc
from vtc.dialect.heads import Head
from vtc.models import resolve


class LlavaForSequenceClassification(GenericForSequenceClassification, LlavaPreTrainedModel):
    """A reward model as people write it."""


class HandsOn(LlavaForSequenceClassification):
    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """And nothing else."""
        return super().forward(input_ids, **kwargs)


class MeanOfAll(GenericForSequenceClassification, LlavaPreTrainedModel):
    """Pools as it likes."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return self.score(self.model(input_ids, **kwargs).last_hidden_state.mean(1))


class LlavaForTokenClassification(GenericForTokenClassification, LlavaPreTrainedModel):
    pass


class LlavaForQuestionAnswering(GenericForQuestionAnswering, LlavaPreTrainedModel):
    def __init__(self, config: Any) -> None:
        nn.Module.__init__(self)
        LlavaPreTrainedModel.__init__(self, config)
        self.model = tf.LlavaModel(config)
        self.qa_outputs = nn.Linear(config.text_config.hidden_size, 2)


class WithValueHead(tf.LlavaForConditionalGeneration):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.v_head = nn.Linear(config.text_config.hidden_size, 1)


def labelled(family: str, labels: int = 3) -> Any:
    config = copy.deepcopy(get_model(family).config)
    config.num_labels = labels
    return config


def retriever(kind: str, family: str) -> Any:
    config = getattr(tf, f"{kind}Config")(vlm_config=copy.deepcopy(get_model(family).config), embedding_dim=16)
    return _finish(getattr(tf, f"{kind}ForRetrieval"), config)


CLASSIFIERS: dict[str, tuple[str, Callable[[], type]]] = {
    "gemma3": ("gemma3", lambda: tf.Gemma3ForSequenceClassification),
    "gemma3_window8": ("gemma3_window8", lambda: tf.Gemma3ForSequenceClassification),
    "qwen3_5": ("qwen3_5", lambda: tf.Qwen3_5ForSequenceClassification),
    "llava": ("llava", lambda: LlavaForSequenceClassification),
    "hands_on": ("llava", lambda: HandsOn),
}
SHORT = {"gemma3": (1, 1, 0), "paligemma": (1, 1, 0), "qwen2_vl": (1, 1), "qwen2_5_vl": (1, 1)}


@functools.cache
def classifier(name: str) -> Any:
    family, kind = CLASSIFIERS[name]
    return _finish(kind(), labelled(family))


def prompts(family: str, padding: str = "left") -> Batch:
    return make_batch(family, padding=padding)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


# ------------------------------------------------------------------------------------------------- sequence classifiers


@torch.no_grad()
def score_by_hand(model: Any, sample: dict[str, Tensor], images: list[Tensor], keep: list[Tensor]) -> Tensor:
    """The score of the last token, which is text."""
    columns, hidden = hidden_by_hand(model, sample, images, keep)
    assert columns[-1] == sample["input_ids"].shape[1] - 1
    return model.score(hidden[-1])


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_sequence_classifier_scores_the_pruned_prompt(name: str, padding: str) -> None:
    """In a batch, alone, and not what the whole prompt scores; gemma3's image tokens attend both ways."""
    model, batch = classifier(name), prompts(CLASSIFIERS[name][0], padding)
    with vtc.patch(model, "divprune", keep=0.5) as patch:
        together, keep = model(**batch).logits, patch.last_keep
        alone = torch.cat([model(**sample).logits for sample in batch.samples])
    by_hand = [
        score_by_hand(model, sample, images, kept)
        for sample, images, kept in zip(batch.samples, batch.images, keep, strict=True)
    ]
    close(together, torch.stack(by_hand))
    close(alone, together)
    assert (together - model(**batch).logits)[:2].abs().max() > 1e-2


@torch.no_grad()
def test_a_classifier_that_keeps_all_is_the_unpatched_one() -> None:
    model, batch = classifier("gemma3"), prompts("gemma3")
    expected = model(**batch).logits
    with vtc.patch(model, "divprune", keep=1.0):
        assert torch.equal(model(**batch).logits, expected)
    assert torch.equal(model(**batch).logits, expected)


@torch.no_grad()
def test_a_classifier_with_a_method_inside_the_language_model() -> None:
    """What leaves between layers is put back too: the score is that of the last text token in every batch."""
    model, batch = classifier("llava"), prompts("llava")
    with vtc.patch(model, vtc.TransPrune(layers=(1, 2), ratios=(0.5, 0.25))):
        together = model(**batch).logits
        alone = torch.cat([model(**sample).logits for sample in batch.samples])
    with vtc.patch(base := get_model_of(model), vtc.TransPrune(layers=(1, 2), ratios=(0.5, 0.25))):
        last = [base(**sample).last_hidden_state[0, -1] for sample in batch.samples]
    close(together, model.score(torch.stack(last)))
    close(alone, together)


def get_model_of(model: Any) -> Any:
    return resolve(model)[1].base


def test_the_loss_of_a_classifier_and_its_gradients() -> None:
    model, batch = classifier("llava"), prompts("llava")
    labels = torch.tensor([0, 2, 1])
    with vtc.patch(model, "grid", keep=0.5):
        output = model(**batch, labels=labels)
        output.loss.backward()
    expected = nn.functional.cross_entropy(output.logits, labels)
    close(output.loss, expected)
    grads = model.model.language_model.layers[0].self_attn.q_proj.weight.grad
    assert grads is not None
    assert grads.abs().sum() > 0
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def test_a_score_of_an_image_token_that_is_gone_is_refused() -> None:
    """The prompt ends in its image: its last token is scored, if it stayed."""
    model, batch = classifier("llava"), prompts("llava")
    (image,) = batch.images[0]
    end = int(image[-1]) + 1
    cut = {name: value[:, :end] if value.dim() == 2 else value for name, value in batch.samples[0].items()}
    stayed = []
    for seed in range(8):
        with vtc.patch(model, vtc.Random(keep=5, seed=seed)) as patch:
            assert model.model(**cut).last_hidden_state.shape[1] == end - len(image) + 5  # by itself: no head
            ((kept,),) = patch.last_keep
            stayed.append(len(image) - 1 in kept)
            if not stayed[-1]:
                with pytest.raises(IndexError, match="a visual token that was dropped"):
                    model(**cut)
                continue
            score = model(**cut).logits[0]
        close(score, score_by_hand(model, cut, [image], [kept]))
    assert len(set(stayed)) == 2


def test_a_padding_token_that_ids_do_not_show_is_not_scored() -> None:
    """Without a padding id the last column is scored: with padding on the right that is no token at all."""
    config = labelled("llava")
    config.text_config.pad_token_id = None
    model, batch = _finish(LlavaForSequenceClassification, config), prompts("llava", "right")
    row = {name: value[:1] for name, value in batch.items() if name != "pixel_values"}
    with torch.no_grad(), vtc.patch(model, "divprune", keep=0.5), pytest.raises(IndexError, match="padding after all"):
        model(**row, pixel_values=batch["pixel_values"][:1])


# ------------------------------------------------------------------------------------------------ only the base patched


@torch.no_grad()
@pytest.mark.parametrize("alone", [True, False])
def test_a_classifier_whose_base_alone_is_patched_is_refused(alone: bool) -> None:
    """It would index a column that is not there, or score another token beside a longer text."""
    model, batch = classifier("llava"), prompts("llava")
    inputs = batch.samples[0] if alone else batch
    expected = model(**inputs).logits
    with vtc.patch(model.model, "divprune", keep=0.5):
        with pytest.raises(RuntimeError, match=r"LlavaForSequenceClassification.*patch the whole"):
            model(**inputs)
        assert model.model(**inputs).last_hidden_state.shape[1] < inputs["input_ids"].shape[1]
    assert torch.equal(model(**inputs).logits, expected)


@torch.no_grad()
def test_an_unknown_head_over_a_patched_base_is_refused() -> None:
    model = _finish(MeanOfAll, labelled("llava"))
    with vtc.patch(model.model, "grid", keep=0.5), pytest.raises(RuntimeError, match=r"MeanOfAll.*call LlavaModel its"):
        model(**prompts("llava"))


@torch.no_grad()
def test_refused_under_a_compiler_too() -> None:
    model, batch = _finish(LlavaForSequenceClassification, labelled("llava")), prompts("llava")
    compiled = torch.compile(model, backend="eager")
    with vtc.patch(model.model, "divprune", keep=0.5), pytest.raises(RuntimeError, match="patch the whole"):
        compiled(**batch)
    with vtc.patch(model, "divprune", keep=0.5):
        eager = compiled(**batch).logits
    torch._dynamo.reset()
    with vtc.patch(model, "divprune", keep=0.5):
        close(eager, model(**batch).logits)


@torch.no_grad()
def test_a_generating_root_over_a_patched_base_goes_on() -> None:
    model, batch = get_model("llava"), prompts("llava")
    with vtc.patch(model, "divprune", keep=0.5):
        expected = model(**batch, logits_to_keep=1).logits
    with vtc.patch(model.model, "divprune", keep=0.5):
        close(model(**batch, logits_to_keep=1).logits, expected)


# ------------------------------------------------------------------------------------------------------- token by token


@pytest.mark.parametrize(("family", "kind"), [("llava", LlavaForTokenClassification), ("qwen3_5", None)])
def test_a_token_classifier_scores_what_is_left(family: str, kind: type | None) -> None:
    """Its logits line up with ``last_columns``, as those of a language model do, and the loss is over these columns."""
    model = _finish(kind or tf.Qwen3_5ForTokenClassification, labelled(family))
    batch = prompts(family)
    labels = torch.randint(3, batch["input_ids"].shape, generator=torch.Generator().manual_seed(0))
    labels[batch["attention_mask"] == 0] = -100
    with torch.no_grad(), vtc.patch(model, "divprune", keep=0.5) as patch:
        output = model(**batch, labels=labels)
        keep, columns = patch.last_keep, patch.last_columns
    every, wanted = [], []
    for row, (sample, images) in enumerate(zip(batch.samples, batch.images, strict=True)):
        kept, hidden = hidden_by_hand(model, sample, images, keep[row])
        scores = model.score(hidden)
        assert (kept + batch.offsets[row]).tolist() == columns[row].tolist()
        close(output.logits[row, -len(kept) :], scores)
        every.append(scores)
        wanted.append(labels[row, columns[row]])
    close(output.loss, nn.functional.cross_entropy(torch.cat(every), torch.cat(wanted)))


# ------------------------------------------------------------------------------------------------------------ retrieval


def colqwen_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """As ColQwen2's processor has it: the patches of each page in a row of their own, padded."""
    inputs = {name: value for name, value in batch.items() if name != "mm_token_type_ids"}
    if "pixel_values" in inputs:
        pages = inputs["pixel_values"].split(inputs["image_grid_thw"].prod(1).tolist())
        inputs["pixel_values"] = nn.utils.rnn.pad_sequence(list(pages), batch_first=True)
    return inputs


RETRIEVERS = {
    "colpali": ("ColPali", "paligemma", lambda batch: dict(batch)),
    "colqwen2": ("ColQwen2", "qwen2_vl", colqwen_inputs),
    "colqwen2_5": ("ColQwen2", "qwen2_5_vl", colqwen_inputs),
}


@functools.cache
def retriever_of(name: str) -> Any:
    return retriever(*RETRIEVERS[name][:2])


def vectors_by_hand(model: Any, hidden: Tensor) -> Tensor:
    vectors = model.embedding_proj_layer(hidden)
    return vectors / vectors.norm(dim=-1, keepdim=True)


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", RETRIEVERS)
def test_pages_have_fewer_vectors(name: str, padding: str) -> None:
    """Those of the prompt pruned by hand, in order; zeros where a row has none; queries have all of theirs."""
    model, (_, family, convert) = retriever_of(name), RETRIEVERS[name]
    batch = make_batch(family, (1, 1, 0), padding)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with vtc.patch(model, "divprune", keep=0.5) as patch:
            found, keep, columns = model(**convert(batch)).embeddings, patch.last_keep, patch.last_columns
            query = model(**convert(batch.samples[2])).embeddings
    assert len(found[0]) == max(map(len, columns)) < batch["input_ids"].shape[1]
    for row, (sample, images) in enumerate(zip(batch.samples, batch.images, strict=True)):
        kept, hidden = hidden_by_hand(model, convert(sample), images, keep[row])
        assert (kept + batch.offsets[row]).tolist() == columns[row].tolist()
        own = slice(len(found[row]) - len(kept), None) if padding == "left" else slice(len(kept))
        close(found[row, own], vectors_by_hand(model, hidden))
        rest = torch.ones(len(found[row]), dtype=torch.bool)
        rest[own] = False
        assert not found[row, rest].any()
    assert torch.equal(query, model(**convert(batch.samples[2])).embeddings)


@torch.no_grad()
@pytest.mark.parametrize("name", RETRIEVERS)
def test_a_retriever_that_keeps_all_is_the_unpatched_one(name: str) -> None:
    model, (_, family, convert) = retriever_of(name), RETRIEVERS[name]
    inputs = convert(make_batch(family, (1, 1)))
    expected = model(**inputs).embeddings
    with vtc.patch(model, "divprune", keep=1.0):
        assert torch.equal(model(**inputs).embeddings, expected)
    with vtc.patch(model, "divprune", keep=0.5) as patch:
        (pages,) = model(**inputs, return_dict=False)[:1]
        assert pages.shape[1] == max(map(len, patch.last_columns))
    assert torch.equal(model(**inputs).embeddings, expected)


@torch.no_grad()
def test_a_page_knows_its_grid() -> None:
    """A retriever is pruned as its base model is: with that family's adapter."""
    for name, family in (("colpali", "paligemma"), ("colqwen2", "qwen2_vl")):
        assert type(resolve(retriever_of(name))[0]) is type(resolve(get_model(family))[0])
    batch = make_batch("qwen2_vl", (1, 1))
    with vtc.patch(retriever_of("colqwen2"), "grid", keep=0.5) as patch:
        retriever_of("colqwen2")(**colqwen_inputs(batch))
        assert [row[0].segments[0].grid for row in patch.last_layouts] == [(2, 4), (3, 3)]


@torch.no_grad()
def test_pages_with_a_method_inside_the_language_model() -> None:
    model, batch = retriever_of("colqwen2"), make_batch("qwen2_vl", (1, 1))
    with vtc.patch(model, vtc.TransPrune(layers=(1, 2), ratios=(0.5, 0.25))) as patch:
        together, columns = model(**colqwen_inputs(batch)).embeddings, patch.last_columns
        for row, sample in enumerate(batch.samples):
            alone = model(**colqwen_inputs(sample)).embeddings[0]
            assert len(alone) == len(columns[row])
            close(together[row, -len(alone) :], alone)
            close(alone.norm(dim=-1), torch.ones(len(alone)))


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        (MeanOfAll, "score"),
        (LlavaForQuestionAnswering, "qa_outputs"),
        (WithValueHead, "v_head"),
    ],
)
def test_a_head_that_is_not_known_is_refused(kind: type, part: str) -> None:
    model = kind(labelled("llava"))
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    with pytest.raises(vtc.UnsupportedModelError, match=rf"its head \({part}\).*vtc.patch on the base model alone"):
        vtc.patch(model, "divprune", keep=0.5)
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks
    with torch.no_grad(), vtc.patch(model.model, "divprune", keep=0.5) as patch:  # what the message says works
        hidden = model.model(**prompts("llava")).last_hidden_state
        assert hidden.shape[1] == max(map(len, patch.last_columns))


def test_what_needs_generate_says_so() -> None:
    model, batch = classifier("llava"), prompts("llava")
    with pytest.raises(ValueError, match="LlavaForSequenceClassification does not generate"):
        vtc.verify(model, batch, method="divprune")
    with pytest.raises(NotImplementedError, match=r"LlavaForSequenceClassification does not generate; vtc.patch"):
        vtc.compress_inputs(model, batch, "divprune", keep=0.5)


def test_heads_are_told_from_what_they_run() -> None:
    heads = {name: resolve(classifier(name))[1].head for name in ("gemma3", "qwen3_5", "llava", "hands_on")}
    assert set(heads.values()) == {Head.POOLED}
    assert resolve(get_model("llava"))[1].head is resolve(get_model("llava").model)[1].head is Head.TOKENWISE


def test_masks_that_the_base_model_builds_are_known_from_the_base_model() -> None:
    """Whatever stands behind it: classifiers and retrievers do not generate, and say nothing of masks."""
    early = [get_model("gemma3"), get_model("gemma3").model, classifier("gemma3"), retriever_of("colpali")]
    assert all(resolve(model)[1].builds_masks_early for model in early)
    for model in (get_model("llava"), classifier("llava"), retriever_of("colqwen2")):
        assert not resolve(model)[1].builds_masks_early
