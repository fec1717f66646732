"""Methods of ``generate`` that are no modules: which ones vtc wraps, and what they are called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from vtc.dialect.arguments import DEEPSTACK, Spelling
from vtc.dialect.releases import running_release
from vtc.errors import UnsupportedModelError


@dataclass(frozen=True)
class WrappedMethod:
    """One method that is wrapped on an instance.

    Attributes:
        name: as transformers calls it.
        purpose: what it does there, for messages.
        takes: arguments that the wrapper reads by name.
    """

    name: str
    purpose: str
    takes: tuple[str, ...] = ()

    def find(self, owner: Any) -> Callable[..., Any]:
        """The bound method.

        Raises:
            UnsupportedModelError: it is not there, or takes other arguments.
        """
        found = getattr(owner, self.name, None)
        if not callable(found):
            raise UnsupportedModelError(
                f"{type(owner).__name__} has no {self.name}, which {self.purpose}: vtc cannot work without it. "
                f"{running_release()}"
            )
        if missing := set(self.takes) - inspect.signature(found).parameters.keys():
            raise UnsupportedModelError(
                f"{type(owner).__name__}.{self.name}, which {self.purpose}, takes no {', '.join(sorted(missing))}; it "
                f"takes {', '.join(inspect.signature(found).parameters)}. {running_release()}"
            )
        return found

    def read(self, found: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The values of ``takes`` in one call."""
        given = Spelling(found, self.name).bind(args, kwargs).named
        return tuple(given[name] for name in self.takes)


PREPARE = WrappedMethod("prepare_inputs_for_generation", "makes the inputs of each step of generate")
PREFILL = WrappedMethod("_prefill", "runs the prompt in generate", ("input_ids", "generation_config", "model_kwargs"))
PAGED = (
    WrappedMethod("generate_batch", "generates from a paged cache"),
    WrappedMethod("init_continuous_batching", "generates from a paged cache"),
)
MAY_COMPILE = WrappedMethod("_valid_auto_compile_criteria", "decides whether generate compiles decode steps")
COMPILED = WrappedMethod("get_compiled_call", "gives generate the call that it compiles")
LOSS = WrappedMethod("loss_function", "computes the loss from logits and labels")
PROCESS_DEEPSTACK = WrappedMethod("_deepstack_process", "adds features to early layers")
_POSITIONS = WrappedMethod("_prepare_position_ids_for_generation", "makes the position ids of a prompt")

LOSS_SLOT = "_loss_function"
"""Where an instance keeps a loss function of its own, behind the property."""


def wrapped_methods(
    root: nn.Module, decoder: nn.Module, inside: bool, calibrated: bool = False
) -> list[tuple[nn.Module, WrappedMethod]]:
    """The methods to wrap on one model, each with its owner.

    Args:
        root: what the user calls.
        decoder: the language model.
        inside: tokens leave between its layers too.
        calibrated: its attention is given a bias, in every step.

    Raises:
        UnsupportedModelError: one is not where it is expected.
    """
    found: list[tuple[nn.Module, WrappedMethod]] = [(root, LOSS)]
    if generates(root):
        found += [(root, method) for method in (PREPARE, PREFILL, COMPILED, *PAGED)]
        if inside or calibrated:
            found.append((root, MAY_COMPILE))
    if inside and Spelling(decoder.forward, "").name(DEEPSTACK) is not None:
        found.append((decoder, PROCESS_DEEPSTACK))
    for owner, method in found:
        method.find(owner)
    return found


def generates(root: Any) -> bool:
    """Whether a model has ``generate`` (base models have not)."""
    return bool(getattr(root, "can_generate", bool)())


def chunk_size(generation_config: Any) -> int | None:
    """How many columns of the prompt are run at once, ``None``: all."""
    return getattr(generation_config, "prefill_chunk_size", None)


def positions_of_prompt(root: Any, ids: Any, inputs: dict[str, Any]) -> Any:
    """The position ids that generate would make for a prompt."""
    return _POSITIONS.find(root)(ids, inputs)


_SAMPLE = WrappedMethod("_sample", "decodes greedily and by sampling")
_BEAMS = WrappedMethod("_beam_search", "decodes with beams")
_LOOPS = {"greedy_search": _SAMPLE, "sample": _SAMPLE, "beam_search": _BEAMS, "beam_sample": _BEAMS}


def decoding_loop(root: Any, generation_config: Any) -> Callable[..., Any]:
    """The loop behind ``generate`` for what a config asks for.

    Raises:
        NotImplementedError: it is neither greedy, sampling nor beam search.
    """
    mode = str(generation_config.get_generation_mode().value)
    if mode not in _LOOPS:
        raise NotImplementedError(f"vtc.generate decodes greedily, by sampling or with beams, not by {mode}")
    return _LOOPS[mode].find(root)


def pad_token_of(root: Any) -> int:
    """The id that fills holes in ids; what it is makes no difference where a mask hides it."""
    return getattr(root.generation_config, "pad_token_id", None) or 0
