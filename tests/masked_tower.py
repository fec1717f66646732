"""What patches that leave inside a vision tower must amount to, by hand: the whole tower runs, blind to them.

From their block on, the keys of patches that left are masked. What stands in their places where they come back is
computed here with loops. Where patches merge, what stands there then is overheard, and written into the whole tower.
Towers with one row for all pictures are in masked_units.py.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from masked_units import BlindUnits, overheard_units
from torch import Tensor

from vtc.engine.context import recording_of
from vtc.engine.passage import Departure
from vtc.engine.patches import PatchStages
from vtc.methods.stages import Kept, Step
from vtc.models import resolve
from vtc.places import Tower

MODALITIES = ("image", "video")


@dataclass
class Departed:
    """What left before one block of the tower, of all pictures of a batch.

    dead: bool [P, N], True for every patch that is gone by then.
    restores: they come back behind the tower.
    rows: float [P, N, width], what stands at the places of `changed`, bool [P, N]; `None`: nothing merged.
    bias: float [P, N], what is added to the logits of a key from there on.
    """

    block: int
    dead: Tensor
    restores: bool
    rows: Tensor | None = None
    changed: Tensor | None = None
    bias: Tensor | None = None


Departures = dict[str, list[Departed]]


@contextmanager
def overheard_departures() -> Iterator[Departures]:
    """Collect, by modality, what patched models' towers lose."""
    found: Departures = {}
    at: list[Any] = []
    merged: list[Any] = []
    reducing = Step.reduce
    before, of = PatchStages.before_block, Departure.of.__func__  # type: ignore[attr-defined]

    def before_block(self: Any, index: int, *args: Any) -> Any:
        at[:] = [self, index]
        return before(self, index, *args)

    def reduce(step: Step, tokens: Any, *args: Any, **kwargs: Any) -> Kept:
        kept = reducing(step, tokens, *args, **kwargs)
        if isinstance(step.stage.at, Tower):
            merged[:] = []
            if kept.features is not None:
                changed = kept.written & (kept.features != tokens.features).any(-1)
                size = torch.ones_like(kept.size) if tokens.size is None else tokens.size
                size = torch.where(kept.written, kept.size, size)
                merged[:] = [kept.features, changed, size.log() * step.stage.at.proportional]
        return kept

    def departing(cls: Any, mask: Tensor, k: int, state: Tensor, restores: bool) -> Departure:
        stages, index = found.setdefault(recording_of(at[0].parts).modality, []), at[1]
        dead = ~mask
        if stages and stages[-1].block < index:  # a later stage: its mask is over what was left
            dead = stages[-1].dead.clone().masked_scatter(~stages[-1].dead, ~mask)
        stages.append(Departed(index, dead, restores, *merged))
        return of(cls, mask, k, state, restores)

    def noting(modality: str, block: int, dead: Tensor) -> None:
        found.setdefault(modality, []).append(Departed(block, dead, False))

    with pytest.MonkeyPatch.context() as patch, overheard_units(noting):
        patch.setattr(Step, "reduce", reduce)
        patch.setattr(PatchStages, "before_block", before_block)
        patch.setattr(Departure, "of", classmethod(departing))
        yield found


