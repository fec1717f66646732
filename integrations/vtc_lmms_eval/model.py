"""The model id ``vtc``: lmms-eval's own model, patched in place and watched.

What is watched, because lmms-eval would score an empty answer and go on: that ``generate`` does not raise, that the
pruner fired for every prompt with images, and that there were such prompts at all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from lmms_eval import utils
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils import gen_metrics
from loguru import logger
from torch import Tensor, nn
from transformers import StoppingCriteriaList

from vtc.handle import Patch
from vtc.models import resolve
from vtc.patching import patch
from vtc_lmms_eval import EvaluationStopped, bases
from vtc_lmms_eval.arguments import Asked, split
from vtc_lmms_eval.meter import CALIBRATED, WARM_UP, Clock, Meter, realised_fraction

GENERATING = ("generate_until", "generate_until_multi_round")


class VtcChat(lmms):
    """Stands for any base in lmms-eval's registry; never instantiated."""

    is_simple = False

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        """The base's own instance, patched.

        Raises:
            EvaluationStopped: bad arguments, or the base could not be built; with the reason.
        """
        with _stopping():
            bases.check_version()
            asked = split(utils.simple_parse_args_string(arg_string))
            given = {name: value for name, value in (additional_config or {}).items() if value is not None}
            return build(asked, given, simple=cls.is_simple)


class VtcSimple(VtcChat):
    """The same for ``--force_simple``."""

    is_simple = True


def build(asked: Asked, given: dict[str, Any], simple: bool = False) -> Any:
    """Build the base and patch its model.

    Args:
        asked: the arguments, ours and the base's.
        given: what lmms-eval adds to them: batch size, device.
        simple: prefer the base's class without chat messages.

    Raises:
        ValueError: the base cannot be patched, or the method does not fit it. Asked before weights are loaded.
    """
    cls = bases.find(asked.base, simple)
    arguments = bases.placed(cls, {**asked.rest, **given}, int(os.environ.get("WORLD_SIZE", "1")))
    bases.check_batch(cls, asked.base, arguments.get("batch_size", 1))
    bases.check_family(cls, arguments, asked.config)
    lm = cls(**arguments)
    Watch(lm, bases.module_of(lm, asked.base), asked)
    return lm


