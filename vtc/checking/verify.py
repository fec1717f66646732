"""``vtc.verify``: the user's model, pruned by vtc and pruned by hand, on the user's machine.

A verification runs ``generate`` on the patched model as a user would: one sample alone and a ragged, padded batch, with
and without a cache. Then it asks :mod:`vtc.checking.byhand` what each step should have said, given the kept indices and
the tokens before. What is compared are raw logits, and the greedy choice among ids that mean nothing special (a random
model would say "<image>", which no model can read back).

A check that fails is made once more without vtc, nothing pruned. If that differs too, the fault is upstream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtc.binding import bind, parse_request
from vtc.budget import Keep
from vtc.checking import byhand, prompts
from vtc.checking.byhand import IDS, Inputs
from vtc.checking.result import Check, Verdict, Verification
from vtc.config import CompressionConfig
from vtc.dialect.generation import generates
from vtc.methods import Method
from vtc.methods.stages import steps_of
from vtc.models import Parts, resolve
from vtc.patching import patch
from vtc.places import Tower
from vtc.profiling.workload import special_ids

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far two logits may be apart, as a share of the largest logit by hand. Both sides add the same numbers, but in
matrices of other shapes, so they round differently: in float32 by 1e-6 to 3e-5 of the scale, where a wrong mask or
position costs 1e-2 and more. Half precision has 3 (float16) or 2 (bfloat16) digits, and can hide a small mistake."""


@dataclass(frozen=True)
class _Sample:
    """A prompt of a batch, and where it stands by itself: row ``row`` of ``inputs``."""

    inputs: Inputs
    row: int


@dataclass(frozen=True)
class _Run:
    """One way to run a model."""

    name: str
    inputs: Inputs
    samples: tuple[_Sample, ...]
    use_cache: bool


@dataclass(frozen=True)
class _Outcome:
    """What a run said: ids [B, T], their raw logits [B, T, V], kept indices and token counts by sample and image."""

    tokens: Tensor
    logits: Tensor
    keep: list[list[Tensor]] | None = None
    lengths: list[list[int]] | None = None


