"""Caches: their sizes, and the class of one that was pruned. Recognised by type, whatever an argument is called."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from vtc.dialect.releases import running_release
from vtc.errors import UnsupportedModelError

_LEDGER = "_vtc_ledger"
_METHODS = (
    "update",
    "get_seq_length",
    "get_query_offset",
    "get_mask_sizes",
    "reset",
    "crop",
    "reorder_cache",
    "batch_repeat_interleave",
    "batch_select_indices",
)
"""What :class:`_Pruned` overrides or relies on."""


class Ledger(Protocol):
    """What a pruned cache has to know of the tokens that are not in it."""

    def check_in_use(self) -> None:
        """Refuse where the cache is not used by whom it was made for."""

    def removed(self, layer: int) -> int:
        """By how many tokens a layer is shorter than the caller believes."""

    def rows(self, index: Tensor) -> None:
        """The cache's rows became those of ``index``."""

    def repeat(self, times: int) -> None:
        """Each row now stands there several times."""

    def forget(self, tokens: int, stored: int) -> None:
        """The last ``tokens`` tokens are to go from ``stored`` ones; refuses where rows cannot be cut together."""


def check() -> None:
    """Look for what a pruned cache overrides.

    Raises:
        UnsupportedModelError: caches of this release do not have it.
    """
    if missing := [name for name in _METHODS if not callable(getattr(Cache, name, None))]:
        raise UnsupportedModelError(f"transformers' Cache has no {', '.join(missing)} any more. {running_release()}")


def new_cache(config: Any) -> Cache:
    """What a decoder makes when it is to fill a cache and gets none."""
    return DynamicCache(config=config)


def cache_in(output: Any) -> Cache | None:
    """The cache in what a module returned, whatever it is called there."""
    values: Iterable[Any] = output.values() if isinstance(output, Mapping) else output
    return next((value for value in values if isinstance(value, Cache)), None)


def has_fixed_size(cache: Any) -> bool:
    """Whether masks for this cache are as long as it can get: static caches, which graphs are compiled for."""
    return bool(getattr(cache, "is_compileable", False))


def logical_length(cache: Cache) -> Any:
    """Tokens the caller believes that a cache holds; an int, or a tensor where the cache has a fixed size."""
    return cache.get_seq_length()


def physical_length(cache: Cache | None, layer: int = 0) -> int:
    """Tokens that ``layer`` really stored (layer 0: the first attention layer)."""
    if cache is None:
        return 0
    return int(cache.get_query_offset(layer) if ledger_of(cache) is not None else cache.get_seq_length(layer))


def mask_sizes(cache: Cache | None, new: int, layer: int) -> tuple[int, int]:
    """Keys that ``layer`` will attend to when ``new`` columns come, and how many older ones it has forgotten."""
    return (new, 0) if cache is None else cache.get_mask_sizes(new, layer)


def stored_keys(cache: Any, layer: int, past: int) -> Tensor | None:
    """Keys of one layer that were stored before this call, [B, Hkv, P, dh]."""
    return cache.layers[layer].keys[:, :, :past] if past else None


def stored_bytes(cache: Cache | None) -> int:
    """Of all keys and values that a cache holds; none without a cache."""
    if cache is None:
        return 0
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


class _Pruned:
    """Mixed into the class of a cache that was pruned. Sizes for masks stay physical; the rest is logical."""

    _vtc_prepared = False

    def update(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():  # there, hooks see to it
            ledger_of(self).check_in_use()
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved as what it was, and its ledger; the class was made here and has no name to be found by."""
        state = {name: value for name, value in self.__dict__.items() if name != _LEDGER}
        return _restored, (type(self).__mro__[2], state, ledger_of(self))

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return super().get_seq_length(layer_idx) + ledger_of(self).removed(layer_idx)  # type: ignore[misc]

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return super().get_seq_length(layer_idx)  # type: ignore[misc]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        _take_ledger(self)  # type: ignore[arg-type]

    def crop(self, tokens: int) -> None:
        """Negative: remove that many tokens from the end; positive (old transformers): the length to leave."""
        length = physical_length(self)  # type: ignore[arg-type]
        ledger: Ledger = ledger_of(self)
        remove = max(0, -tokens if tokens <= 0 else length + ledger.removed(0) - tokens)
        ledger.forget(remove, length)
        super().crop(-remove)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        ledger_of(self).rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        ledger_of(self).repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        ledger_of(self).rows(indices)


@functools.cache
def _pruned(cls: Any) -> Any:
    return type(f"VTC{cls.__name__}", (_Pruned, cls), {"__module__": __name__})


def _restored(cls: type[Cache], state: dict[str, Any], ledger: Ledger) -> Cache:
    cache = cls.__new__(cls)
    cache.__dict__.update(state)
    give_ledger(cache, ledger)
    return cache


def give_ledger(cache: Cache, ledger: Ledger) -> None:
    """Make a cache a pruned one: the same object and tensors, its class a subclass of what it was."""
    setattr(cache, _LEDGER, ledger)
    cache.__class__ = _pruned(type(cache))  # type: ignore[arg-type]


def pruned(cache: Any) -> bool:
    """Whether a cache was pruned. It is told from the class, which compilers guard."""
    return isinstance(cache, _Pruned)


def is_prepared(cache: Any) -> bool:
    """Whether the masks of the step that is running were made for what this pruned cache holds."""
    return bool(cache._vtc_prepared)


@contextmanager
def prepared_for(cache: Any) -> Iterator[None]:
    """Say so while one step runs. It stands on the cache because compiled code may look at its arguments only."""
    cache._vtc_prepared = True
    try:
        yield
    finally:
        cache._vtc_prepared = False


def _take_ledger(cache: Cache) -> None:
    """Make it an ordinary one again (it must be empty)."""
    delattr(cache, _LEDGER)
    cache.__class__ = type(cache).__mro__[2]


def ledger_of(cache: Any) -> Any:
    """What :func:`give_ledger` left on a cache, ``None`` where it was never pruned."""
    return getattr(cache, _LEDGER, None)