class Watch:
    """Patches one model and stands between it and lmms-eval, until ``lm.clean()``."""

    def __init__(self, lm: Any, model: nn.Module, asked: Asked) -> None:
        self.lm, self.model, self.base = lm, model, asked.base
        self.meter = Meter()
        self._logged: list[int] = []
        self._prompts: list[dict[str, Tensor]] = []
        _, parts = resolve(model)
        self.placeholders = [*parts.placeholders.values()]
        self.handle: Patch | None = None if asked.config is None else patch(model, asked.config)
        if self.handle is None and not self.placeholders:  # what counts pictures is the patch; this one drops nothing
            self.handle = patch(model, "grid", keep=1.0)
        self._generate = model.generate
        model.generate = self.generate  # type: ignore[method-assign, assignment]
        for name in GENERATING:
            setattr(lm, name, self._requests(name))
        if asked.config is not None:
            lm.loglikelihood = self._no_loglikelihood
        self._clean = lm.clean
        lm.clean = self.clean

    # -- lmms-eval's side -----------------------------------------------------------------------------------------

    def _requests(self, name: str) -> Any:
        inner = getattr(self.lm, name)

        def watched(requests: list[Any]) -> Any:
            calls, entries = len(self.meter.ttft), len(gen_metrics.get_logged_metrics_history())
            with _stopping():
                answers = inner(requests)
            self.meter.requests += len(requests)
            if requests and len(self.meter.ttft) == calls:
                raise EvaluationStopped(
                    f"vtc: the pruner never fired: {len(requests)} requests were answered, and base={self.base!r} did "
                    "not call generate() of its transformers model"
                )
            self._calibrate()
            self._logged.append(len(gen_metrics.get_logged_metrics_history()) - entries)
            return answers

        return watched

    def _no_loglikelihood(self, requests: list[Any]) -> Any:
        raise EvaluationStopped(
            "vtc: this task compares likelihoods, which lmms-eval reads from logits by the prompt's columns; a pruned "
            "model has fewer. Take the task's generating variant, or method=none"
        )

    def clean(self) -> None:
        """All requests are answered: judge, report, let go of the model."""
        total = self.meter
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            meters: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(meters, self.meter)
            total = Meter.merged(meters)
        if total.requests and not total.prompts:
            raise EvaluationStopped(
                f"vtc: the pruner never fired: none of the {total.requests} requests had visual tokens in its prompt"
            )
        keep = None if self.handle is None else self.handle.method.keep
        if isinstance(keep, float) and keep < 1.0 and total.prompts and total.left >= total.given:
            raise EvaluationStopped(f"vtc: {self.handle} dropped none of the visual tokens of {total.prompts} prompts")
        if numbers := total.summary():
            self._log(numbers, total)
        if self.handle is not None:
            self.handle.unpatch()
        del self.model.generate
        clean = self._clean
        vars(self.lm).pop("clean")
        for name in (*GENERATING, "loglikelihood"):
            vars(self.lm).pop(name, None)
        del self.model, self._generate, self.handle
        clean()

    def _log(self, numbers: dict[str, float], total: Meter) -> None:
        """Into the `throughput` of the result file, where lmms-eval puts `avg_` before the names."""
        seconds, tokens = sum(total.ttft) + total.decoding, total.steps + len(total.ttft)
        if any(self._logged):  # the base has logged its own sums already
            gen_metrics.log_metrics(0.0, 0, 0.0, additional_metrics=numbers)
        else:
            gen_metrics.log_metrics(seconds, tokens, tokens / max(seconds, 1e-9), additional_metrics=numbers)

    # -- the model's side -----------------------------------------------------------------------------------------

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own, or :class:`EvaluationStopped` with the reason."""
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        if ids is None:
            raise EvaluationStopped(
                f"vtc: base={self.base!r} hands embeddings instead of ids to generate(), so that visual tokens cannot "
                "be told from text"
            )
        before = None if self.handle is None else self.handle.stage.last
        clock = Clock(ids.device)
        criteria = StoppingCriteriaList([*(kwargs.pop("stopping_criteria", None) or []), clock])
        try:
            out = self._generate(*args, **kwargs, stopping_criteria=criteria)
        except Exception as error:
            logger.opt(exception=error).error("vtc: generate raised")
            raise EvaluationStopped(f"vtc: generate raised {type(error).__name__}: {error}") from error
        clock.stop()
        self.meter.timed(clock)
        fired = self.handle is None or self.handle.stage.last is not before
        rows, visual = self._visual(ids) if fired or self.placeholders else (0, 0)
        pictures = visual if self.placeholders else kwargs.get("images") is not None
        if pictures and not fired:
            raise EvaluationStopped(
                f"vtc: the pruner did not fire for a prompt with {visual or 'any number of'} visual tokens "
                f"(base={self.base!r})"
            )
        if visual:
            self.meter.counted(rows, visual, self.handle)
            if self.handle is not None and self.placeholders and len(self._prompts) < WARM_UP + CALIBRATED:
                self._prompts.append({name: value for name, value in kwargs.items() if isinstance(value, Tensor)})
        return out

    def _visual(self, ids: Tensor) -> tuple[int, int]:
        """Samples with pictures and visual tokens of a call: by its ids, or by what the patch found where those do not
        tell.
        """
        if self.placeholders:
            where = torch.stack([ids == token for token in self.placeholders]).any(0)
            return int(where.any(-1).sum()), int(where.sum())
        assert self.handle is not None
        last = self.handle.stage.last
        assert last is not None
        beams = len(last.lengths) // len(ids)
        return len({image.row for image in last.plan.images}) // beams, sum(last.plan.given) // beams

    def _calibrate(self) -> None:
        """After the answers, so that the base's own clock does not see it."""
        prompts, self._prompts = self._prompts, []
        if self.handle is None or self.meter.realised:
            return
        try:
            values = [realised_fraction(self.model, prompt, self.handle) for prompt in prompts]
        except Exception as error:  # a number less, no reason to lose the evaluation
            logger.warning(f"vtc: no realised fraction of this run: {type(error).__name__}: {error}")
        else:
            self.meter.realised += values[WARM_UP:]


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
    """Turn what lmms-eval would swallow into the end of the process."""
    try:
        yield
    except Exception as error:
        logger.opt(exception=error).debug("vtc")
        reason = " ".join(str(error).split()) or type(error).__name__
        expected = isinstance(error, (ValueError, TypeError, OSError))
        raise EvaluationStopped(f"vtc: {reason if expected else f'{type(error).__name__}: {reason}'}") from error