def verify(
    model: nn.Module,
    inputs: Inputs,
    method: str | Method | CompressionConfig = "divprune",
    *,
    keep: Keep | None = None,
    positions: str | None = None,
    new_tokens: int = 4,
    **options: Any,
) -> Verification:
    """Compare pruning by vtc with pruning by hand, on this model and this machine.

    Args:
        model: as for :func:`vtc.patch`, not patched. It is left exactly as it was.
        inputs: what ``model.generate(**inputs)`` would take, as a processor makes it. One sample is verified alone and
            in a padded batch with a longer variant of itself and with its text alone; a batch is verified as it is.
        method: as for :func:`vtc.patch`. It must drop tokens before the language model only.
        keep: as for :func:`vtc.patch`; a half for a method given by name.
        positions: as for :func:`vtc.patch`.
        new_tokens: how many greedy tokens are compared.
        **options: as for :func:`vtc.patch`.

    Returns:
        An object with ``.ok``, ``.checks`` and ``.faults`` that prints itself as a table. Exceptions that a run raises
        are failed checks.

    Raises:
        ValueError: the model is patched, or does not generate; the inputs hold no image; a method with stages inside
            the language model; anything that :func:`vtc.patch` refuses. Nothing was run then.
    """
    if new_tokens < 1:
        raise ValueError(f"{new_tokens=} must be at least 1")
    if isinstance(method, str) and keep is None:
        keep = 0.5
    config, chosen = parse_request(method, keep, positions, options)
    adapter, parts = resolve(model)
    chosen = bind(adapter, parts, chosen, config.positions, config.calibration)
    if not generates(parts.root):
        raise ValueError(
            f"verify compares what is generated, and {type(parts.root).__name__} does not generate; verify a model "
            "that does and has the same base model"
        )
    if any(not step.stage.at.before_the_model for step in steps_of(chosen, adapter.facts(parts))):
        raise ValueError(
            f"{chosen.name!r} drops tokens between the layers of the language model, and what verify compares with is "
            "one shorter prompt for all of them. Methods that drop before the language model are verified, such as "
            "'divprune'; they go through the same hooks, masks and caches, so verify one of those on your model"
        )
    if any(isinstance(step.stage.at, Tower) for step in steps_of(chosen, adapter.facts(parts))):
        raise ValueError(
            f"{chosen.name!r} lets patches leave inside the vision tower, and what verify compares with are the "
            "features of the whole tower. Methods that drop behind it are verified, such as 'divprune'; a prompt goes "
            "through the same masks and caches with them"
        )
    if config.when != "always":
        raise ValueError(
            f"when={config.when!r} leaves prompts alone where pruning does not pay, and what verify compares with is "
            "pruned by hand. Verify the same method with when='always': what is left alone is the model as it was"
        )
    if config.calibration is not None:
        raise ValueError(
            f"calibration={config.calibration!r} changes what the layers attend to, and what verify compares with is "
            "the model's own attention over a shorter prompt. Verify the same method without it; hooks, masks and "
            "caches are those it runs with"
        )
    if chosen.merges:
        raise ValueError(
            f"{chosen.name!r} writes new values into the tokens that stay, and what verify compares with is a prompt "
            "from which tokens were left out. Methods that only drop are verified, such as 'divprune'"
        )
    prompts.check_inputs(parts, inputs)
    subject = f"{type(parts.root).__name__} ({parts.config.model_type}), {chosen}, {parts.root.dtype}, {model.device}"
    with _undisturbed(parts.root):
        checks = _Verifier(parts, config, new_tokens).checks(dict(inputs))
    return Verification(subject, tuple(checks))


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards all modules are what they were.

    transformers keeps notes on modules (rope deltas, hooks for hidden states and whether it installed them), so hooks
    and notes are put back together: every attribute, and every entry of those that are dictionaries.
    """
    before = [
        (vars(module), dict(vars(module)), [(d, dict(d)) for d in vars(module).values() if isinstance(d, dict)])
        for module in model.modules()
    ]
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for attributes, values, dictionaries in before:
            for held, entries in [(attributes, values), *dictionaries]:
                held.clear()
                held.update(entries)


class _Verifier:
    """The checks of one model and one method."""

    def __init__(self, parts: Parts, config: CompressionConfig, new_tokens: int) -> None:
        self.parts, self.config, self.new_tokens = parts, config, new_tokens
        self.special = sorted(special_ids(parts))

    def checks(self, inputs: Inputs) -> list[Check]:
        """All of them; arguments as for :func:`verify`."""
        count = len(inputs[IDS])
        before = _attempt(lambda: self._generate(inputs, True).logits)
        if count > 1:
            own = tuple(_Sample(inputs, row) for row in range(count))
            runs = [_Run(f"batch of {count}, ", inputs, own, cached) for cached in (True, False)]
        else:
            variants = prompts.longer_variant(self.parts, inputs), prompts.without_images(self.parts, inputs)
            together = [each for each in (inputs, *variants) if each[IDS].shape[1]]
            own = tuple(_Sample(each, 0) for each in together)
            batch = prompts.padded(self.parts, together)
            runs = [_Run("alone, ", inputs, own[:1], cached) for cached in (True, False)]
            runs += [_Run("padded batch, ", batch, own, cached) for cached in (True, False)]
        outcomes = [_attempt(lambda run=run: self._pruned(run)) for run in runs]
        checks = [self._check(run, outcome) for run, outcome in zip(runs, outcomes, strict=True)]
        kept = [outcome.keep for outcome in outcomes if isinstance(outcome, _Outcome) and outcome.keep]
        checks.append(_same_kept(kept))
        checks.append(self._unchanged(inputs, before))
        return checks

    # -- running ---------------------------------------------------------------------------------------------------

    def _pruned(self, run: _Run) -> _Outcome:
        with patch(self.parts.root, self.config) as handle:
            outcome = self._generate(run.inputs, run.use_cache)
            if handle.last_keep is None or handle.last_layouts is None:
                raise ValueError("nothing was pruned: placeholders are in the prompt, but no image was encoded for it")
            lengths = [[layout.length for layout in own] for own in handle.last_layouts]
        return _Outcome(outcome.tokens, outcome.logits, handle.last_keep, lengths)

    def _generate(self, inputs: Inputs, use_cache: bool) -> _Outcome:
        root: Any = self.parts.root
        made = root.generate(
            **inputs,
            use_cache=use_cache,
            do_sample=False,
            num_beams=1,
            min_new_tokens=self.new_tokens,
            max_new_tokens=self.new_tokens,
            suppress_tokens=self.special,
            pad_token_id=prompts.pad_id(self.parts),
            output_logits=True,
            return_dict_in_generate=True,
            disable_compile=True,
        )
        return _Outcome(made.sequences[:, -self.new_tokens :], torch.stack(made.logits, dim=1).float())

    def _by_hand(self, sample: _Sample, tokens: Tensor, keep: list[Tensor] | None, lengths: list[int]) -> Tensor:
        dropped = torch.zeros(0, dtype=torch.long, device=tokens.device)
        if keep:
            columns = byhand.visual_columns(self.parts, sample.inputs, sample.row)
            gone = [_except(own, kept) for own, kept in zip(columns.split(lengths), keep, strict=True)]
            dropped = torch.cat([dropped, *gone])
        where = self.config.positions if keep is not None else "original"
        return byhand.logits_by_hand(self.parts, sample.inputs, sample.row, dropped, tokens, where)

    # -- comparing -------------------------------------------------------------------------------------------------

    def _check(self, run: _Run, outcome: _Outcome | Exception) -> Check:
        name = run.name + ("cache" if run.use_cache else "no cache")
        check = self._compare(name, run, outcome)
        if check.verdict == "ok":
            return check
        plain = self._compare(name, run, _attempt(lambda: self._generate(run.inputs, run.use_cache)))
        if plain.verdict == "ok":
            return check
        note = f"not vtc's fault, the unpruned model has it too ({plain.note})"
        return Check(
            name, "upstream", check.difference, check.tolerance, check.agree, check.decided, check.tokens, note
        )

    def _compare(self, name: str, run: _Run, outcome: _Outcome | Exception) -> Check:
        """A run with what it should have said."""
        if isinstance(outcome, Exception):
            return Check(name, "FAILED", note=one_line(outcome))
        reaching = [byhand.window_reaches_back(self.parts, s.inputs, s.row, self.new_tokens) for s in run.samples]
        steps = 1 if run.use_cache and any(reaching) else self.new_tokens
        ours, theirs = [], []
        for place, sample in enumerate(run.samples):
            keep, lengths = None, []
            if outcome.keep is not None and outcome.lengths is not None:
                keep, lengths = outcome.keep[place], outcome.lengths[place]
            logits = _attempt(lambda s=sample, p=place, k=keep, n=lengths: self._by_hand(s, outcome.tokens[p], k, n))
            if isinstance(logits, Exception):
                return Check(name, "FAILED", note=f"pruning by hand raised {one_line(logits)}")
            ours.append(outcome.logits[place, :steps])
            theirs.append(logits[:steps])
        note = "" if steps == self.new_tokens else _SHORT_WINDOW
        return self._judge(name, torch.stack(ours), torch.stack(theirs), note)

    def _judge(self, name: str, ours: Tensor, theirs: Tensor, note: str) -> Check:
        """Two float [B, T, V]: what a run said, and what it should have said."""
        tolerance = TOLERANCE.get(self.parts.root.dtype, max(TOLERANCE.values())) * float(theirs.abs().max())
        errors = (ours - theirs).abs().amax(-1)
        difference = float(errors.max())
        barred = torch.tensor([i for i in self.special if i < theirs.shape[-1]], device=theirs.device)
        best = theirs.index_fill(-1, barred, -torch.inf).topk(2, dim=-1)
        decided = best.values[..., 0] - best.values[..., 1] > 2 * tolerance
        agree = ours.index_fill(-1, barred, -torch.inf).argmax(-1) == best.indices[..., 0]
        good = difference <= tolerance and bool(agree[decided].all())
        if not good:
            row, step = divmod(int(errors.nan_to_num(torch.inf).argmax()), errors.shape[1])
            note = (
                f"logits differ from pruning by hand by up to {difference:.1e} (sample {row}, token {step}), "
                f"above {tolerance:.1e}"
            )
        verdict: Verdict = "ok" if good else "FAILED"
        counts = int(agree[decided].sum()), int(decided.sum()), decided.numel()
        return Check(name, verdict, difference, tolerance, *counts, note)

    def _unchanged(self, inputs: Inputs, before: Tensor | Exception) -> Check:
        name, after = "unpruned, before and after", _attempt(lambda: self._generate(inputs, True).logits)
        if isinstance(before, Exception):
            return Check(name, "upstream", note=f"the unpruned model raised {one_line(before)}")
        if isinstance(after, Exception):
            return Check(name, "FAILED", note=f"the unpruned model raised {one_line(after)}")
        if (difference := float((after - before).abs().max())) == 0.0:
            return Check(name, "ok", difference, 0.0)
        return self._judge(name, after, before, "not bit for bit: this device is not deterministic")


_SHORT_WINDOW = "first token only: a sliding window ends between visual tokens (see the README, limits)"


def _same_kept(kept: Sequence[list[list[Tensor]]]) -> Check:
    """Whether a sample's kept tokens are the same however it runs."""
    name = "same tokens kept in every run"
    if len(kept) < 2:
        return Check(name, "FAILED", note="fewer than two runs came to an end")
    for place, sample in enumerate(kept[-1]):
        for other in kept:
            if place < len(other) and (mine := _listed(sample)) != (theirs := _listed(other[place])):
                return Check(name, "FAILED", note=f"sample {place} keeps {mine} in one run and {theirs} in another")
    return Check(name, "ok")


def _listed(images: Sequence[Tensor]) -> list[list[int]]:
    return [kept.tolist() for kept in images]


def _except(columns: Tensor, kept: Tensor) -> Tensor:
    stays = torch.zeros(len(columns), dtype=torch.bool)
    stays[kept] = True
    return columns[~stays.to(columns.device)]


def _attempt(action: Any) -> Any:
    """What an action returns, or the exception that it raises."""
    try:
        return action()
    except Exception as error:
        return error


def one_line(error: Exception) -> str:
    """An exception as a line: its type and its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
