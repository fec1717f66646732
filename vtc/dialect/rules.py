"""Logits processors and stopping criteria: rules of ``generate`` that may know how long the prompt is."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

_COUNT_FROM_START = ("max_length", "min_length")


class WithPrompt:
    """A rule that sees the prompt as the caller wrote it, while a shorter one runs.

    Everything else about the rule is looked up on the rule itself.
    """

    def __init__(self, rule: Any, prompt: Tensor, short: int) -> None:
        self.rule, self.prompt, self.short = rule, prompt, short

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        """As the rule's; ``input_ids`` [R, short + new] begin with the shortened prompt, in the samples' order."""
        prompt = self.prompt.repeat_interleave(len(input_ids) // len(self.prompt), 0)
        return self.rule(torch.cat([prompt, input_ids[:, self.short :]], dim=1), scores)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["rule"], name)


def processors_with_prompt(rules: Any, prompt: Tensor, short: int) -> Any:
    """A list of logits processors for a prompt that was shortened.

    Args:
        rules: the list, made for the whole prompt.
        prompt: LongTensor [samples, N], the whole prompts.
        short: columns of the shortened ones.
    """
    return type(rules)([WithPrompt(rule, prompt, short) for rule in rules])


def criteria_with_prompt(rules: Any, prompt: Tensor, short: int) -> Any:
    """The same for stopping criteria. Those that generate itself asks for their length or tokens stay of their type."""
    gone = prompt.shape[1] - short
    return type(rules)(
        [
            rule
            if isinstance(rule, EosTokenCriteria)
            else shorter(rule, gone)
            if isinstance(rule, MaxLengthCriteria)
            else WithPrompt(rule, prompt, short)
            for rule in rules
        ]
    )


def shorter(rule: Any, gone: int) -> Any:
    """A copy of a config or criterion whose lengths count the prompt, for one that is ``gone`` columns shorter."""
    rule = copy.copy(rule)
    for name in _COUNT_FROM_START:
        if isinstance(value := getattr(rule, name, None), int) and not isinstance(value, bool):
            setattr(rule, name, value - gone)
    return rule
