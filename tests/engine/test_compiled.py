"""torch.compile by every route: the right result is that of the patched model without it, kept tokens and all.

Nothing is compiled to C++: the backend `eager` runs what dynamo traced. What can go wrong is dynamo's part.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import GREEDY, Batch, get_model, make_batch

import vtc
from vtc.handle import patch_of

TRANSPRUNE = vtc.TransPrune(layers=(1,), ratios=(0.25,))


@pytest.fixture
def model() -> Iterator[Any]:
    """A model that a test may compile, as small as TransPrune takes it; nothing compiled is left behind."""
    model = copy.deepcopy(get_model("llava"))
    model.set_attn_implementation("sdpa")
    torch._dynamo.reset()
    yield model
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def batch() -> Batch:
    return make_batch("llava", images_per_sample=(1, 2), padding="left")


def logits(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def kept(patch: vtc.Patch) -> list[list[list[int]]] | None:
    return None if patch.last_keep is None else [[image.tolist() for image in row] for row in patch.last_keep]


def expected(model: Any, batch: Batch, method: Any, run: Callable[..., Tensor] = logits) -> tuple[Tensor, Any]:
    """What the patched model gives without a compiler."""
    with vtc.patch(model, method) as p:
        return run(model, batch), kept(p)


def generated(model: Any, batch: Batch) -> Tensor:
    torch.manual_seed(0)
    return model.generate(**batch, **(GREEDY | {"max_new_tokens": 3, "min_new_tokens": 3}))


def wrapped(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def in_place(model: Any) -> Any:
    """The language model alone, as dynamo takes its time: it is what the hooks of interest are on."""
    model.get_decoder().compile(backend="eager")
    return model


def forward_only(model: Any) -> Any:
    decoder = model.get_decoder()
    decoder.forward = torch.compile(decoder.forward, backend="eager")
    return model


def layers_in_place(model: Any) -> Any:
    for layer in model.get_decoder().layers:
        layer.mlp.compile(backend="eager")
        layer.self_attn.compile(backend="eager")
    return model


def layers_replaced(model: Any) -> Any:
    decoder = model.get_decoder()
    for index, layer in enumerate(decoder.layers):
        layer.mlp = torch.compile(layer.mlp, backend="eager")
        decoder.layers[index] = torch.compile(layer, backend="eager")
    return model


ROUTES = [
    (wrapped, vtc.DivPrune(keep=0.5)),
    (in_place, TRANSPRUNE),
    (forward_only, vtc.DivPrune(keep=0.5)),
    (layers_in_place, TRANSPRUNE),
    (layers_replaced, TRANSPRUNE),
]


@contextmanager
def nothing_compiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize(("compiled", "method"), ROUTES, ids=[route.__name__ for route, _ in ROUTES])
def test_every_route_prunes(compiled: Callable[[Any], Any], method: Any, model: Any, batch: Batch) -> None:
    """Compiled before the patch (through the wrapper, where there is one), and unpruned again when it is undone."""
    whole = logits(model, batch)
    result, keep = expected(model, batch, method)
    run = compiled(model)
    quick = compiled in (forward_only, layers_in_place)  # dynamo takes seconds for all that it sees anew
    if quick:
        assert torch.equal(logits(run, batch), whole)
    with vtc.patch(run, method) as p:
        assert patch_of(run) is p
        assert torch.equal(logits(run, batch), result)
        assert kept(p) == keep
    assert patch_of(run) is None
    if quick:
        assert torch.equal(logits(run, batch), whole)


def test_compiled_after_the_patch(model: Any, batch: Batch) -> None:
    result, keep = expected(model, batch, TRANSPRUNE)
    whole = logits(model, batch)
    p = vtc.patch(model, TRANSPRUNE)
    run = layers_in_place(model)
    assert torch.equal(logits(run, batch), result)
    assert kept(p) == keep
    vtc.unpatch(run)
    assert torch.equal(logits(run, batch), whole)


def test_generating_with_a_compiled_model(model: Any, batch: Batch) -> None:
    """A ragged batch, left-padded: masks of decode steps must be translated, which happens in hooks."""
    result, keep = expected(model, batch, "divprune", generated)
    with nothing_compiled():
        whole = generated(model, batch)
    assert not torch.equal(result, whole)
    model.get_decoder().compile(backend="eager")
    with vtc.patch(model, "divprune") as p:
        assert torch.equal(generated(model, batch), result)
        assert kept(p) == keep


def test_a_twin_shares_no_graph(model: Any, batch: Batch) -> None:
    """Dynamo gives models of one class one graph where its guards let it, in any thread."""
    twin = copy.deepcopy(model)
    result, keep = expected(model, batch, TRANSPRUNE)
    whole = logits(twin, batch)
    found: list[Tensor] = []
    with vtc.patch(layers_in_place(model), TRANSPRUNE) as p:
        layers_in_place(twin)
        thread = threading.Thread(target=lambda: found.extend(logits(m, batch) for m in (twin, model)))
        thread.start()
        thread.join()
        assert torch.equal(found[0], whole)
        assert torch.equal(found[1], result)
        assert kept(p) == keep


def test_training_with_a_compiled_model(model: Any, batch: Batch) -> None:
    """What Trainer(torch_compile=True) runs: logits and labels lose the same columns."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with vtc.patch(model, "divprune", keep=0.5):
        plain = model(**batch, labels=labels)
        plain.loss.backward()
        gradient = model.lm_head.weight.grad.clone()
        model.zero_grad()
        model.model.forward = torch.compiler.disable(model.model.forward)  # what is called behind it is tested above
        model.forward = torch.compile(model.forward, backend="aot_eager")
        out = model(**batch, labels=labels)
        out.loss.backward()
    torch.testing.assert_close(out.loss, plain.loss)
    torch.testing.assert_close(model.lm_head.weight.grad, gradient)


