"""What we know of huggingface_hub: whether a checkpoint can be had from it, found out within seconds.

By itself it asks for every file of a checkpoint six times, with pauses between and a warning each. Where there is no
network that is a minute of noise before an error. So one request goes ahead of them, without a second try.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

PATIENCE = 3.0
"""Seconds that the hub has for an answer. Looking its address up counts too, which no timeout of a request covers."""


def endpoint() -> str:
    """Where the hub is: ``HF_ENDPOINT``, or the public one."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def is_offline() -> bool:
    """Whether the environment forbids asking (``HF_HUB_OFFLINE``)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def is_cached(name: str) -> bool:
    """Whether the config of a checkpoint was fetched before."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:  # no name that the hub could have
        return False


def trouble() -> str:
    """Why the hub cannot be asked now, in a few words; empty where it answers, even if it knows nothing."""
    if is_offline():
        return "HF_HUB_OFFLINE forbids to ask"
    found: list[str] = []
    asking = threading.Thread(target=lambda: found.append(_ask()), daemon=True)
    asking.start()
    asking.join(PATIENCE + 1.0)
    return found[0] if found else f"no answer within {PATIENCE:g} s"


def _ask() -> str:
    from huggingface_hub.utils import get_session

    try:
        status = get_session().head(endpoint(), timeout=PATIENCE).status_code
    except Exception as error:  # of httpx or httpx2, by release
        kind = type(error).__name__
        return f"no answer within {PATIENCE:g} s" if "Timeout" in kind else f"{kind}: {error}"
    return f"it answers {status}" if status >= 500 else ""


@contextlib.contextmanager
def from_cache() -> Iterator[None]:
    """Inside, transformers takes what was fetched before and does not ask whether there is something newer."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
