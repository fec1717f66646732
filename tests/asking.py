"""Ask a method by itself, as the engine does: which tokens stay before the language model, or at a stage inside it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vtc.methods import Method, ModelFacts, Reduction
from vtc.methods.base import ANY_MODEL
from vtc.methods.stages import Kept, steps_of
from vtc.tokens import VisualTokens


def entering(method: Method, tokens: VisualTokens) -> Kept:
    """What a method leaves of the tokens before the language model."""
    steps = [s for s in steps_of(method, ANY_MODEL) if s.stage.at.before_the_model]
    return steps[0].reduce(tokens) if steps else Kept(tokens.mask, tokens.counts)


def keep_mask(method: Method, tokens: VisualTokens) -> tuple[Tensor, tuple[int, ...]]:
    """The same as a mask and counts."""
    kept = entering(method, tokens)
    return kept.mask, kept.counts


def inside(
    method: Method, number: int, tokens: VisualTokens, facts: ModelFacts = ANY_MODEL
) -> tuple[Tensor, tuple[int, ...]]:
    """What stage ``number`` inside the language model leaves."""
    steps = [s for s in steps_of(method, facts) if not s.stage.at.before_the_model]
    kept = steps[number].reduce(tokens)
    return kept.mask, kept.counts


def reduce(method: Method, tokens: VisualTokens, budget: tuple[int, ...]) -> Reduction:
    """What a method answers to a budget."""
    return method.reduce(method.stages(ANY_MODEL)[0], tokens, budget)


def picks(method: Method, tokens: VisualTokens, budget: tuple[int, ...]) -> Tensor:
    """The index of that answer."""
    return reduce(method, tokens, budget).index


def needs(method: Any) -> set[str]:
    """Keys of all signals that a method asks for."""
    return {signal.key for signal in method.signals()}
