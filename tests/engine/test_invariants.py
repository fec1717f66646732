"""The invariants of the design: one instance, batch, everything kept, no sync, threads, refusals.

Every invariant is a function `check_...` that is used twice: on vtc as it is, and on a vtc that breaks the invariant on
purpose (the negative control), where the very same function must fail. That pruning equals the model called by hand
is test_matrix.py; that attention weights are never asked for is in test_signals.py.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from release import CACHE
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from transformers import DynamicCache
from zoo import FAMILIES, GREEDY, Batch, get_model, make_batch

import vtc
from vtc import installing, patching
from vtc.engine import choosing, context, entry, generation, lengths, opening
from vtc.engine.entry import EntryStage
from vtc.methods.base import image_seed

SHORT = GREEDY | {"min_new_tokens": 3, "max_new_tokens": 3}
# A few families that differ in what the engine and the adapters do; the other families take one method each.
VARIED = ["llava_next", "llava_onevision", "video_llava", "qwen2_5_vl", "qwen3_vl_video", "internvl", "gemma3"]


@functools.cache
def batch_of(family: str, images: tuple[int, ...] = (1, 2, 0)) -> Batch:
    return make_batch(family, images)


def pivot_for(model: Any) -> str:
    """Found without vtc: does a vision tower of the model own a CLS embedding?"""
    has_cls = any(name.endswith(("class_embedding", "cls_token")) for name, _ in model.named_parameters())
    mixes = any(name.endswith("projector.query") for name, _ in model.named_parameters())  # no token has a patch then
    return "cls" if has_cls and not mixes else "random"


@torch.no_grad()
def logits_of(model: Any, batch: Batch) -> Tensor:
    return model(**batch).logits


@torch.no_grad()
def tokens_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model.generate(**batch, **SHORT)[:, batch["input_ids"].shape[1] :]


# ------------------------------------------------------------------------------------------ 1: one instance, no traces

Install = Callable[[vtc.Patch], None]


def hooks_of(holder: dict[str, Any]) -> dict[str, list[Any]]:
    """Every hook table, the `..._with_kwargs` and `..._always_called` companions included."""
    return {name: list(table.items()) for name, table in holder.items() if "hooks" in name and hasattr(table, "items")}


def attributes_of(holder: Any) -> dict[str, Any]:
    """Names of the instance attributes; of the callable ones (what a patch would replace) also which they are."""
    return {name: value if callable(value) else None for name, value in vars(holder).items()}


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Everything about a model that patching might leave traces in."""

    classes: dict[str, type]
    class_attributes: dict[type, dict[str, Any]]
    hooks: dict[str, dict[str, list[Any]]]
    attributes: dict[str, dict[str, Any]]
    config: dict[str, Any]
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, model: Any) -> Snapshot:
        modules = dict(model.named_modules())
        types = {type(m) for m in modules.values()}
        everywhere = {"<global>": hooks_of({k: v for k, v in vars(torch_module).items() if k.startswith("_global_")})}
        configs = {"config": model.config, "generation_config": model.generation_config}
        return cls(
            {name: type(m) for name, m in modules.items()},
            {kind: {**vars(kind)} for kind in types},
            everywhere | {name: hooks_of(vars(m)) for name, m in modules.items()},
            {name: attributes_of(m) for name, m in modules.items()},
            {name: (attributes_of(c), repr(c.to_dict()), backend_of(c)) for name, c in configs.items()},
            {name: t.clone() for name, t in model.state_dict().items()},
        )

    def assert_same(self, other: Snapshot) -> None:
        for field in dataclasses.fields(self):
            mine, others = getattr(self, field.name), getattr(other, field.name)
            assert mine.keys() == others.keys(), field.name
            for key in mine:
                same = torch.equal if field.name == "weights" else lambda a, b: a == b
                assert same(mine[key], others[key]), f"{field.name} of {key!r}: {mine[key]} became {others[key]}"


def backend_of(config: Any) -> Any:
    return getattr(config, "_attn_implementation", None)


def check_leaves_no_trace(model: Any, batch: Batch, use: Callable[[Any, Batch], None]) -> None:
    logits = logits_of(model, batch)  # first: transformers installs hooks of its own in the first forward pass
    before = Snapshot.of(model)
    use(model, batch)
    before.assert_same(Snapshot.of(model))
    assert torch.equal(logits_of(model, batch), logits)


