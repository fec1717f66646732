"""Part (b), correctness on the device: kernels against references on odd shapes, and nothing outside FlashAttention.

Kernels must pick exactly what the torch reference picks, which a certificate in float64 judges in turn; scores are
compared with float64 by relative norm. Then every method prunes a prompt and decodes with torch's FlashAttention as the
only attention there is: a mask, or attention weights asked for, would raise.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import vtc
from benchmarks.gpu import cases, models
from benchmarks.gpu.capability import no_host_sync
from benchmarks.gpu.cases import OPS, Inputs, Op, Shape
from benchmarks.gpu.methods import METHODS, around_entry, check, method, prefill
from benchmarks.gpu.models import SPECS, Spec
from benchmarks.gpu.rows import NO, SKIPPED, YES, Row
from benchmarks.gpu.selection import by, missing
from benchmarks.gpu.suite import Suite, forced
from vtc import ops
from vtc.methods import method_class
from vtc.methods.video import VideoMethod

# N, k, d and images of every kind: one token, a pair, odd sizes, newline-laden NeXT; all of them, one of them
ODD = (
    (1, 1, 1, 1), (1, 1, 64, 3), (2, 2, 3, 1), (2, 1, 1024, 2), (17, 17, 1, 2), (17, 5, 3, 5), (17, 17, 64, 1),
    (577, 64, 1024, 3), (577, 577, 64, 1), (577, 1, 3584, 2), (2928, 320, 3584, 2), (2928, 288, 64, 4),
)  # fmt: skip
FEW = ((1, 1, 1, 1), (17, 5, 3, 2), (9, 9, 8, 1))
FAMILIES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def run(suite: Suite) -> None:
    """Ops first, then attention."""
    for dtype in (torch.float32,) if suite.smoke else FAMILIES:
        for name in OPS:
            exact(suite, name, dtype)
    padding(suite)
    for spec in SPECS:
        flash(suite, spec.tiny() if suite.smoke else spec.reduced())
    flash_package(suite)


# ------------------------------------------------------------------------------------------------------------- the ops


def exact(suite: Suite, name: str, dtype: torch.dtype) -> None:
    """One op over all odd shapes, by each backend: how many cases, and whether all were right."""
    shapes = FEW if suite.smoke else ODD
    for backend in ("torch", "triton"):
        row = Row(f"{name}: right", "odd shapes", FAMILIES[dtype], 0, backend, unit="cases")
        op = cases.make(name, cases.TINY[0])
        if reason := next((why for why, of in missing(suite, op) if of == backend), ""):
            suite.sheet.add(replace(row, correct=SKIPPED, note=reason))
        elif suite.reached(row):
            with suite.case(row):
                wrong = [f"N={n} k={k} d={d} B={b}: {why}" for n, k, d, b in shapes if (why := _case(
                    suite, name, Shape("odd", n, k, d, (4, 2, 16), min(n, 5)), b, dtype, backend
                ))]  # fmt: skip
                note = "; ".join(wrong)[:200]
                suite.sheet.add(replace(row, median=len(shapes), correct=NO if wrong else YES, note=note))


def _case(suite: Suite, name: str, shape: Shape, batch: int, dtype: torch.dtype, backend: str) -> str:
    op = cases.make(name, shape)
    generator = torch.Generator(suite.device).manual_seed(shape.tokens)
    given = op.inputs(batch, suite.device, dtype, generator)
    result = by(backend, op)(given)
    if reason := op.judge(given, result, op.tolerance):
        return reason
    if backend == "triton" and op.exact and (reason := _same(_degenerate(given), op)):
        return f"degenerate rows: {reason}"
    return _same(given, op) if backend == "triton" and op.exact else ""


def _same(given: Inputs, op: Op) -> str:
    differ = by("triton", op)(given) != by("torch", op)(given)
    return f"{int(differ.sum())} of {differ.numel()} picks are not those of the torch reference" if differ.any() else ""


def _degenerate(given: Inputs) -> Inputs:
    """Exact duplicates and rows of zeros: ties, which the lowest index wins."""
    features = given["features"].clone()
    features[:, 1::3] = features[:, :1]
    features[:, 4::5] = 0.0
    return given | {"features": features}


def padding(suite: Suite) -> None:
    """NaN in masked rows changes nothing, and images of different lengths are each picked from as if alone."""
    lengths, width, k = ((9, 3, 7), 8, 3) if suite.smoke else ((2928, 577, 1369), 1024, 320)
    generator = torch.Generator(suite.device).manual_seed(9)
    features = cases.clustered(len(lengths), max(lengths), width, suite.device, torch.float32, generator)
    mask = torch.arange(max(lengths), device=suite.device) < torch.tensor(lengths, device=suite.device)[:, None]
    poisoned = features.masked_fill(~mask[..., None], torch.nan)
    for backend in ("torch", "triton"):
        row = Row("farthest_first: padding", "ragged, NaN", "fp32", len(lengths), backend, unit="")
        op = cases.make("farthest_first", cases.TINY[0])
        if reason := next((why for why, of in missing(suite, op) if of == backend), ""):
            suite.sheet.add(replace(row, correct=SKIPPED, note=reason))
        elif suite.reached(row):
            with suite.case(row), forced(backend):
                together = ops.farthest_first(poisoned, k, mask=mask)
                alone = [ops.farthest_first(own[:n], min(k, n)) for own, n in zip(features, lengths, strict=True)]
                same = all(torch.equal(a[: len(b)], b) for a, b in zip(together, alone, strict=True))
                note = "" if same else "padded rows change the picks"
                suite.sheet.add(replace(row, correct=YES if same else NO, note=note))


# ------------------------------------------------------------------------------------------------------ flash attention


class FlashOnly(TorchFunctionMode):
    """Counts attention calls, and refuses what FlashAttention cannot do.

    On a GPU torch's kernel refuses masks itself once it is the only one allowed; on the CPU it takes them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.calls += 1
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            if mask is not None:
                raise RuntimeError(f"attention call {self.calls} has a mask {tuple(mask.shape)}: not FlashAttention")
        return func(*args, **kwargs)


