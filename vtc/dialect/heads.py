"""What stands behind a base model, and how it reads the hidden states that pruning makes fewer of.

A language-modelling head looks at one hidden state at a time: fewer of them are fewer logits, and nothing else. Other
heads count columns of the prompt as the caller wrote it, by its ids or its mask. Which head a model has is told from
the code it runs and from the parts it is made of, never from its name; one that is not known is refused.
"""

from __future__ import annotations

import ast
import enum
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import modeling_layers

from vtc.dialect.compilers import uncompiled
from vtc.dialect.generation import generates

_SCORES_ONE = modeling_layers.GenericForSequenceClassification
_SCORES_EACH = modeling_layers.GenericForTokenClassification
_TO_VECTORS = "embedding_proj_layer"
"""What ColPali and its kin project hidden states with, before they multiply them by the mask."""


class Head(enum.Enum):
    """How a head reads hidden states [B, N, d]."""

    TOKENWISE = enum.auto()
    """Each by itself: logits, scores of tokens, or the hidden states themselves."""
    POOLED = enum.auto()
    """One of them, whose column is found in the ids of the prompt."""
    VECTORS = enum.auto()
    """Each by itself, but beside the mask of the prompt: a page as a vector per token."""


def head_of(root: nn.Module, base: nn.Module) -> Head | None:
    """How ``root`` reads what its base model returns, ``None`` if that is not known."""
    if root is base:
        return Head.TOKENWISE
    if _runs(root, _SCORES_ONE):
        return Head.POOLED
    if _runs(root, _SCORES_EACH):
        return Head.TOKENWISE
    parts = _parts(root, base)
    if parts == [_TO_VECTORS]:
        return Head.VECTORS
    return Head.TOKENWISE if generates(root) and not parts else None


def unknown_head(root: Any, base: nn.Module) -> str | None:
    """Why nobody can say how ``root`` reads hidden states, ``None`` if it is known."""
    if head_of(root, base) is not None:
        return None
    parts = ", ".join(_parts(root, base)) or f"{type(root).__name__}.forward"
    return (
        f"its head ({parts}) is not one that vtc knows, and may look for columns that are gone. What works: models "
        "that generate, sequence and token classifiers that run transformers' own forward, retrievers built as "
        "ColPali; or vtc.patch on the base model alone, whose hidden states stand at the columns p.last_columns"
    )


def _runs(root: nn.Module, head: type) -> bool:
    """Whether it is such a head and runs its forward: those that stand before it do nothing but call it."""
    if not isinstance(root, head):
        return False
    classes = type(root).__mro__
    before = (vars(each).get("forward") for each in classes[: classes.index(head)])
    return all(_hands_on(forward) for forward in before if forward is not None)


@functools.cache
def _hands_on(forward: Callable[..., Any]) -> bool:
    """Whether all that a method does is to return what the same method of its superclass returns."""
    try:
        (method,) = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward)))).body
    except (OSError, SyntaxError, ValueError):
        return False
    said = ast.get_docstring(method) is not None  # type: ignore[arg-type]
    last = method.body[-1]  # type: ignore[attr-defined]
    called = last.value.func if isinstance(last, ast.Return) and isinstance(last.value, ast.Call) else None
    return len(method.body) == 1 + said and called is not None and ast.unparse(called) == "super().forward"  # type: ignore[attr-defined]


def _parts(root: Any, base: nn.Module) -> list[str]:
    """Children of ``root`` with weights, apart from the base model and the output embeddings."""
    known = {uncompiled(base), uncompiled(root.get_output_embeddings())}
    return [
        name
        for name, child in root.named_children()
        if next(child.parameters(), None) is not None and known.isdisjoint(map(uncompiled, child.modules()))
    ]


def pooled_columns(root: Any, ids: Tensor | None, batch: int) -> Tensor:
    """LongTensor [B]: the column that a sequence classifier scores, by the rule of its own forward; -1: the last."""
    padding = root.config.get_text_config().pad_token_id
    if ids is None or padding is None:
        return torch.full((batch,), -1)
    real = (ids != padding).int()
    return (real * torch.arange(ids.shape[1], device=ids.device)).argmax(1)


def calls(caller: Any, base: nn.Module) -> bool:
    """Whether ``caller`` is a transformers model that has a head behind this base model."""
    caller = uncompiled(caller)
    return (
        isinstance(caller, nn.Module)
        and caller is not base
        and isinstance(getattr(type(caller), "base_model", None), property)
        and uncompiled(caller.base_model) is base
    )
