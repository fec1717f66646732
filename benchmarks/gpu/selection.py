"""Part (a), selection: every op on the shapes of real models, against its reference, the published loop and its floor.

The floor of a time is arithmetic and bytes at what the device was measured to do, and one dependent step for each pick.
That of a memory row are the features themselves. Nothing is timed before its result was found right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from benchmarks.gpu import cases
from benchmarks.gpu.capability import captured, has_kernel, launches, no_host_sync, no_triton
from benchmarks.gpu.cases import FULL, OPS, TINY, Inputs, Op, Shape
from benchmarks.gpu.rows import NO, SKIPPED, Row
from benchmarks.gpu.suite import Suite, forced
from benchmarks.gpu.timing import extra_memory, measure, once
from vtc.ops import recursion

BATCHES = (1, 32, 8)  # most telling first: time runs out at the end
SLOW = 1500.0  # milliseconds for one call, above which it is left out
PUBLISHED_BATCH = 1  # published code takes one image at a time


def run(suite: Suite) -> None:
    """All cells, a batch size at a time."""
    dtype = torch.float32 if suite.smoke else torch.bfloat16  # the interpreter does not know bf16 everywhere
    pace: dict[tuple[str, str, str], float] = {}
    shapes = TINY if suite.smoke else FULL
    for batch in (1, 2) if suite.smoke else BATCHES:
        for shape in shapes[:1] if suite.smoke and batch > 1 else shapes:
            for name in OPS:
                row = Row(name, str(shape), _short(dtype), batch, "all")
                if suite.reached(row):
                    with suite.case(row):
                        cell(suite, cases.make(name, shape), shape, batch, dtype, pace)
    for name in OPS:
        capabilities(suite, name, shapes[0], dtype)


def cell(
    suite: Suite,
    op: Op,
    shape: Shape,
    batch: int,
    dtype: torch.dtype,
    pace: dict[tuple[str, str, str], float] | None = None,
) -> None:
    """Check, then time, one op on one shape and batch by every backend.

    Args:
        suite: where to and for how long.
        op: the op on the shape.
        shape: its name.
        batch: images.
        dtype: of the features.
        pace: milliseconds for each image by (op, shape, backend), from smaller batches; brought up to date.
    """
    pace = {} if pace is None else pace
    name = partial(Row, op.name, str(shape), _short(dtype), batch)
    sets = _inputs(suite, op, batch, dtype)
    floor = op.floor(suite.ceilings, batch, dtype.itemsize)
    right: dict[str, Callable[[int], object]] = {}
    for backend, call in contenders(suite, op, batch).items():
        if (likely := pace.get((op.name, shape.name, backend), 0.0) * batch) > SLOW:
            suite.sheet.add(replace(name(backend), correct=SKIPPED, note=f"would take about {likely / 1e3:.0f} s"))
            continue
        try:
            reason = judged(op, sets[0], call, backend, batch)
        except torch.OutOfMemoryError:
            suite.sheet.add(replace(name(backend), correct=SKIPPED, note="does not fit the memory"))
            continue
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        if reason:
            suite.sheet.add(replace(name(backend), correct=NO, note=reason))
            continue
        right[backend] = lambda at, call=call: call(sets[at % len(sets)])
        if not suite.smoke:
            pace[op.name, shape.name, backend] = once(lambda call=call: call(sets[0]), suite.device) / batch
    for reason, backend in missing(suite, op):
        suite.sheet.add(replace(name(backend), correct=SKIPPED, note=reason))
    if not right:
        return
    rounds = {"least": 1, "most": 1, "warm": 1} if suite.smoke else {"least": 2, "most": 40, "warm": 1}
    for backend, sample in measure(right, suite.device, 0.6, **rounds).items():
        times = name(backend, sample.median, sample.p10, sample.p90, floor=floor, note=sample.note)
        suite.sheet.add(times)
    for backend, run_ in right.items():
        memory = Row(f"{op.name}: extra memory", str(shape), _short(dtype), batch, backend, unit="MiB")
        features = sum(value.nbytes for value in sets[0].values()) / 2**20
        peak = extra_memory(lambda run_=run_: run_(0), suite.device)
        if peak is None:
            suite.sheet.add(replace(memory, correct=SKIPPED, note=f"nobody counts memory on {suite.device.type}"))
        else:
            suite.sheet.add(replace(memory, median=peak, floor=features, note="floor: the inputs themselves"))


def contenders(suite: Suite, op: Op, batch: int) -> dict[str, cases.Call]:
    """Who can run an op here: the torch reference, the kernel, the published loop."""
    found: dict[str, cases.Call] = {"torch": by("torch", op)}
    if not missing(suite, op):
        found["triton"] = by("triton", op)
    if batch == PUBLISHED_BATCH:
        found["published"] = lambda i: _batched(op.published({key: value[0] for key, value in i.items()}))
    return found


def missing(suite: Suite, op: Op) -> list[tuple[str, str]]:
    """(why, backend) for backends that cannot run an op here."""
    if reason := no_triton(suite.device):
        return [(reason, "triton")]
    small = op if suite.smoke else cases.make(op.name, TINY[0])
    given = small.inputs(1, torch.device("cpu"), torch.float32, torch.Generator().manual_seed(0))
    return [] if has_kernel(lambda: small.call(given)) else [("this op has no kernel yet", "triton")]


def judged(op: Op, given: Inputs, call: cases.Call, backend: str, batch: int) -> str:
    """Why a backend's result is wrong; empty if it is right.

    Beside the op's own judge, kernels must pick exactly what the torch reference picks; of a large batch, in its first
    and its last image.
    """
    result = call(given)
    if reason := op.judge(given, result, op.loose if backend == "published" else op.tolerance):
        return reason
    if op.exact and backend == "triton":
        for at in sorted({0, batch - 1}):
            wanted = by("torch", op)(cases.image(given, at))[0]
            if differ := int((result[at] != wanted).sum()):
                return f"{differ} of {wanted.numel()} picks of image {at} are not those of the torch reference"
    return ""


def capabilities(suite: Suite, name: str, shape: Shape, dtype: torch.dtype) -> None:
    """No host sync, one graph, capture, and launches for one op; on a small shape where size does not matter."""
    op = cases.make(name, shape)
    small = cases.make(name, TINY[0])
    generator = torch.Generator(suite.device).manual_seed(3)
    for backend in ("torch", "triton"):
        given = op.inputs(1, suite.device, dtype, generator)
        few = small.inputs(1, suite.device, dtype, generator)
        call = by(backend, op)
        checks: dict[str, Callable[[], Row]] = {
            "no host sync": partial(_no_sync, suite, call, given),
            "one graph (torch.compile)": partial(_one_graph, suite, backend, small.call, few),
            "launches": partial(_launches, suite, call, given),
            "replayed CUDA graph": partial(_replay, suite, op, call, given),
        }
        unfit = next((reason for reason, of in missing(suite, op) if of == backend), "")
        if not unfit and backend == "triton" and suite.device.type != "cuda":
            unfit = "an interpreted kernel reads its data on the host"
        for what, check in checks.items():
            row = Row(f"{name}: {what}", str(TINY[0] if "graph (" in what else shape), _short(dtype), 1, backend)
            if unfit:
                suite.sheet.add(replace(row, correct=SKIPPED, unit="", note=unfit))
            elif suite.reached(row):
                with suite.case(row):
                    found = check()
                    own = {"case": row.case, "shape": row.shape, "dtype": row.dtype, "backend": backend}
                    suite.sheet.add(replace(found, **own))


_BLANK = Row("", "", "", 1, "", unit="")


def _no_sync(suite: Suite, call: cases.Call, given: Inputs) -> Row:
    call(given)
    with recursion.unbranched(), no_host_sync(suite.device):  # on a CPU there is nothing to wait for, and picks branch
        call(given)
    return replace(_BLANK, note="nothing waited")


def _one_graph(suite: Suite, backend: str, call: cases.Call, given: Inputs) -> Row:
    torch._dynamo.reset()
    with forced(backend):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager" if suite.device.type == "cuda" else "eager")
        found, wanted = compiled(given), call(given)
    torch._dynamo.reset()
    if reason := cases.differs(found, wanted, 1e-5):
        return replace(_BLANK, correct=NO, note=reason)
    return replace(_BLANK, note="fullgraph=True")


def _launches(suite: Suite, call: cases.Call, given: Inputs) -> Row:
    count = float(launches(lambda: call(given), suite.device))
    return replace(_BLANK, median=count, unit="kernels" if suite.device.type == "cuda" else "operators")


def _replay(suite: Suite, op: Op, call: cases.Call, given: Inputs) -> Row:
    if suite.device.type != "cuda":
        return replace(_BLANK, correct=SKIPPED, note="needs a CUDA device")
    wanted = tuple(part.clone() for part in cases.parts(call(given)))
    replay, result = captured(lambda: call(given), suite.device)
    result = cases.parts(result)
    for part in result:
        part.zero_()
    replay()
    if reason := cases.differs(result, wanted, 1e-6):
        return replace(_BLANK, correct=NO, note=f"the replay differs: {reason}")
    sample = measure({"replay": lambda _: replay()}, suite.device, 0.3)["replay"]
    floor = op.floor(suite.ceilings, 1, 2)
    return replace(
        _BLANK, median=sample.median, p10=sample.p10, p90=sample.p90, unit="ms", floor=floor, note=sample.note
    )


def by(backend: str, op: Op) -> cases.Call:
    """An op, forced to a backend."""

    def call(given: Inputs) -> torch.Tensor:
        with forced(backend):
            return op.call(given)

    return call


def _batched(result: cases.Result) -> cases.Result:
    return tuple(part[None] for part in result) if isinstance(result, tuple) else result[None]


def _inputs(suite: Suite, op: Op, batch: int, dtype: torch.dtype) -> list[Inputs]:
    """Several sets, together larger than the cache where that is affordable."""
    generator = torch.Generator(suite.device).manual_seed(batch)
    sets = [op.inputs(batch, suite.device, dtype, generator)]
    size = sum(value.nbytes for value in sets[0].values())
    count = 2 if suite.smoke else max(2, min(6, 2**28 // size))
    return sets + [op.inputs(batch, suite.device, dtype, generator) for _ in range(count - 1)]


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
