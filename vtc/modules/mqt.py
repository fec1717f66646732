"""The resampler of the Matryoshka Query Transformer (arXiv 2405.19315, section 3): as many tokens as one asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.values import shown

PUBLISHED = "model.query_abstractor."
"""What stands in front of its parameters in published checkpoints."""


class MatryoshkaQueryTransformer(nn.Module):
    """One cross-attention from learned queries to the patches of a picture, in place of LLaVA's projector.

    With q = LN(query + places), k = LN(places of the patches), v = LN(patches): out = MHA(q, k, v) @ proj. Trained so
    that the first m tokens are a whole description by themselves, for every m: a query never sees another query, so
    the first m of n tokens are what m queries alone give.

    Only v has content: what each query attends to is one constant, [heads, n, patches]. It is computed in float32
    whatever the dtype, and kept while parameters stay as they are, in ``eval()`` mode only. Writes that autograd does
    not see either (``parameter.data``) go unnoticed: call ``train()`` and ``eval()`` after them.

    Parameters have the published names: ``pos_embed`` [n, c], ``query`` [n, c], ``proj`` [c, out], ``attn``, ``ln_q``,
    ``ln_k``, ``ln_v``.

    Args:
        queries: n, a square number: their places are a square grid.
        width: c, of the patches; divisible by 4 and by ``heads``.
        out: width of the language model.
        heads: of the attention; 16 as published, and no checkpoint says so.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(self, queries: int = 256, width: int = 1024, out: int = 4096, heads: int = 16) -> None:
        super().__init__()
        side = math.isqrt(queries)
        if queries < 1 or side * side != queries:
            raise ValueError(f"queries={queries} is no square number, such as 256: their places are a square grid")
        if width % 4 or width % heads:
            raise ValueError(f"width={width} must be divisible by 4, for the table of places, and by heads={heads}")
        self.pos_embed = nn.Parameter(torch.empty(queries, width), requires_grad=False)
        self.query = nn.Parameter(torch.empty(queries, width))
        self.proj = nn.Parameter(torch.empty(width, out))
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self._keep: int | None = None
        self._constant: tuple[Any, Tensor, list[Tensor]] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh queries and projection, and the table of places.

        Scales are not the authors' in all: ``attn`` starts as torch starts it, and ``proj`` with width ** -0.5 (theirs:
        out ** -0.5).
        """
        count, width = self.query.shape
        with torch.no_grad():
            self.pos_embed.copy_(sincos(math.isqrt(count), width))
        nn.init.trunc_normal_(self.query, std=0.02)
        nn.init.normal_(self.proj, std=width**-0.5)

    @classmethod
    def from_published(cls, state: Mapping[str, Tensor], heads: int = 16) -> MatryoshkaQueryTransformer:
        """From parameters under their published names, without or with ``model.query_abstractor.`` in front.

        Args:
            state: the parameters; beside names with that prefix, others are left alone. Their dtype is that of
                ``query``, the table of places included.
            heads: what no parameter tells.

        Raises:
            ValueError: a parameter is missing, unknown or of a shape that does not fit; the message names it.
        """
        own = {name.removeprefix(PUBLISHED): t for name, t in state.items() if name.startswith(PUBLISHED)}
        own = own or dict(state)
        if missing := [name for name in ("query", "proj") if name not in own or own[name].dim() != 2]:
            raise ValueError(f"no matrix {missing[0]!r} among {shown(sorted(own))}: not a Matryoshka Query Transformer")
        module = cls(own["query"].shape[0], own["query"].shape[1], own["proj"].shape[1], heads).to(own["query"].dtype)
        try:
            module.load_state_dict(own, strict=True)
        except RuntimeError as error:
            raise ValueError(f"not the parameters of a Matryoshka Query Transformer: {error}") from None
        return module

    @property
    def queries(self) -> int:
        """How many there are."""
        return self.query.shape[0]

    @property
    def keep(self) -> int | None:
        """How many are computed; ``None``: all. Training sets it anew for every step (:func:`draw_queries`)."""
        return self._keep

    @keep.setter
    def keep(self, value: int | None) -> None:
        self._keep = None if value is None else self._checked(value, "keep")

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """The first tokens of each picture.

        Args:
            x: float [B, P, c], patches in raster order; P is a square number.
            queries: m, how many tokens; ``None``: :attr:`keep`, or all.

        Returns:
            [B, m, out], in the dtype of the parameters.

        Raises:
            ValueError: x is of another shape, or m is not in 1 .. n.
            TypeError: m is no int.
        """
        if x.dim() != 3 or x.shape[2] != self.query.shape[1] or math.isqrt(x.shape[1]) ** 2 != x.shape[1]:
            raise ValueError(
                f"patches of shape {list(x.shape)} are not [pictures, patches, {self.query.shape[1]}] with a square "
                "number of patches, as a vision tower gives them without its CLS token"
            )
        count = self._checked(queries, "queries") if queries is not None else self._keep or self.queries
        heads, (_, _, weight), (_, _, bias) = self.attn.num_heads, *self._in_proj()
        v = F.linear(_norm(x, self.ln_v).to(weight.dtype), weight, bias).unflatten(2, (heads, -1)).transpose(1, 2)
        mixed = self.pattern(x.shape[1], count).to(v.dtype) @ v
        mixed = self.attn.out_proj(mixed.transpose(1, 2).flatten(2))
        return mixed @ self.proj.to(mixed.dtype)

    def pattern(self, patches: int, queries: int | None = None) -> Tensor:
        """What the first queries attend to, in every picture: float32 [heads, m, patches], each row sums to 1."""
        count = self.queries if queries is None else queries
        if self.training or torch.compiler.is_compiling():
            return self._attend(patches, count)
        reads = (self.pos_embed, self.query, self.attn.in_proj_weight, self.attn.in_proj_bias)
        reads += (self.ln_q.weight, self.ln_q.bias, self.ln_k.weight, self.ln_k.bias)  # type: ignore[assignment]
        graph = torch.is_grad_enabled() and any(p.requires_grad for p in reads)
        if graph or any(p.is_inference() for p in reads):  # those count no writes
            return self._attend(patches, count)
        state = (patches, [(p._version, p.data_ptr()) for p in reads])
        known = self._constant
        if known is None or known[0] != state:
            held = [p.detach() for p in reads]  # no other tensor gets their addresses meanwhile
            # all rows: prefixes of one table are equal bit for bit, whatever was asked for first
            known = self._constant = state, self._attend(patches, self.queries), held
        return known[1][:, :count]

    def _attend(self, patches: int, count: int) -> Tensor:
        """[heads, count, patches] in float32, autocast or not."""
        heads, width = self.attn.num_heads, self.query.shape[1]
        with torch.autocast(self.query.device.type, enabled=False):
            places = self.pos_embed.float()
            weights, biases = self._in_proj()
            q = _norm(self.query[:count].float() + places[:count], self.ln_q)
            k = _norm(_resized(places, math.isqrt(patches)), self.ln_k)
            q, k = (
                F.linear(t, w.float(), b.float()).unflatten(1, (heads, -1)).transpose(0, 1)
                for t, w, b in zip((q, k), weights, biases, strict=False)
            )
            return torch.softmax(q @ k.transpose(1, 2) * (width // heads) ** -0.5, dim=-1)

    def _in_proj(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Weights and biases of q, k and v."""
        return self.attn.in_proj_weight.chunk(3), self.attn.in_proj_bias.chunk(3)

    def _checked(self, value: int, name: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={shown(value)} is no int: how many of the {self.queries} queries are computed")
        if not 1 <= value <= self.queries:
            raise ValueError(f"{name}={value} is not in 1 .. {self.queries}: there are {self.queries} queries")
        return value

    def products(self, patches: int) -> tuple[int, int]:
        """Multiplications for a picture of so many patches, and parameters read, once the pattern is there."""
        width, out = self.proj.shape
        entries = 2 * width * width + width * out
        return patches * width * (width + self.queries) + self.queries * (entries - width * width), entries

    # -- what makes the constant another one ----------------------------------------------------------------------

    def train(self, mode: bool = True) -> MatryoshkaQueryTransformer:
        """As ever; what was kept of the parameters is forgotten."""
        self._constant = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:  # .to(), .half(), .cuda(): the old parameters are let go
        self._constant = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_constant": None}


def draw_queries(queries: int, generator: torch.Generator | None = None) -> int:
    """How many queries a training step of the second stage computes: an even number in 2 .. n, each as likely.

    Drawn on the CPU (section 3.2); the first stage trains all of them.
    """
    return 2 * int(torch.randint(1, queries // 2 + 1, (), generator=generator))


def sincos(side: int, width: int) -> Tensor:
    """Places of a square grid, float32 [side * side, width]: column, then row, each as sines and cosines.

    Checkpoints bring the table, rounded to their dtype: load it, do not make it anew.
    """
    rate = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * rate
    line = torch.cat([angle.sin(), angle.cos()], dim=1)
    column, row = line.repeat(side, 1), line.repeat_interleave(side, dim=0)
    return torch.cat([column, row], dim=1).float()


def _resized(places: Tensor, side: int) -> Tensor:
    """The table [n, c] for a grid of ``side`` x ``side``, bicubic."""
    own = math.isqrt(places.shape[0])
    if own == side:
        return places
    grid = places.T.reshape(1, -1, own, own)
    return F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False).flatten(2)[0].T


def _norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """In float32."""
    return F.layer_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)
