"""Pruning is the same model called by hand on the pruned sequence: every family, backend, cache, padding and keep.

A *cell* is one way of running one family. Cells that differ only in how they run (backend, cache) form a *group*: they
must choose the same keep-sets and are compared with one hand-written reference (reference.py), so that the matrix can
be large and stay fast. The last lines of the pytest output say how many cells were compared.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from reference import Continuation, continue_by_hand, decoder_call
from release import OLD, RELEASE
from torch import Tensor
from zoo import FAMILIES, GREEDY, NEW_TOKENS, SPECIAL_IDS, Batch, get_model, make_batch

import vtc

# The axes. A method is an axis too, but one method a group is enough for the engine: they take turns.
BACKENDS = ("sdpa", "eager")
CACHES = ("dynamic", "static", "none")
KEEPS = (1.0, 0.5, 1)  # a float is a share, an int a number of tokens per image
METHODS = ("divprune", "grid", "random")

# fp32, the same sums in other shapes: unpatched models differ from the reference by up to 3e-5, and the hybrid one,
# whose linear attention normalises short vectors, by up to 1.3e-4. A wrong mask or position costs 0.05 and more.
TOLERANCES = {"qwen3_5": 5e-4}


# Layers that compute with the positions themselves, not only with their distances. A plain forward numbers the columns,
# pads too, unless it is told otherwise: on the left that is another prompt, patched or not.
ABSOLUTE = ("ministral3",)


def tolerance(family: str) -> float:
    return TOLERANCES.get(family, 1e-4)


@dataclass(frozen=True)
class Cell:
    """One way to run one family.

    run: "generate", or "forward" for one plain call, whose logits are compared at every kept column.
    padding: "none" means prompts of one length: generate passes no mask, and pruning leaves holes.
    """

    family: str
    run: str
    backend: str
    cache: str
    padding: str
    keep: float | int
    positions: str

    @property
    def method(self) -> str:
        """Spread over the groups, the same within a group."""
        share = list(map(str, KEEPS)).index(str(self.keep))  # as text, because 1 == 1.0
        index = list(FAMILIES).index(self.family) + share + (self.positions == "compact")
        return METHODS[index % len(METHODS)]

    def __str__(self) -> str:
        parts = [self.family, self.run, self.backend, self.cache, self.padding, f"keep{self.keep}", self.positions]
        return "-".join([*parts, self.method])


def cells() -> list[Cell]:
    """The whole matrix, family by family, so that a worker builds few models.

    Not in it, because transformers itself cannot: `generate` with right padding (it continues after the pads), and a
    static cache in a plain forward (only `generate` makes one from its name). Compact positions need one row of
    positions, which m-rope families do not have; with keep=1.0 they are the original ones.
    """
    made = []
    for name, family in FAMILIES.items():
        for backend in BACKENDS:
            for keep in KEEPS:
                modes = ["original", "compact"] if family.one_dim and str(keep) != "1.0" else ["original"]
                for positions in modes:
                    made += [Cell(name, "generate", backend, cache, "left", keep, positions) for cache in CACHES]
                made += [Cell(name, "forward", backend, c, "right", keep, "original") for c in ("dynamic", "none")]
            made += [Cell(name, "generate", backend, cache, "none", 0.5, "original") for cache in CACHES]
            made.append(Cell(name, "forward", backend, "dynamic", "left", 0.5, "original"))
    return made


CELLS = cells()


def upstream_bug(family: str, run: str, cache: str) -> str | None:
    """Why the *unpatched* model is wrong in this release of transformers, if it is (both fixed by 5.23)."""
    if not OLD or run != "generate":
        return None
    if family == "paligemma" and cache == "none":
        return "before 5.23, generated tokens join PaliGemma's bidirectional prefix when there is no cache"
    if family == "gemma4_bidirectional" and cache == "static":
        return "before 5.23, Gemma4's bidirectional masks do not fit a static cache"
    return None


# ----------------------------------------------------------------------------------------------------------- the matrix


@dataclass(frozen=True)
class Group:
    """What the cells of a group share."""

    keep_sets: list[list[Tensor]]
    reference: list[Continuation]


GROUPS: dict[tuple[Any, ...], Group] = {}


def group_of(cell: Cell, model: Any, batch: Batch, keep_sets: list[list[Tensor]]) -> Group:
    """The cell's group. The first cell to come founds it with its keep-sets; each side of a batch counts as one."""
    prompts = "equal" if cell.padding == "none" else "ragged"
    key = (cell.family, prompts, str(cell.keep), cell.positions, cell.method)
    if key not in GROUPS:
        GROUPS[key] = Group(keep_sets, by_hand(model, batch, keep_sets, cell.positions))
    return GROUPS[key]