class BlindTower:
    """An unpatched model whose tower does not see what left. Samples are run one by one, in the order of the batch."""

    def __init__(self, model: Any, departures: Departures) -> None:
        self.model, self.departures = model, departures
        self.adapter, self.parts = resolve(model)
        self.first = dict.fromkeys(MODALITIES, 0)  # of the sample's pictures, among those of the batch
        self.count = dict.fromkeys(MODALITIES, 0)
        self.now: str | None = None
        self.states: dict[int, Tensor] = {}
        self.ending: tuple[Any, ...] = (None, None)
        self.alive: Tensor | None = None
        tower = self.adapter.tower(self.parts.base, "image")
        self.units = BlindUnits(model, tower) if tower is not None and tower.packed else None

    @contextmanager
    def sample(self) -> Iterator[None]:
        """The next one. Its images may be encoded several times."""
        base, hooks = self.parts.base, []
        with ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            if self.units is not None and self.departures:
                stack.enter_context(self.units.hiding())
            done: set[Any] = set()
            for modality in MODALITIES if self.departures else ():
                name = f"get_{modality}_features"
                if (encode := getattr(base, name, None)) is not None:
                    patch.setitem(base.__dict__, name, self._encoding(modality, encode))
                tower = self.adapter.tower(base, modality)
                if tower is not None and self.units is None and tower.module not in done:
                    done.add(tower.module)
                    hooks += self._hook(tower)
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()
        for modality in MODALITIES:
            self.first[modality] += self.count[modality]
        self.count = dict.fromkeys(MODALITIES, 0)

    def _encoding(self, modality: str, encode: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(encode)
        def call(*args: Any, **kwargs: Any) -> Any:
            before, self.now = self.now, self.now or modality  # one encoder may call another
            try:
                if self.units is not None and before is None:
                    first = self.first[modality]
                    self.count[modality] = count = self.units.count(lambda: encode(*args, **kwargs))
                    stages = self.departures.get(modality, [])
                    self.units.hide([(stage.block, stage.dead[first : first + count]) for stage in stages])
                return encode(*args, **kwargs)
            finally:
                self.now = before

        return call

    def _hook(self, tower: Any) -> list[Any]:
        hooks = [
            layer.register_forward_pre_hook(functools.partial(self._masking, tower, index), with_kwargs=True)
            for index, layer in enumerate(tower.layers)
        ]
        for index in range(len(tower.layers)):
            attention = tower.attention(index)
            hooks.append(attention.register_forward_pre_hook(self._few, with_kwargs=True))
            hooks.append(attention.register_forward_hook(self._all))
        hooks.append(tower.layers[-1].register_forward_hook(functools.partial(self._last, tower)))
        hooks.append(tower.module.register_forward_hook(functools.partial(self._behind, tower)))
        return hooks

    def _gone(self, tower: Any, stage: Departed) -> Tensor:
        """Bool [P, special + N] of this sample's pictures."""
        dead = self._own(stage.dead)
        return torch.cat([torch.zeros(len(dead), tower.special, dtype=torch.bool), dead], 1)

    def _own(self, values: Tensor) -> Tensor:
        """Of [P, ...], those of this sample."""
        assert self.now is not None
        first = self.first[self.now]
        return values[first : first + self.count[self.now]]

    def _written(self, tower: Any, stage: Departed, hidden: Tensor) -> Tensor:
        """With what stands there where patches merged."""
        if stage.rows is None or stage.changed is None:
            return hidden
        patches = torch.where(self._own(stage.changed)[..., None], self._own(stage.rows), hidden[:, tower.special :])
        return torch.cat([hidden[:, : tower.special], patches], 1)

    def _masking(self, tower: Any, index: int, module: Any, args: Any, kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        assert self.now is not None
        self.count[self.now] = len(hidden)
        stages = [s for s in self.departures.get(self.now, []) if s.block <= index]
        if not stages:
            return None
        if stages[-1].block == index:
            hidden = self._written(tower, stages[-1], hidden)
            self.states[index] = hidden
        if "attention_mask" not in inspect.signature(module.forward).parameters:
            self.alive = ~self._gone(tower, stages[-1])
            assert stages[-1].rows is None
            return None
        lowest = torch.finfo(hidden.dtype).min
        mask = torch.zeros(len(hidden), 1, 1, hidden.shape[1])
        mask = mask.masked_fill(self._gone(tower, stages[-1])[:, None, None], lowest)
        if (bias := stages[-1].bias) is not None:
            mask[:, 0, 0, tower.special :] += self._own(bias)
        given = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        if given is not None:
            mask = mask + (given if given.is_floating_point() else torch.where(given, 0.0, lowest))
        kwargs = {k: v for k, v in kwargs.items() if k not in ("attention_mask", "hidden_states")}
        return (hidden,), kwargs | {"attention_mask": mask.expand(-1, 1, hidden.shape[1], -1)}

    def _few(self, module: Any, args: Any, kwargs: Any) -> Any:
        """A layer that takes no mask: its attention sees the rows that are there, all pictures having as many."""
        if self.alive is None:
            return None
        few = args[0][self.alive].unflatten(0, (len(self.alive), -1))
        return (few, *args[1:]), kwargs

    def _all(self, module: Any, args: Any, output: Any) -> Any:
        if self.alive is None:
            return None
        rows = output[0].new_zeros(*self.alive.shape, output[0].shape[-1])
        rows[self.alive] = output[0].flatten(0, 1)
        self.alive = None
        return rows, *output[1:]

    def _last(self, tower: Any, module: Any, args: Any, output: Any) -> Any:
        self.ending = output, self._returned(tower, output, len(tower.layers))
        return self.ending[1]

    def _behind(self, tower: Any, module: Any, args: Any, output: Any) -> Any:
        def returned(after: int, state: Tensor | None) -> Tensor | None:
            if state is None or after == len(tower.layers):  # that one was heard before or behind `_last`
                return self.ending[1] if state is self.ending[0] else state
            return self._returned(tower, state, after)

        if output.hidden_states is not None:
            output.hidden_states = tuple(returned(after, h) for after, h in enumerate(output.hidden_states))
        return output

    def _returned(self, tower: Any, state: Tensor, after: int) -> Tensor:
        """What stands there behind the tower, of a state after so many blocks."""
        assert self.now is not None
        stages = [s for s in self.departures.get(self.now, []) if s.block < after]
        for at in reversed(range(len(stages))):
            if stages[at].restores:
                was = self._gone(tower, stages[at - 1]) if at else None
                state = self._restored(tower, state, stages[at], was)
        return state

    def _restored(self, tower: Any, state: Tensor, stage: Departed, was: Tensor | None) -> Tensor:
        """Who left moves as the mean of the ten nearest of those that did not."""
        dead, then, state = self._gone(tower, stage), self.states[stage.block].double(), state.clone()
        for p in range(len(state)):
            alive = [i for i in range(tower.special, dead.shape[1]) if not dead[p, i]]
            for i in range(tower.special, dead.shape[1]):
                if dead[p, i] and (was is None or not was[p, i]):
                    far = {j: float((then[p, i] - then[p, j]).square().sum()) for j in alive}
                    near = sorted(alive, key=lambda j: (far[j], j))[:10]
                    moved = torch.stack([state[p, j] - then[p, j] for j in near]).mean(0)
                    state[p, i] = then[p, i] + moved
        return state