def test_one_graph_is_refused(model: Any, batch: Batch) -> None:
    run = torch.compile(model, backend="eager", fullgraph=True)
    with (
        vtc.patch(run, "divprune", keep=0.5),
        pytest.raises(Exception, match=r"vtc prunes.*What works: fullgraph=False"),
    ):
        logits(run, batch)


@pytest.mark.parametrize("strict", [True, False])
def test_exporting_is_refused(strict: bool, model: Any, batch: Batch) -> None:
    with (
        vtc.patch(model, "divprune", keep=0.5),
        torch.no_grad(),
        pytest.raises(Exception, match=r"torch\.export cannot take a model under vtc\.patch"),
    ):
        torch.export.export(model, (), dict(batch), strict=strict)


@pytest.mark.parametrize("steps", ["generate", "by hand"])
def test_a_step_is_one_graph_only_where_its_masks_were_made(steps: str, model: Any, batch: Batch) -> None:
    """`generate` makes masks for a static cache outside of the graph; whoever calls the model by hand does not."""
    from release import CACHE
    from transformers import CompileConfig, StaticCache

    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def by_hand(run: Any, batch: Batch) -> Tensor:
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=80)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model(**batch, **{CACHE: cache})
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
        ids = torch.full((len(mask), 1), 30)
        positions = batch["attention_mask"].sum(1, keepdim=True)
        with torch.no_grad():
            return run(input_ids=ids, attention_mask=mask, position_ids=positions, **{CACHE: cache}).logits

    if steps == "by hand":
        result, _ = expected(model, batch, "divprune", by_hand)
        model.compile(backend=backend)
        with vtc.patch(model, "divprune"):
            torch.testing.assert_close(by_hand(model, batch), result, rtol=0, atol=1e-5)
        return
    result, _ = expected(model, batch, "divprune", generated)
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": config, "disable_compile": False}
    with vtc.patch(model, "divprune"):
        found = model.generate(**batch, **(GREEDY | {"max_new_tokens": 3, "min_new_tokens": 3} | options))
    assert torch.equal(found, result)
    assert len(graphs) == 1