def by_hand(model: Any, batch: Batch, keep_sets: list[list[Tensor]] | None, positions: str) -> list[Continuation]:
    """The reference for every sample of a batch, with the plainest attention there is."""
    model.set_attn_implementation("eager")
    answers = []
    for index, (sample, images) in enumerate(zip(batch.samples, batch.images, strict=True)):
        keep = None if keep_sets is None else keep_sets[index]
        answers.append(continue_by_hand(model, sample, images, keep, positions, NEW_TOKENS, SPECIAL_IDS))
    return answers


@functools.cache
def batch_of(family: str, padding: str) -> Batch:
    return make_batch(family, padding=padding)


@pytest.mark.sampled(newest=1, older=3, by=("cell",))
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_cell(cell: Cell) -> None:
    if reason := upstream_bug(cell.family, cell.run, cell.cache):
        pytest.skip(reason)
    model, batch = get_model(cell.family), batch_of(cell.family, cell.padding)
    model.set_attn_implementation(cell.backend)
    with vtc.patch(model, cell.method, keep=cell.keep, positions=cell.positions) as patch:
        if cell.run == "generate":
            result = run(model, batch, cell.cache)
        else:
            result = forward(model, with_positions(cell.family, batch), cell.cache)
        keep_sets = patch.last_keep
    check_keep_sets(keep_sets, batch, cell.keep)
    group = group_of(cell, model, batch, keep_sets)
    assert_same_keep_sets(keep_sets, group.keep_sets)
    if cell.run == "generate":
        compare_generation(result, group.reference, tolerance(cell.family))
    else:
        compare_forward(result, batch, cell.padding, group.reference, tolerance(cell.family))


# ------------------------------------------------------------------------------------------------------ running a model


def cache_arguments(cache: str) -> dict[str, Any]:
    arguments: dict[str, dict[str, Any]] = {"static": {"cache_implementation": "static"}, "none": {"use_cache": False}}
    return arguments.get(cache, {})


@torch.no_grad()
def run(model: Any, batch: Batch, cache: str) -> Any:
    arguments = cache_arguments(cache)
    return model.generate(**batch, **GREEDY, **arguments, output_logits=True, return_dict_in_generate=True)


@torch.no_grad()
def forward(model: Any, batch: dict[str, Tensor], cache: str) -> Tensor:
    return model(**batch, use_cache=cache == "dynamic").logits