def generate_in_a_with_block(model: Any, batch: Batch) -> None:
    with vtc.patch(model, "divprune", keep=0.5):
        tokens_of(model, batch)


def forward_and_unpatch_by_name(model: Any, batch: Batch) -> None:
    vtc.patch(model, vtc.ToDRE(keep=2, pivot=pivot_for(model)))  # taps the vision tower where there is a CLS token
    try:
        logits_of(model, batch)
    finally:  # the model is shared: other tests need not fail with this one
        vtc.unpatch(model)


class Deliberate(Exception):
    """Raised by the tests themselves."""


def error_in_the_block(model: Any, batch: Batch) -> None:
    def body() -> None:
        with vtc.patch(model, "grid", keep=0.5):
            logits_of(model, batch)
            raise Deliberate

    with pytest.raises(Deliberate):
        body()


def error_inside_generate(model: Any, batch: Batch) -> None:
    """The method fails in the middle of a forward pass."""
    with pytest.MonkeyPatch.context() as patching_grid:
        patching_grid.setattr(vtc.Grid, "reduce", failing)
        with pytest.raises(Deliberate), vtc.patch(model, "grid", keep=0.5):
            tokens_of(model, batch)


def error_while_installing(model: Any, batch: Batch) -> None:
    """The last thing that `_install` does fails: what it did before must be undone."""
    with pytest.MonkeyPatch.context() as patching_patching:
        patching_patching.setattr(installing, "pruning_labels", failing)
        with pytest.raises(Deliberate):
            vtc.patch(model, "divprune", keep=0.5)


def failing(*args: Any, **kwargs: Any) -> Any:
    raise Deliberate


USES = [generate_in_a_with_block, forward_and_unpatch_by_name]
ERRORS = [error_in_the_block, error_inside_generate, error_while_installing]