@contextmanager
def flash_only() -> Iterator[FlashOnly]:
    """Nothing but FlashAttention, and no masks."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), FlashOnly() as watch:
        yield watch


def flash(suite: Suite, spec: Spec) -> None:
    """Every method on one model under :func:`flash_only`, and around its entry stage no host sync."""
    dtype = torch.float32 if suite.device.type == "cpu" else torch.bfloat16
    rows = {
        name: Row(f"flash only: {name}", spec.name, FAMILIES[dtype], 1, "sdpa flash", unit="calls")
        for name in ("unpruned", "padded (must be refused)", *names())
    }
    if not all(suite.reached(row) for row in list(rows.values())[:1]):
        return
    with suite.case(rows["unpruned"]):
        model = models.build(spec, suite.device, dtype)
        inputs, tokens = models.prompts(spec, model, 2)
        one, _ = models.prompts(spec, model, 1)
        with flash_only() as watch:
            prefill(model, inputs)
        suite.sheet.add(replace(rows["unpruned"], batch=2, median=watch.calls))
        suite.sheet.add(_control(model, inputs, rows["padded (must be refused)"]))
        for name in names():
            if suite.reached(rows[name]):
                with suite.case(rows[name]):
                    for row in _flash(suite, spec, model, one, tokens, name, rows[name]):
                        suite.sheet.add(row)


def names() -> list[str]:
    """All registered methods that choose in pictures, those of the table first.

    Not those inside the vision tower: what they are compared with here are the features of the whole tower. Nor those
    that take only models trained for them.
    """
    ours = (name for name in vtc.list_methods() if method_class(name).__module__.startswith("vtc."))
    of_pictures = (name for name in ours if not issubclass(method_class(name), VideoMethod))
    behind = (name for name in of_pictures if not method_class(name)().acts_in_tower)
    of_any_model = (name for name in behind if not method_class(name).trained)
    return [*METHODS, *(name for name in of_any_model if name not in METHODS)]


def _control(model: Any, inputs: dict[str, Tensor], row: Row) -> Row:
    """A prompt that does need a mask must not pass, or the others prove nothing."""
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, 0] = 0
    try:
        with flash_only():
            prefill(model, inputs | {"attention_mask": mask})
    except RuntimeError:
        return replace(row, batch=2, unit="", note="refused")
    return replace(row, batch=2, correct=NO, note="a padded prompt passed: this check sees nothing")


def _flash(
    suite: Suite, spec: Spec, model: Any, inputs: dict[str, Tensor], tokens: int, name: str, row: Row
) -> Iterator[Row]:
    try:
        chosen = method(name, spec, tokens)
        vtc.patch(model, chosen).unpatch()
    except (ValueError, TypeError) as error:
        yield replace(row, correct=SKIPPED, note=f"refused: {' '.join(str(error).split())[:120]}")
        return
    with flash_only() as watch:
        reason, note, _ = check(spec, model, inputs, name, tokens)
        with vtc.patch(model, chosen):
            generate(model, inputs, 4)
    yield replace(row, median=watch.calls, correct=NO if reason else YES, note=reason or note)
    sync = replace(row, case=f"entry without host sync: {name}", unit="")
    if suite.device.type != "cuda":
        yield replace(sync, correct=SKIPPED, note="on the CPU the host has nothing to wait for")
    elif name == "globalcom2":
        yield replace(sync, correct=SKIPPED, note="waits once, as documented: budgets depend on the picture")
    else:
        with vtc.patch(model, chosen), ExitStack() as quiet:
            prefill(model, inputs)
            with around_entry(model, lambda: quiet.enter_context(no_host_sync(suite.device)), quiet.close):
                prefill(model, inputs)
        yield replace(sync, note="select and compaction waited for nothing")


def generate(model: Any, inputs: dict[str, Tensor], tokens: int) -> Tensor:
    """Greedy tokens, always as many; never a special one, which a random model likes to say."""
    return model.generate(
        **inputs, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, suppress_tokens=list(range(20)),
        pad_token_id=0,
    )  # fmt: skip


def flash_package(suite: Suite) -> None:
    """The same with ``flash_attention_2``, where the package is installed."""
    row = Row("flash_attention_2", "all", "bf16", 1, "flash_attention_2", unit="")
    if suite.device.type != "cuda" or importlib.util.find_spec("flash_attn") is None:
        where = "needs a CUDA device" if suite.device.type != "cuda" else "the package flash_attn is not installed"
        suite.sheet.add(replace(row, correct=SKIPPED, note=where))
        return
    for spec in (spec.reduced() for spec in SPECS):
        with suite.case(replace(row, shape=spec.name)):
            model = models.build(spec, suite.device, torch.bfloat16)
            model.set_attn_implementation("flash_attention_2")
            inputs, tokens = models.prompts(spec, model, 1)
            for name in names():
                own = replace(row, case=f"flash_attention_2: {name}", shape=spec.name)
                try:
                    reason, note, _ = check(spec, model, inputs, name, tokens)
                except (ValueError, TypeError) as error:
                    suite.sheet.add(replace(own, correct=SKIPPED, note=f"refused: {str(error)[:120]}"))
                    continue
                with vtc.patch(model, method(name, spec, tokens)):
                    generate(model, inputs, 4)
                suite.sheet.add(replace(own, correct=NO if reason else YES, note=reason or note))