def with_positions(family: str, batch: Batch) -> dict[str, Tensor]:
    """Inputs of a plain forward; where it must be told positions, with those that `generate` makes from the mask."""
    told = {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    return batch | told if family in ABSOLUTE else batch


# ------------------------------------------------------------------------------------------------------------ comparing


def expected_count(keep: float | int, size: int) -> int:
    return min(keep, size) if isinstance(keep, int) else max(1, round(keep * size))


def check_keep_sets(keep_sets: list[list[Tensor]], batch: Batch, keep: float | int) -> None:
    """One keep-set per image in prompt order, ascending, without repeats, of the promised size."""
    assert [len(images) for images in keep_sets] == [len(images) for images in batch.images]
    for chosen_of, columns_of in zip(keep_sets, batch.images, strict=True):
        for chosen, columns in zip(chosen_of, columns_of, strict=True):
            assert chosen.dtype == torch.long
            assert chosen.numel() == expected_count(keep, columns.numel())
            assert bool((chosen.diff() > 0).all()), f"not ascending: {chosen.tolist()}"
            assert 0 <= int(chosen[0]) <= int(chosen[-1]) < columns.numel()


def assert_same_keep_sets(ours: list[list[Tensor]], theirs: list[list[Tensor]]) -> None:
    """The keep-set depends on the prompt, not on the backend, the cache or the side of the padding."""
    assert [[t.tolist() for t in images] for images in ours] == [[t.tolist() for t in images] for images in theirs]


def compare_generation(result: Any, reference: list[Continuation], atol: float) -> None:
    logits = torch.stack(result.logits, dim=1)
    expected = torch.stack([sample.logits for sample in reference])
    torch.testing.assert_close(logits, expected, rtol=0, atol=atol)
    tokens = result.sequences[:, -NEW_TOKENS:]
    assert tokens.tolist() == [sample.tokens.tolist() for sample in reference]


def compare_forward(logits: Tensor, batch: Batch, padding: str, reference: list[Continuation], atol: float) -> None:
    """Compare at every kept column of every sample."""
    for row, offset, sample in zip(logits, batch.offsets, reference, strict=True):
        columns = sample.columns + offset
        if logits.shape[1] != batch["input_ids"].shape[1]:  # pruned length: kept columns side by side
            columns = torch.arange(columns.numel()) + (len(row) - columns.numel() if padding == "left" else 0)
        torch.testing.assert_close(row[columns], sample.prompt, rtol=0, atol=atol)


# -------------------------------------------------------------------------------------- tests of the reference itself


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_reference_is_the_unpatched_model(family: str, cache: str, backend: str) -> None:
    """With everything kept, the reference is what `generate` of the unpatched model says: no vtc in here."""
    model, batch = get_model(family), batch_of(family, "left")
    reference = full_reference(family)
    model.set_attn_implementation(backend)
    result = run(model, batch, cache)
    reason = upstream_bug(family, "generate", cache)
    if reason is None:
        compare_generation(result, reference, tolerance(family))
    elif RELEASE == (5, 17):
        with pytest.raises(AssertionError):  # the bug that leaves cells out of the matrix is really there
            compare_generation(result, reference, tolerance(family))
    else:
        pytest.skip(f"{reason}; which of the releases between 5.17 and 5.23 has it is not known")


@functools.cache
def full_reference(family: str) -> list[Continuation]:
    return by_hand(get_model(family), batch_of(family, "left"), None, "original")


def every_other(batch: Batch, first: int) -> list[list[Tensor]]:
    return [[torch.arange(first, len(columns), 2) for columns in images] for images in batch.images]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen3_5"])
def test_reference_drops_what_a_mask_would_hide(family: str) -> None:
    """A second way to the same logits: the full sequence through the whole model, dropped columns masked as padding.

    Not for the hybrid family, whose linear attention keeps no columns that could be masked afterwards.
    """
    model, batch = get_model(family), batch_of(family, "left")
    keep = every_other(batch, 1)
    for sample, answer in zip(batch.samples, by_hand(model, batch, keep, "original"), strict=True):
        positions = decoder_call(model, sample).get("position_ids")
        length = sample["input_ids"].shape[1]
        holes = torch.zeros(1, length, dtype=torch.long).index_fill(1, answer.columns, 1)
        inputs = sample | {"attention_mask": holes}
        inputs["position_ids"] = torch.arange(length)[None] if positions is None else positions
        masked = forward(model, Batch(inputs), "none")[0, answer.columns]
        torch.testing.assert_close(masked, answer.prompt, rtol=0, atol=tolerance(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_changes_the_logits(family: str) -> None:
    """The zoo looks at its pictures: a matrix over models that do not would be green whatever vtc did."""
    model, batch = get_model(family), batch_of(family, "left")
    pruned = [by_hand(model, batch, every_other(batch, first), "original") for first in (0, 1)]
    answers = [full_reference(family), *pruned]
    for index, images in enumerate(batch.images):
        first = torch.stack([answer[index].logits[0] for answer in answers])
        if images:
            assert all((first[i] - first[j]).abs().max() > 0.05 for i, j in ((0, 1), (0, 2), (1, 2)))
        else:
            torch.testing.assert_close(first[1:], first[:1].expand(2, -1), rtol=0, atol=0)


def test_the_matrix_is_large() -> None:
    assert len(set(map(str, CELLS))) == len(CELLS) >= 600
