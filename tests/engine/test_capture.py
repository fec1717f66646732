"""Selection and entry as one graph: with a static budget nothing in them depends on a value.

torch.compile(fullgraph=True) refuses whatever it cannot trace; a CUDA graph, whatever waits for the device.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import get_model, make_batch

import vtc
from vtc.engine import entry
from vtc.engine.choosing import compaction, decide, plan
from vtc.engine.context import Call
from vtc.engine.locate import Located

METHODS = [  # not random, which draws with a generator of its own on the host
    vtc.DivPrune(keep=0.5),
    vtc.DivPrune(keep=4, newlines="keep"),
    vtc.ToDRE(keep=0.5),
    vtc.ToDRE(keep=0.5, variant="k_center"),
    vtc.IDPruner(keep=0.5),
    vtc.Allocate(keep=0.5, by="uniform", selector=vtc.DivPrune()),
    vtc.Grid(keep=0.5),
]


def recorded(
    family: str, method: vtc.Method, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, Call, list[Located], Tensor, Tensor]:
    """What runs the settled method, and what the entry stage gets in a real prefill of a ragged batch."""
    seen: list[tuple[Any, Call, list[Located], Tensor, Tensor]] = []

    def spy(chooser: Any, running: Call, embeds: Tensor, judge: Any) -> Any:
        decision = plan(chooser, running, embeds, judge)
        assert decision is not None
        seen.append((chooser, copy.copy(running), decision.images, decision.flat, embeds))
        return decision

    monkeypatch.setattr(entry, "plan", spy)
    model = get_model(family)
    with vtc.patch(model, method), torch.no_grad():
        model(**make_batch(family, padding="left"))
    return seen[0]


def select_and_enter(
    chooser: Any, running: Call, images: list[Located], flat: Tensor, embeds: Tensor
) -> tuple[Tensor, ...]:
    decision = decide(chooser, running, images, flat, embeds)
    compact = compaction(decision, running, embeds.shape[:2])
    ids = torch.arange(embeds.shape[1], device=embeds.device)[None]
    return compact.sequence(embeds), compact.positions(ids), compact.valid, decision.keep


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_selection_and_entry_are_one_graph(family: str, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chooser, running, images, flat, embeds = recorded(family, method, monkeypatch)
    torch.compiler.reset()
    run = functools.partial(select_and_enter, chooser, running, images, flat)
    expected = run(embeds)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=False)
    for got, wanted in zip(compiled(embeds), expected, strict=True):
        assert torch.equal(got, wanted)
    other = embeds.flip(0).contiguous()  # the graph chooses anew, it does not remember
    for got, wanted in zip(compiled(other), run(other), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", [vtc.DivPrune(keep=0.5), vtc.IDPruner(keep=0.5), vtc.Grid(keep=0.5)], ids=str)
def test_a_cuda_graph_holds_selection_and_entry(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chooser, running, images, flat, embeds = recorded("llava", method, monkeypatch)
    chosen = [image for image in images if image.row == 0][:1]  # one image: one length, nothing to copy from the host
    running.mask = running.lengths = None
    flat, embeds = flat[:1].cuda(), embeds[:1].cuda()
    running.encoded = {
        name: dataclasses.replace(e, signals={key: [s.cuda() for s in rows] for key, rows in e.signals.items()})
        for name, e in running.encoded.items()
    }
    run = functools.partial(select_and_enter, chooser, running, chosen, flat)
    expected = run(embeds)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(embeds)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(embeds)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    torch.cuda.synchronize()
    for got, wanted in zip(captured, expected, strict=True):
        assert torch.equal(got, wanted)