@pytest.mark.parametrize("use", USES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_unpatching_leaves_no_trace(family: str, use: Callable[[Any, Batch], None]) -> None:
    check_leaves_no_trace(get_model(family), batch_of(family), use)


@pytest.mark.parametrize("use", ERRORS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("family", VARIED)
def test_errors_leave_no_trace(family: str, use: Callable[[Any, Batch], None]) -> None:
    check_leaves_no_trace(get_model(family), batch_of(family), use)


def forget_an_attribute(handle: vtc.Patch) -> None:
    """The undo list lacks what puts an attribute back (the handle's own is next to what forgets graphs)."""
    del handle.undo[1]


def forget_a_hook(handle: vtc.Patch) -> None:
    handle.model.get_decoder().register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)


def forget_a_global_hook(handle: vtc.Patch) -> None:
    torch_module.register_module_forward_pre_hook(lambda module, args: None)


def swap_a_class(handle: vtc.Patch) -> None:
    layer = handle.model.get_decoder().layers[0]
    layer.__class__ = type("Patched", (type(layer),), {})


def patch_a_class(handle: vtc.Patch) -> None:
    type(handle.model).vtc_was_here = True


def move_a_weight(handle: vtc.Patch) -> None:
    with torch.no_grad():
        handle.model.get_decoder().norm.weight.mul_(1 + 1e-6)


def touch_the_config(handle: vtc.Patch) -> None:
    handle.model.config.vtc_config = {"keep": 0.5}


def swap_the_attention(handle: vtc.Patch) -> None:
    handle.model.config._attn_implementation = "eager"


TRACES = [
    forget_an_attribute,
    forget_a_hook,
    forget_a_global_hook,
    swap_a_class,
    patch_a_class,
    move_a_weight,
    touch_the_config,
    swap_the_attention,
]


@contextmanager
def also_installing(extra: Install) -> Iterator[None]:
    """A vtc that does one thing too many, and nothing that takes it back."""
    install = patching.install

    def broken(handle: vtc.Patch) -> None:
        install(handle)
        extra(handle)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(patching, "install", broken)
        try:
            yield
        finally:  # what would outlive the throw-away model
            torch_module._global_forward_pre_hooks.clear()
            if "vtc_was_here" in vars(type(get_model("llava"))):
                del type(get_model("llava")).vtc_was_here


@pytest.mark.parametrize("trace", TRACES, ids=lambda f: f.__name__)
def test_control_a_trace_is_found(trace: Install) -> None:
    model = FAMILIES["llava"].build()
    with also_installing(trace), pytest.raises(AssertionError):
        check_leaves_no_trace(model, batch_of("llava"), generate_in_a_with_block)


def test_control_the_trace_of_a_failed_patch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vtc that does not roll back what it installed before the error."""
    monkeypatch.setattr(vtc.Patch, "__init__", with_an_undo_list_that_forgets)
    with pytest.raises(AssertionError):
        check_leaves_no_trace(FAMILIES["llava"].build(), batch_of("llava"), error_while_installing)


def with_an_undo_list_that_forgets(self: vtc.Patch, model: Any, config: Any, stage: EntryStage) -> None:
    class Forgetful(list):  # type: ignore[type-arg]
        def append(self, undo: Callable[[], None]) -> None:
            pass

    self.model, self.config, self.stage, self.undo = model, config, stage, Forgetful()


def check_neighbour_never_notices(first: Any, second: Any, batch: Batch) -> None:
    logits = logits_of(second, batch)
    before = Snapshot.of(second)
    with vtc.patch(first, "divprune", keep=0.5):
        tokens_of(first, batch)
        before.assert_same(Snapshot.of(second))
        assert torch.equal(logits_of(second, batch), logits)
    assert torch.equal(logits_of(second, batch), logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_model_of_the_class_never_notices(family: str) -> None:
    check_neighbour_never_notices(FAMILIES[family].build(), get_model(family), batch_of(family))


@pytest.mark.parametrize("trace", [patch_a_class, forget_a_global_hook], ids=lambda f: f.__name__)
def test_control_a_second_model_notices(trace: Install) -> None:
    with also_installing(trace), pytest.raises(AssertionError):
        check_neighbour_never_notices(FAMILIES["llava"].build(), get_model("llava"), batch_of("llava"))


# ------------------------------------------------------------------------------------------- 3: alone and in any batch

EIGHT = (1, 2, 0, 1, 3, 1, 0, 2)


def methods_for(family: str) -> list[vtc.Method]:
    pivot = pivot_for(get_model(family))
    return [
        vtc.DivPrune(keep=0.4),
        vtc.ToDRE(keep=0.4, pivot=pivot),
        vtc.ToDRE(keep=3, variant="k_center", pivot=pivot),
        vtc.Random(keep=0.4),
        vtc.Grid(keep=3),
    ]


def method_cells() -> list[tuple[str, int]]:
    """All methods on the varied families, one on each of the others."""
    return [
        (family, index)
        for number, family in enumerate(FAMILIES)
        for index in range(5)
        if family in VARIED or number % 5 == index
    ]


def plain(keep_sets: list[list[Tensor]] | None) -> list[list[list[int]]]:
    return [[kept.tolist() for kept in images] for images in keep_sets or []]


def check_alone_as_in_the_batch(model: Any, batch: Batch, method: vtc.Method) -> None:
    with vtc.patch(model, method) as handle:
        together, keep_sets = tokens_of(model, batch), plain(handle.last_keep)
        assert len(keep_sets) == len(batch.samples)
    for index, sample in enumerate(batch.samples):
        with vtc.patch(model, method) as handle:
            alone = tokens_of(model, sample)
            assert plain(handle.last_keep) == ([keep_sets[index]] if batch.images[index] else [])
        assert alone.tolist() == together[index : index + 1].tolist()


@pytest.mark.parametrize(("family", "index"), method_cells())
def test_a_sample_is_the_same_alone_and_in_a_batch(family: str, index: int) -> None:
    check_alone_as_in_the_batch(get_model(family), batch_of(family, EIGHT), methods_for(family)[index])


def one_generator_for_all(self: vtc.Random, stage: Any, tokens: Any, budget: tuple[int, ...]) -> vtc.Reduction:
    generator = torch.Generator().manual_seed(image_seed(self.seed, 0, 0))
    picks = torch.zeros(len(budget), max(budget), dtype=torch.long)
    for g, (k, n) in enumerate(zip(budget, tokens.lengths, strict=True)):
        picks[g, :k] = torch.randperm(n, generator=generator)[:k]
    return vtc.Reduction(picks)


def numbered_in_the_batch(images: list[Any]) -> tuple[int, ...]:
    return tuple(range(len(images)))


def relative_to_the_batch(self: vtc.DivPrune, stage: Any, tokens: Any, budget: tuple[int, ...]) -> vtc.Reduction:
    real = tokens.mask[..., None]
    mean = (tokens.features * real).sum((0, 1)) / real.sum()
    return vtc.Reduction(vtc.ops.farthest_first(tokens.features - mean, max(budget), mask=tokens.mask))


def blind_to_padding(self: vtc.DivPrune, stage: Any, tokens: Any, budget: tuple[int, ...]) -> vtc.Reduction:
    return vtc.Reduction(vtc.ops.farthest_first(tokens.features, max(budget)).clamp(max=min(tokens.lengths) - 1))


BATCH_LEAKS: list[tuple[Any, str, Any, vtc.Method]] = [
    (vtc.Random, "reduce", one_generator_for_all, vtc.Random(keep=0.4)),
    (choosing, "ordinals", numbered_in_the_batch, vtc.Random(keep=0.4)),
    (vtc.DivPrune, "reduce", relative_to_the_batch, vtc.DivPrune(keep=0.4)),
    (vtc.DivPrune, "reduce", blind_to_padding, vtc.DivPrune(keep=0.4)),
]


@pytest.mark.parametrize(("owner", "name", "leak", "method"), BATCH_LEAKS, ids=lambda v: getattr(v, "__name__", ""))
def test_control_a_leak_over_the_batch_is_found(
    owner: Any, name: str, leak: Any, method: vtc.Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, leak)
    with pytest.raises((AssertionError, ValueError)):  # picks of padding are refused before anybody compares
        check_alone_as_in_the_batch(get_model("llava_next"), batch_of("llava_next", EIGHT), method)


# ----------------------------------------------------------------------------------- 4: everything kept, bit for bit


def check_keeping_all_is_the_unpatched_model(model: Any, batch: Batch, keep: float | int) -> None:
    record = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        plain_logits, plain_run = model(**batch).logits, model.generate(**batch, **SHORT, **record)
        with vtc.patch(model, "divprune", keep=keep):
            logits, run = model(**batch).logits, model.generate(**batch, **SHORT, **record)
    assert torch.equal(logits, plain_logits)
    assert torch.equal(run.sequences, plain_run.sequences)
    for ours, theirs in zip(run.scores + run.logits, plain_run.scores + plain_run.logits, strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = getattr(run, CACHE), getattr(plain_run, CACHE)
    assert type(ours) is type(theirs)
    assert vars(ours).keys() == vars(theirs).keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_is_the_unpatched_model(family: str) -> None:
    check_keeping_all_is_the_unpatched_model(get_model(family), batch_of(family), 1.0)


@pytest.mark.filterwarnings("ignore:keep=10000 is more than")
@pytest.mark.parametrize("family", VARIED)
def test_keeping_more_tokens_than_there_are_is_the_unpatched_model(family: str) -> None:
    check_keeping_all_is_the_unpatched_model(get_model(family), batch_of(family), 10_000)


def always_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    """keep=1.0 goes through the gather like any other."""
    monkeypatch.setattr(entry.Plan, "drops", True)


def renormalises(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embeddings pass through a computation that is the identity on paper only."""
    real = EntryStage.before_decoder

    def rounded(self: EntryStage, decoder: nn.Module, args: Any, kwargs: Any) -> Any:
        args, call = real(self, decoder, args, kwargs)
        call["inputs_embeds"] = call["inputs_embeds"] / 3 * 3
        return args, call

    monkeypatch.setattr(EntryStage, "before_decoder", rounded)


def adopts_every_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    real = entry.plan

    def adopting(*args: Any) -> Any:
        caller = sys._getframe(1).f_locals
        if (cache := caller["cache"]) is not None:
            lengths.adopt(cache, 3, torch.device("cpu"), caller["self"].parts)
        return real(*args)

    monkeypatch.setattr(entry, "plan", adopting)


@pytest.mark.filterwarnings("ignore:keep=10000 is more than")
@pytest.mark.parametrize("keep", [1.0, 10_000])
@pytest.mark.parametrize("breakage", [always_drops, renormalises, adopts_every_cache], ids=lambda f: f.__name__)
def test_control_a_path_that_touches_something_is_found(
    breakage: Callable[[pytest.MonkeyPatch], None], keep: float | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    breakage(monkeypatch)
    with pytest.raises(AssertionError):
        check_keeping_all_is_the_unpatched_model(get_model("llava"), batch_of("llava"), keep)


# ------------------------------------------------------------------------------------------------ 6: no host sync


class NoBlockingCopies(TorchFunctionMode):
    """A copy from host to device waits for the device unless it is `non_blocking`; `torch.tensor` cannot be that."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.is_meta:
            from_list = func in (torch.tensor, torch.as_tensor)
            moved = func is Tensor.to and not args[0].is_meta and not kwargs.get("non_blocking", False)
            assert not from_list, f"torch.tensor({args[0]!r}, device=...) waits for the device"
            assert not moved, f"{tuple(result.shape)}.to(device) without non_blocking=True waits for the device"
        return result


def on_device(value: Any) -> Any:
    """The same on a device whose values nobody can read."""
    return tree_map_only(Tensor, lambda t: t.to("meta", non_blocking=True), value)


def device_cache(cache: Any) -> Any:
    """A copy of a cache whose slot map is on the device. Lengths of a dynamic cache are shapes: host knowledge."""
    cache = copy.deepcopy(cache)
    if (slots := lengths.slot_map(cache)) is not None:
        for field in ("columns", "valid", "dropped"):
            setattr(slots, field, on_device(getattr(slots, field)))
    return cache


def device_call(running: context.Call) -> context.Call:
    """What is on the device in reality. The placeholders are not: where they stand is read once, in the base hook,
    and that is the documented sync. So `locate` works on host tensors here as there."""
    encoded = {
        modality: dataclasses.replace(e, signals={k: on_device(list(v)) for k, v in e.signals.items()})
        for modality, e in running.encoded.items()
    }
    return dataclasses.replace(running, mask=on_device(running.mask), encoded=encoded)


def check_entry_never_waits(model: Any, batch: Batch, method: vtc.Method, positions: str = "original") -> None:
    """Run every call of the decoder hook a second time on the meta device.

    Meta tensors have shapes and no values: `.item()`, `bool()`, `.tolist()`, `.cpu()`, `nonzero`, boolean indexing,
    `unique` and all else that would wait for a GPU cannot be done with them, and raise. Host tensors stay on the host,
    where reading them is free.
    """
    real, pruned = EntryStage.before_decoder, []

    def twice(self: EntryStage, decoder: nn.Module, args: Any, kwargs: Any) -> Any:
        cache, running, last = kwargs.get(CACHE), context.current().call, self.last
        call = on_device({k: v for k, v in kwargs.items() if k != CACHE})
        try:
            with context.during(call=device_call(running)), NoBlockingCopies():
                call = real(self, decoder, args, call | {CACHE: device_cache(cache)})[1]
        except (RuntimeError, NotImplementedError) as error:
            raise AssertionError(f"the entry stage waits for the device: {error}") from error
        finally:
            self.last = last
        result = real(self, decoder, args, kwargs)
        pruned.append(result[1]["inputs_embeds"].shape != kwargs["inputs_embeds"].shape)
        assert call["inputs_embeds"].shape == result[1]["inputs_embeds"].shape
        return result

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(EntryStage, "before_decoder", twice)
        with vtc.patch(model, method, positions=positions):
            tokens_of(model, batch)
    assert any(pruned), "nothing was pruned, so nothing was checked"


@pytest.mark.parametrize(("family", "index"), method_cells())
def test_entry_never_waits(family: str, index: int) -> None:
    check_entry_never_waits(get_model(family), batch_of(family), methods_for(family)[index])


@pytest.mark.parametrize("family", [name for name in VARIED if FAMILIES[name].one_dim])
def test_entry_never_waits_with_compact_positions_and_newlines_kept(family: str) -> None:
    method = vtc.DivPrune(keep=0.4, newlines="keep")
    check_entry_never_waits(get_model(family), batch_of(family), method, "compact")


SYNCS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "bool index": lambda x: x[x > 0],
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x + 1),
    "masked_select": lambda x: x.masked_select(x > 0),
    "repeat_interleave": lambda x: torch.arange(x.shape[0], device=x.device).repeat_interleave((x[:, 0, 0] > 0).long()),
    "torch.tensor": lambda x: torch.tensor([1, 2], device=x.device),
    "blocking copy": lambda x: torch.zeros(2).to(x.device),
}


@pytest.mark.parametrize("sync", SYNCS.values(), ids=SYNCS.keys())
def test_control_a_sync_in_select_is_found(sync: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = vtc.DivPrune.reduce

    def waiting(self: vtc.DivPrune, stage: Any, tokens: Any, budget: tuple[int, ...]) -> vtc.Reduction:
        sync(tokens.features)
        return real(self, stage, tokens, budget)

    monkeypatch.setattr(vtc.DivPrune, "reduce", waiting)
    with pytest.raises(AssertionError, match="waits for the device"):
        check_entry_never_waits(get_model("llava"), batch_of("llava"), vtc.DivPrune(keep=0.4))


def test_control_a_sync_in_the_compaction_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = entry.compaction

    def waiting(decision: Any, *args: Any) -> Any:
        decision.keep.sum(1).tolist()
        return real(decision, *args)

    monkeypatch.setattr(entry, "compaction", waiting)
    with pytest.raises(AssertionError, match="waits for the device"):
        check_entry_never_waits(get_model("qwen3_vl"), batch_of("qwen3_vl"), vtc.Grid(keep=0.4))


# ------------------------------------------------------------------------- 7: state belongs to the generation

# Not the m-rope families: transformers itself keeps their `rope_deltas` on the module.
THREADED = ["llava", "llava_next", "llava_onevision", "internvl", "smolvlm", "gemma3", "gemma4", "mistral3"]
LOOPED = ["llava", "llava_next", "llava_onevision", "internvl", "smolvlm", "mistral3"]
PROMPTS = [(1, 2, 0), (2, 0, 1)]


def different_prompts(family: str) -> list[Batch]:
    return [make_batch(family, images, seed=seed) for seed, images in enumerate(PROMPTS)]


def check_threads_do_not_meet(model: Any, batches: list[Batch], rounds: int = 2) -> None:
    """All threads stop in the middle of every forward pass until the others are there too."""
    with vtc.patch(model, "divprune", keep=0.4):
        expected = [tokens_of(model, batch).tolist() for batch in batches]
        assert expected[0] != expected[1]
        for _ in range(rounds):
            results = in_step(model, [functools.partial(tokens_of, model, batch) for batch in batches])
            assert [r.tolist() if isinstance(r, Tensor) else r for r in results] == expected


def in_step(model: Any, jobs: list[Callable[[], Any]]) -> list[Any]:
    """Results (or exceptions) of the jobs, each in its own thread, meeting before every embedding of ids."""
    barrier, results = threading.Barrier(len(jobs)), [None] * len(jobs)

    def meet(module: nn.Module, args: Any) -> None:
        barrier.wait(timeout=10)

    def work(index: int) -> None:
        try:
            results[index] = jobs[index]()
        except BaseException as error:
            results[index] = error
            barrier.abort()

    hook = model.get_input_embeddings().register_forward_pre_hook(meet)
    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        hook.remove()
    return results


@dataclasses.dataclass
class Loop:
    """A generation written out by the user, one step at a time."""

    model: Any
    batch: Batch
    cache: Any = None
    tokens: list[list[int]] = dataclasses.field(default_factory=list)

    @torch.no_grad()
    def step(self) -> None:
        if self.cache is None:
            self.cache = DynamicCache(config=self.model.get_decoder().config)
            inputs = dict(self.batch)
            self.mask = inputs["attention_mask"]
        else:
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
            inputs = {"input_ids": torch.tensor(self.tokens[-1])[:, None], "attention_mask": self.mask}
        logits = self.model(**inputs, **{CACHE: self.cache}, use_cache=True).logits[:, -1]
        logits[:, GREEDY["suppress_tokens"]] = -math.inf
        self.tokens.append(logits.argmax(-1).tolist())


def check_loops_do_not_meet(model: Any, batches: list[Batch], steps: int = 4) -> None:
    with vtc.patch(model, "divprune", keep=0.4):
        alone = [Loop(model, batch) for batch in batches]
        for loop in alone:
            for _ in range(steps):
                loop.step()
        together = [Loop(model, batch) for batch in batches]
        for _ in range(steps):
            for loop in together:
                run_or_fail(loop.step)
    assert [loop.tokens for loop in together] == [loop.tokens for loop in alone]


def run_or_fail(step: Callable[[], None]) -> None:
    """A loop that another one disturbed may also crash."""
    try:
        step()
    except (RuntimeError, IndexError, ValueError) as error:
        raise AssertionError("an interleaved generation crashed") from error


@pytest.mark.parametrize("family", THREADED)
def test_threads_do_not_meet(family: str) -> None:
    check_threads_do_not_meet(get_model(family), different_prompts(family))


@pytest.mark.parametrize("family", LOOPED)
def test_interleaved_loops_do_not_meet(family: str) -> None:
    check_loops_do_not_meet(get_model(family), different_prompts(family))


def check_the_decoder_alone_is_left_alone(model: Any, batch: Batch, entrance: Any) -> None:
    """A prompt's state ends with its forward pass: embeddings that the user gives the decoder next are not its."""
    decoder, embeds = model.get_decoder(), model.get_input_embeddings()(batch["input_ids"])
    with torch.no_grad():
        expected = decoder(inputs_embeds=embeds).last_hidden_state
        with vtc.patch(model, "divprune", keep=0.4):
            entrance(**batch)
            hidden = decoder(inputs_embeds=embeds).last_hidden_state
    assert hidden.shape == expected.shape
    assert torch.equal(hidden, expected)


@pytest.mark.parametrize("entrance", ["root", "base"])
@pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_vl", "gemma3"])
def test_the_decoder_alone_is_left_alone(family: str, entrance: str) -> None:
    model = get_model(family)
    check_the_decoder_alone_is_left_alone(model, batch_of(family), model if entrance == "root" else model.model)


def test_control_a_frame_that_outlives_its_prompt_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = EntryStage.before_decoder

    def forgetful(self: EntryStage, decoder: nn.Module, args: Any, kwargs: Any) -> Any:
        if (running := context.current().call) is None:
            context.change(call=last[-1])
        else:
            last.append(copy.copy(running))
        result = real(self, decoder, args, kwargs)
        context.change(call=last[-1])
        return result

    last: list[context.Call] = []
    monkeypatch.setattr(EntryStage, "before_decoder", forgetful)
    monkeypatch.setattr(entry, "is_running", lambda module: True)
    with pytest.raises(AssertionError):
        check_the_decoder_alone_is_left_alone(get_model("llava"), batch_of("llava"), get_model("llava"))


class SharedVariable:
    """Stands in for a context variable; there is only one of it, as if it were an attribute of the module."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def get(self) -> Any:
        return self.value

    def set(self, value: Any) -> None:
        self.value = value


def test_control_a_frame_on_the_module_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "_CURRENT", SharedVariable(context.Current()))
    with pytest.raises(AssertionError):
        check_threads_do_not_meet(get_model("llava"), different_prompts("llava"))


def state_on_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slot map of the last prompt is every cache's."""
    adopt, slot_map, shared = lengths.adopt, lengths.slot_map, SharedVariable()

    def adopting(cache: Any, *args: Any) -> Any:
        shared.set(adopt(cache, *args))
        return shared.get()

    def looking(cache: Any, layer: int = 0) -> Any:
        return None if slot_map(cache, layer) is None else shared.get()

    monkeypatch.setattr(entry, "adopt", adopting)
    for module in (entry, lengths, generation, opening):
        monkeypatch.setattr(module, "slot_map", looking)


@pytest.mark.parametrize("check", [check_threads_do_not_meet, check_loops_do_not_meet], ids=lambda f: f.__name__)
def test_control_a_slot_map_on_the_module_is_found(
    check: Callable[[Any, list[Batch]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    state_on_the_module(monkeypatch)
    with pytest.raises(AssertionError):
        check(get_model("llava"), different_prompts("llava"))


# ----------------------------------------------------------------------------- 8: refused before anything is touched

Call = Callable[[Any], Any]
NO_CLS = "qwen2_vl"
REFUSALS: dict[str, tuple[str, type[Exception], Call]] = {
    "keep=0": ("llava", ValueError, lambda m: vtc.patch(m, "divprune", keep=0)),
    "keep=nan": ("llava", ValueError, lambda m: vtc.patch(m, "divprune", keep=math.nan)),
    "keep=1.5": ("llava", ValueError, lambda m: vtc.patch(m, "divprune", keep=1.5)),
    "keep=True": ("llava", TypeError, lambda m: vtc.patch(m, "divprune", keep=True)),
    "unknown method": ("llava", ValueError, lambda m: vtc.patch(m, "divprun", keep=0.5)),
    "no method": ("llava", TypeError, lambda m: vtc.patch(m, None)),
    "unknown option": ("llava", TypeError, lambda m: vtc.patch(m, "divprune", keep=0.5, pivot="cls")),
    "option of an object": ("llava", TypeError, lambda m: vtc.patch(m, vtc.DivPrune(), keep=0.5)),
    "bad variant": ("llava", ValueError, lambda m: vtc.patch(m, "todre", variant="min_sum")),
    "bad positions": ("llava", ValueError, lambda m: vtc.patch(m, "divprune", positions="packed")),
    "compact in 3-D": (NO_CLS, ValueError, lambda m: vtc.patch(m, "divprune", positions="compact")),
    "no CLS": (NO_CLS, ValueError, lambda m: vtc.patch(m, "todre", keep=0.5)),
    "no CLS, SigLIP": ("paligemma", ValueError, lambda m: vtc.patch(m, "todre", keep=0.5)),
    "text model": ("llava", vtc.UnsupportedModelError, lambda m: vtc.patch(m.get_decoder(), "divprune")),
    "vision tower": ("llava", vtc.UnsupportedModelError, lambda m: vtc.patch(m.model.vision_tower, "divprune")),
    "not patched": ("llava", ValueError, vtc.unpatch),
}


def check_refused_before_anything_is_touched(model: Any, error: type[Exception], call: Call) -> None:
    before = Snapshot.of(model)
    with pytest.raises(error):
        call(model)
    before.assert_same(Snapshot.of(model))


@pytest.mark.parametrize(("family", "error", "call"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refused_before_anything_is_touched(family: str, error: type[Exception], call: Call) -> None:
    check_refused_before_anything_is_touched(get_model(family), error, call)


def test_a_refused_second_patch_leaves_the_first_as_it_was() -> None:
    model = FAMILIES["llava"].build()
    with vtc.patch(model, "divprune", keep=0.5) as first:
        check_refused_before_anything_is_touched(model, ValueError, lambda m: vtc.patch(m, "grid", keep=0.5))
        check_refused_before_anything_is_touched(model, ValueError, lambda m: vtc.patch(m.model, "grid", keep=0.5))
        assert first.active
        tokens_of(model, batch_of("llava"))


def installs_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vtc that installs, and only then looks whether it can."""
    check = patching.bind

    def late(adapter: Any, parts: Any, method: vtc.Method, positions: str, *rest: Any) -> vtc.Method:
        config = vtc.CompressionConfig.of(method, positions)
        patching.install(vtc.Patch(parts.root, config, EntryStage(adapter, parts, method, positions)))
        return check(adapter, parts, method, positions, *rest)

    monkeypatch.setattr(patching, "bind", late)


def marks_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vtc that writes down what was asked for before it reads it."""
    resolve = patching.resolve

    def marking(model: Any) -> Any:
        model.config.vtc_config = {}
        return resolve(model)

    monkeypatch.setattr(patching, "resolve", marking)


@pytest.mark.parametrize("breakage", [installs_first, marks_first], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["compact in 3-D", "no CLS"])
def test_control_a_late_refusal_is_found(
    breakage: Callable[[pytest.MonkeyPatch], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, error, call = REFUSALS[name]
    breakage(monkeypatch)
    with pytest.raises(AssertionError):
        check_refused_before_anything_is_touched(FAMILIES[family].build(), error, call)
