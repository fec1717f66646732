"""torch.compile by every route: the same tokens and logits as without it, and the unpruned ones after unpatch.

The backend is dynamo's own ("eager"): what matters is what is traced and where graphs break, not what is made of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from zoo import GREEDY, make_batch, models

import vtc

SHORT = GREEDY | {"min_new_tokens": 3, "max_new_tokens": 3}
INSIDE = vtc.TransPrune(layers=(1, 2), ratios=(0.6, 0.3))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def expected(model: Any, batch: Any, method: vtc.Method) -> tuple[torch.Tensor, str, torch.Tensor]:
    with vtc.patch(model, method) as patch:
        return model(**batch).logits, str(patch.last_stages), model.generate(**batch, **SHORT)


def test_a_compiled_model_is_pruned_and_given_back() -> None:
    """Called through the wrapper, and patched through it; graphs of the patch do not outlive it."""
    model, batch = models.llava(), make_batch("llava", images_per_sample=(1,), padding="none")
    whole = model(**batch).logits
    logits, stages, _ = expected(model, batch, vtc.Grid(keep=0.5))
    compiled = torch.compile(model, backend="eager")
    with vtc.patch(compiled, vtc.Grid(keep=0.5)) as patch:
        torch.testing.assert_close(compiled(**batch).logits, logits)
        assert str(patch.last_stages) == stages
    torch.testing.assert_close(compiled(**batch).logits, whole)


def test_what_was_compiled_before_the_patch_is_pruned() -> None:
    model, batch = models.llava(), make_batch("llava", images_per_sample=(1,), padding="none")
    logits, stages, _ = expected(model, batch, INSIDE)
    for layer in model.get_decoder().layers:
        layer.compile(backend="eager")
    model(**batch)
    with vtc.patch(model, INSIDE) as patch:
        torch.testing.assert_close(model(**batch).logits, logits)
        assert str(patch.last_stages) == stages


def test_generate_with_compiled_layers_on_a_ragged_batch() -> None:
    """A dynamic cache: decode steps need their masks translated, also where they are traced."""
    model, batch = models.llava(), make_batch("llava", images_per_sample=(1, 2))
    logits, stages, tokens = expected(model, batch, INSIDE)
    with vtc.patch(model, INSIDE) as patch:
        for layer in model.get_decoder().layers:
            layer.mlp.compile(backend="eager")
            layer.self_attn.compile(backend="eager")
        torch.testing.assert_close(model(**batch).logits, logits)
        assert str(patch.last_stages) == stages
        assert torch.equal(model.generate(**batch, **SHORT), tokens)


def test_a_compiled_language_model() -> None:
    model, batch = models.llava(), make_batch("llava", images_per_sample=(1, 2))
    _, stages, tokens = expected(model, batch, vtc.Grid(keep=0.5))
    with vtc.patch(model, vtc.Grid(keep=0.5)) as patch:
        model.get_decoder().compile(backend="eager")
        assert torch.equal(model.generate(**batch, **SHORT), tokens)
        assert str(patch.last_stages) == stages


def test_a_compiled_forward_with_labels() -> None:
    model, batch = models.llava(), make_batch("llava", images_per_sample=(1,), padding="none")
    inputs = {**batch, "labels": batch["input_ids"]}
    with vtc.patch(model, vtc.Grid(keep=0.5)):
        loss = model(**inputs).loss
        model.forward = torch.compile(model.forward, backend="eager")
        torch.testing.assert_close(model(**inputs).loss, loss)


def test_export_is_refused() -> None:
    model, batch = models.llava(), make_batch("llava", images_per_sample=(1,), padding="none")
    with (
        vtc.patch(model, vtc.Grid(keep=0.5)),
        pytest.raises(Exception, match=r"cannot be exported, vtc.unpatch it first"),
    ):
        torch.export.export(model, (), dict(batch), strict=False)


def test_one_whole_graph_says_what_works() -> None:
    model, batch = models.llava(), make_batch("llava", images_per_sample=(1,), padding="none")
    with vtc.patch(model, vtc.Grid(keep=0.5)), pytest.raises(Exception, match="vtc decides between graphs"):
        torch.compile(model, backend="eager", fullgraph=True)(**batch)
