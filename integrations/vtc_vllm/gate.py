"""A request's own keep without ``--trust-request-mm-kwargs``, which would let requests set every processor argument.

vLLM's server refuses a request's ``mm_processor_kwargs`` in one function. It is given what is left when the field of
ours is taken out, so that whatever it refuses stays refused; what the field may say is checked as before, by
:mod:`vtc_vllm.requests` and by the processor. No request gets more than the unpruned model would cost.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

from vtc.values import shortened
from vtc_vllm.settings import ARGUMENTS, KNOWN, REQUEST_KEEP

logger = logging.getLogger("vllm.vtc")

MODULE, NAME = "vllm.renderers.online_renderer", "validate_request_mm_kwargs"
"""Where the server looks that function up."""


def admit() -> None:
    """Put the one that takes our field out in its place, once; only in a process that serves.

    Where this vLLM has no such function, that is told, and requests with a keep get vLLM's own refusal.
    """
    if (module := sys.modules.get(MODULE)) is None:  # no server
        return
    theirs = getattr(module, NAME, None)
    if hasattr(theirs, "__wrapped__"):
        return
    if not callable(theirs) or ARGUMENTS not in inspect.signature(theirs).parameters:
        logger.warning("%s.%s is not what it was: %s needs --trust-request-mm-kwargs", MODULE, NAME, KNOWN)
        return
    setattr(module, NAME, without_ours(theirs))


def without_ours(theirs: Callable[..., None]) -> Callable[..., None]:
    """Their check, which never sees the keep."""

    @functools.wraps(theirs)
    def check(*, mm_processor_kwargs: dict[str, Any] | None, **rest: Any) -> None:
        others = {name: value for name, value in (mm_processor_kwargs or {}).items() if name != REQUEST_KEEP}
        try:
            theirs(mm_processor_kwargs=others or None, **rest)
        except Exception as error:  # of vLLM's own type, which its server answers with 400
            if not others:
                raise
            names = shortened(", ".join(f"{ARGUMENTS}.{name}" for name in others))
            raise type(error)(f"{names}: a request to this server may give {KNOWN} only. {error}") from None

    return check
