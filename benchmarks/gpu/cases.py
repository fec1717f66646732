"""The ops under test: what they are fed, how they are called, and how a result is judged without trusting any of them.

A greedy result is judged by a certificate: in float64, from the picks alone, was each pick the best one given those
before it? Scores are compared with a float64 reference of their own by relative norm. NaN never passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import floors, published
from vtc import ops
from vtc.ops import gather

# ---------------------------------------------------------------------------------------------------------------- sizes


@dataclass(frozen=True)
class Shape:
    """What a model hands to the ops.

    Attributes:
        name: of model and input.
        tokens: visual tokens of an image.
        kept: of these.
        width: of the features.
        heads: of a query, of a key, and their width.
        text: rows of the instruction.
    """

    name: str
    tokens: int
    kept: int
    width: int
    heads: tuple[int, int, int] = (32, 32, 128)
    text: int = 64

    def __str__(self) -> str:
        return f"{self.name} {self.tokens}->{self.kept} d={self.width}"


FULL = (
    Shape("NeXT", 2880, 320, 4096),
    Shape("LLaVA-1.5", 576, 64, 4096),
    Shape("video", 16384, 1638, 3584, (28, 4, 128)),
    Shape("Qwen2.5-VL-1k", 1369, 342, 3584, (28, 4, 128)),
    Shape("Qwen2.5-VL-2k", 5476, 1369, 3584, (28, 4, 128)),
)
TINY = (Shape("tiny", 12, 4, 16, (2, 1, 8), 3), Shape("tiny-odd", 7, 3, 3, (1, 1, 4), 2))


# --------------------------------------------------------------------------------------------------------------- inputs


def clustered(
    batch: int, tokens: int, width: int, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Features [B, N, d] that resemble each other in groups, as those of a picture do: never zeros."""
    groups = max(2, tokens // 16)
    centres = torch.randn(batch, groups, width, generator=generator, device=device)
    which = torch.randint(groups, (batch, tokens), generator=generator, device=device)
    features = torch.empty(batch, tokens, width, dtype=dtype, device=device)
    for image, (own, of) in enumerate(zip(centres, which, strict=True)):
        noise = torch.randn(tokens, width, generator=generator, device=device)
        features[image] = (own[of] + 0.5 * noise + 0.5).to(dtype)
    return features


# ------------------------------------------------------------------------------------------------------------------ ops

Inputs = dict[str, Tensor]
Result = Tensor | tuple[Tensor, ...]
Call = Callable[[Inputs], Any]


@dataclass(frozen=True)
class Op:
    """One op on one shape.

    Attributes:
        name: as in the table.
        inputs: makes them: (batch, device, dtype, generator).
        call: the public function, on a batch.
        published: the same as published, on the inputs of one image without their batch dimension.
        floor: milliseconds: (ceilings, batch, bytes of a number).
        judge: (inputs, result, tolerance) to why it is wrong; empty if it is right.
        exact: the result is indices, which all backends agree on.
        loose: tolerance for ``published``, which computes in the model's dtype.
    """

    name: str
    inputs: Callable[[int, torch.device, torch.dtype, torch.Generator], Inputs]
    call: Call
    published: Call
    floor: Callable[[floors.Ceilings, int, int], float]
    judge: Callable[[Inputs, Any, float], str]
    exact: bool
    tolerance: float
    loose: float


GREEDY = ("farthest_first", "k_center", "max_sum", "mmr")
OPS = (*GREEDY, "transition_variation", "instruction_attention", "gather_columns")


def make(name: str, shape: Shape) -> Op:
    """An op of :data:`OPS` on a shape."""
    if name == "transition_variation":
        return _transition(shape)
    if name == "instruction_attention":
        return _instruction(shape)
    if name == "gather_columns":
        return _columns(shape)
    return _greedy(name, shape)


def image(inputs: Inputs, at: int) -> Inputs:
    """The inputs of one image, still with a batch dimension."""
    return {name: value[at : at + 1] for name, value in inputs.items()}


def _greedy(name: str, shape: Shape) -> Op:
    k = shape.kept

    def inputs(batch: int, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        made = {"features": clustered(batch, shape.tokens, shape.width, device, dtype, generator)}
        if name in ("k_center", "max_sum"):
            made["start"] = torch.randint(shape.tokens, (batch,), generator=generator, device=device)
        if name == "mmr":
            made["importance"] = torch.rand(batch, shape.tokens, generator=generator, device=device)
        return made

    # The ops are looked up when called, so that a test can break one.
    calls: dict[str, Call] = {
        "farthest_first": lambda i: ops.farthest_first(i["features"], k),
        "k_center": lambda i: ops.farthest_first(i["features"], k, i["start"]),
        "max_sum": lambda i: ops.max_sum(i["features"], k, i["start"]),
        "mmr": lambda i: ops.max_marginal_relevance(i["features"], i["importance"], k),
    }
    loops: dict[str, Call] = {
        "farthest_first": lambda i: published.divprune(i["features"], k),
        "k_center": lambda i: published.divprune(i["features"], k, int(i["start"])),
        "max_sum": lambda i: published.max_sum(i["features"], k, int(i["start"])),
        "mmr": lambda i: published.marginal_relevance(i["features"], i["importance"], k),
    }
    all_pairs = name == "farthest_first"
    # Similarities are rounded to float32; a sum of k of them is as much further off. Loops in bf16 are off by its step.
    summed = name == "max_sum"
    return Op(
        name,
        inputs,
        calls[name],
        loops[name],
        lambda on, b, size: floors.greedy(on, b, shape.tokens, k, shape.width, size, all_pairs=all_pairs),
        lambda i, picks, tolerance: certificate(name, i, picks, k, tolerance),
        exact=True,
        tolerance=1e-6 * (k if summed else 1),
        loose=1e-4 * k if summed else 0.02,
    )


def _transition(shape: Shape) -> Op:
    def inputs(batch: int, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        before = clustered(batch, shape.tokens, shape.width, device, dtype, generator)
        after = clustered(batch, shape.tokens, shape.width, device, dtype, generator)
        return {"before": before, "after": after.add_(before)}

    def judge(i: Inputs, result: Tensor, tolerance: float) -> str:
        wanted = []
        for a, b in zip(i["before"], i["after"], strict=True):  # one image at a time: float64 is large
            wanted.append(published.transition_variation(a.double(), b.double()))
        return far(result, torch.stack(wanted), tolerance)

    return Op(
        "transition_variation",
        inputs,
        lambda i: ops.transition_variation(i["before"], i["after"]),
        lambda i: published.transition_variation(i["before"], i["after"]),
        lambda on, b, size: floors.transition(on, b, shape.tokens, shape.width, size),
        judge,
        exact=False,
        tolerance=1e-4,
        loose=0.03,
    )


def _instruction(shape: Shape) -> Op:
    heads, groups, width = shape.heads
    length, scale = shape.tokens + shape.text, width**-0.5
    run = slice(0, shape.tokens)

    def inputs(batch: int, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        query = torch.randn(batch, heads, shape.text, width, generator=generator, device=device)
        key = torch.randn(batch, groups, length, width, generator=generator, device=device)
        return {"query": query.to(dtype), "key": key.to(dtype)}

    def judge(i: Inputs, result: Tensor, tolerance: float) -> str:
        wanted = []
        for q, k in zip(i["query"], i["key"], strict=True):
            q, k = q.double(), k.double().repeat_interleave(heads // groups, 0)
            hidden = torch.ones(shape.text, length, dtype=torch.bool, device=q.device).triu(length - shape.text + 1)
            total = torch.zeros(length, dtype=torch.float64, device=q.device)
            for one, keys in zip(q, k, strict=True):  # a head at a time
                total += (one @ keys.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1).mean(0)
            wanted.append(total[run] / heads)
        return far(result, torch.stack(wanted), tolerance)

    return Op(
        "instruction_attention",
        inputs,
        lambda i: ops.instruction_attention(i["query"], i["key"], scale, run),
        lambda i: published.instruction_attention(i["query"], i["key"], scale, run),
        lambda on, b, size: floors.attention_rows(on, b, heads, groups, shape.text, length, width, size),
        judge,
        exact=False,
        tolerance=1e-3,
        loose=0.03,
    )


def _columns(shape: Shape) -> Op:
    """Compaction: hidden states, keys, values, positions and padding of the columns that stay."""
    _, groups, width = shape.heads
    dims = {"hidden": 1, "key": 2, "value": 2, "positions": 1, "real": 1}

    def inputs(batch: int, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        n = shape.tokens
        draw = torch.rand(batch, n, generator=generator, device=device)
        stored = [torch.randn(batch, groups, n, width, generator=generator, device=device).to(dtype) for _ in range(2)]
        return {
            "hidden": torch.randn(batch, n, shape.width, generator=generator, device=device).to(dtype),
            "key": stored[0],
            "value": stored[1],
            "positions": torch.arange(n, device=device).repeat(batch, 1),
            "real": draw > 0.1,
            "index": draw.argsort(-1)[:, : shape.kept].sort(-1).values,
        }

    def judge(i: Inputs, result: tuple[Tensor, ...], tolerance: float) -> str:
        for name, found in zip(dims, result, strict=True):
            for one, index, out in zip(i[name], i["index"], found, strict=True):
                if not torch.equal(out, one.index_select(dims[name] - 1, index)):
                    return f"{name}: other columns than asked for"
        return ""

    def bytes_kept(batch: int, size: int) -> int:
        return batch * shape.kept * ((shape.width + 2 * groups * width) * size + 8 + 1 + 8)

    return Op(
        "gather_columns",
        inputs,
        lambda i: gather.gather_columns([i[name] for name in dims], i["index"], list(dims.values())),
        lambda i: tuple(i[name].index_select(dim - 1, i["index"]) for name, dim in dims.items()),
        lambda on, b, size: floors.columns(on, bytes_kept(b, size)),
        judge,
        exact=False,
        tolerance=0.0,
        loose=0.0,
    )


# ------------------------------------------------------------------------------------------------------------- verdicts


def parts(result: Result) -> tuple[Tensor, ...]:
    """The tensors of a result."""
    return result if isinstance(result, tuple) else (result,)


def differs(result: Result, wanted: Result, tolerance: float) -> str:
    """Why one result is not another; floats up to ``tolerance`` by relative norm. Empty if it is."""
    for found, want in zip(parts(result), parts(wanted), strict=True):
        if reason := far(found, want, tolerance if want.is_floating_point() else 0.0):
            return reason
    return ""


def error(result: Tensor, wanted: Tensor) -> float:
    """``|result - wanted| / |wanted|`` in float64."""
    return float((result.double() - wanted.double()).norm() / wanted.double().norm())


def far(result: Tensor, wanted: Tensor, tolerance: float) -> str:
    """Why a float result is wrong; empty if it is right."""
    if result.shape != wanted.shape:
        return f"shape {tuple(result.shape)} instead of {tuple(wanted.shape)}"
    found = error(result, wanted) if bool(wanted.any()) else float(result.double().norm())
    return "" if found <= tolerance else f"relative error {found:.2g} is above {tolerance:g}"


def certificate(name: str, inputs: Inputs, picks: Tensor, k: int, tolerance: float) -> str:
    """Why picks [B, k] are not greedy; empty if they are.

    Args:
        name: which objective: one of the four greedy names in :data:`OPS`.
        inputs: of the op.
        picks: LongTensor [B, k].
        k: how many there should be.
        tolerance: how much better than a pick another token may be.
    """
    features = inputs["features"]
    if picks.shape != (len(features), k):
        return f"shape {tuple(picks.shape)} instead of {(len(features), k)}"
    for at in sorted({0, len(features) - 1}):  # the first and the last image of a batch; the others are alike
        own = {key: value[at] for key, value in inputs.items()}
        if reason := _greedy_enough(name, own, picks[at], tolerance):
            return f"image {at}: {reason}"
    return ""


def _greedy_enough(name: str, own: Inputs, picks: Tensor, tolerance: float) -> str:
    n, k = len(own["features"]), len(picks)
    if int(picks.min()) < 0 or int(picks.max()) >= n:
        return f"a pick is no index of {n} tokens"
    if len(picks.unique()) < k:
        return f"only {len(picks.unique())} of {k} picks are distinct"
    z = torch.nn.functional.normalize(own["features"].double(), dim=-1)
    rows = z[picks] @ z.mT
    penalty = rows.cumsum(0) if name == "max_sum" else rows.cummax(0).values
    del rows
    base, weight = (0.5 * own["importance"].double(), 0.5) if name == "mmr" else (penalty.new_zeros(n), 1.0)
    if name == "farthest_first":
        first = -torch.cat([_nearest(z, s, min(s + 1024, n)) for s in range(0, n, 1024)])
    elif name == "mmr":
        first = own["importance"].double()
    else:
        first = torch.zeros_like(base)
        first[own["start"]] = 1.0
    scores = torch.cat([first[None], base - weight * penalty[:-1]])
    taken = torch.zeros(k, n, dtype=torch.bool, device=z.device)
    taken[1:].scatter_(1, picks[:-1, None], True)
    taken = taken.int().cumsum(0) > 0
    best = scores.masked_fill(taken, -torch.inf).amax(1)
    short = best - scores.gather(1, picks[:, None])[:, 0]
    wrong = ~(short <= tolerance)
    if not bool(wrong.any()):
        return ""
    step = int(wrong.int().argmax())
    return f"pick {step} of {k} (token {int(picks[step])}) is {float(short[step]):.2g} worse than the best"


def _nearest(z: Tensor, start: int, stop: int) -> Tensor:
    rows = z[start:stop] @ z.mT
    index = torch.arange(start, stop, device=z.device)
    rows[index - start, index] = -2.0
    return rows.amax(1)
