"""What a language model costs: FLOPs and bytes, read off its modules (which may be on the meta device).

What stands before it, vision tower and projector, is counted in :mod:`vtc.profiling.encoder`. The rules, the same for
everything that is printed as an estimate:

- FLOPs are two per multiply-add. Only matrix products count: linear maps, patch embeddings, attention scores and sums.
  Look-ups, norms, activations, rotary embeddings and interpolated positions do not.
- The language model's attention is causal, half of n x n, and less in layers with a sliding window. The
  vision tower's is full, or windowed where the tower works in windows. The head runs on the last position only.
- Of a mixture of experts a token meets the router and the experts it is sent to.
- Bytes are a floor: weights are read once, keys and values are written once and read once in a decode step, and
  activations are never counted. As many experts are read as if the router spread tokens evenly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vtc.dialect.masks import layer_type, window_of

DELTA_CHUNK = 64
"""Tokens that transformers' chunked delta rule handles at once; a prompt is padded to a multiple of it."""
_NO_MATRIX = ("position", "cls_token", "mask_token", "newline", "probe")
_OUTPUTS = ("o_proj", "out_proj", "proj", "projection_layer")


@dataclass(frozen=True)
class Cost:
    """Arithmetic and memory traffic.

    Attributes:
        flops: two per multiply-add.
        bytes: that have to be moved at least.
    """

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Matrices:
    """Weights that tokens are multiplied with, as numbers of entries.

    Attributes:
        dense: those that every token meets.
        experts: those of all experts together.
        share: fraction of the experts that one token is sent to.
    """

    dense: int = 0
    experts: int = 0
    share: float = 0.0

    @property
    def met(self) -> float:
        """Entries that one token meets."""
        return self.dense + self.experts * self.share

    def read(self, tokens: int) -> float:
        """Entries that have to be read for so many tokens, if the router spreads them evenly."""
        return self.dense + self.experts * (1.0 - (1.0 - self.share) ** tokens)


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer.

    Attributes:
        matrices: its projections, MLP or experts.
        width: heads times head width, of the attention; 0 for linear attention.
        kv: keys and values, as numbers per token.
        stores: it has keys and values of its own (some models reuse an earlier layer's).
        window: how many tokens it looks back; ``None``: all.
        recurrence: FLOPs per token of linear attention in prefill, beside its projections.
        step: the same in decoding, where it goes token by token.
        state: numbers that linear attention keeps per sample.
    """

    matrices: Matrices
    width: int = 0
    kv: int = 0
    stores: bool = True
    window: int | None = None
    recurrence: int = 0
    step: int = 0
    state: int = 0

    def flops(self, n: int) -> float:
        """FLOPs of a prefill of n tokens."""
        pairs = (n * n - (0 if self.window is None else max(0, n - self.window)) ** 2) / 2
        padded = -(-n // DELTA_CHUNK) * DELTA_CHUNK
        return 2 * self.matrices.met * n + 4 * pairs * self.width + self.recurrence * padded

    def cache_read(self, n: int) -> int:
        """Numbers of keys, values and state that a decode step after n tokens reads, of one sample."""
        held = n if self.window is None else min(n, self.window - 1)  # the next token is the last of its window
        return self.kv * held + self.state

    def stored(self, n: int) -> int:
        """Numbers that n tokens leave in the cache, of one sample."""
        return self.cache_read(n) if self.stores else 0


@dataclass(frozen=True)
class Decoder:
    """A language model.

    Attributes:
        layers: its layers.
        outside: what every token meets outside them.
        head: entries of the output matrix.
        size: bytes per number.
    """

    layers: tuple[DecoderLayer, ...]
    outside: Matrices
    head: int
    size: int = 2

    @classmethod
    def of(cls, decoder: nn.Module, root: nn.Module | None = None) -> Decoder:
        """Read off a transformers language model; ``root`` is the model that owns its head."""
        config: Any = decoder.config
        layers: Any = decoder.layers
        inside = {id(parameter) for parameter in layers.parameters()}
        outside = matrices_of(decoder, config, without=inside)
        head = None if root is None else root.get_output_embeddings()  # type: ignore[operator]
        entries = 0 if head is None else head.weight.numel()
        return cls(tuple(_layer(layer, config, at) for at, layer in enumerate(layers)), outside, entries)

    def prefill(self, tokens: Sequence[int], batch: int = 1) -> Cost:
        """The prefill of ``batch`` prompts that have ``tokens[i]`` tokens in layer i (those that enter it)."""
        layers = list(zip(self.layers, tokens, strict=True))
        flops = sum(layer.flops(n) for layer, n in layers) + 2 * (self.outside.met * tokens[0] + self.head)
        read = sum(layer.matrices.read(batch * n) for layer, n in layers) + self.outside.read(batch * tokens[0])
        return Cost(batch * flops, self.size * (read + self.head) + self.cache_bytes(tokens, batch))

    def decode(self, tokens: Sequence[int], batch: int = 1) -> Cost:
        """One step: one more token for each of ``batch`` samples, behind ``tokens[i]`` tokens in layer i."""
        layers = list(zip(self.layers, tokens, strict=True))
        flops = 2 * (self.outside.met + self.head) + sum(
            2 * layer.matrices.met + 4 * min(n + 1, layer.window or n + 1) * layer.width + layer.step
            for layer, n in layers
        )
        read = sum(layer.matrices.read(batch) for layer in self.layers) + self.outside.read(batch) + self.head
        return Cost(batch * flops, self.size * (read + batch * sum(layer.cache_read(n) for layer, n in layers)))

    def cache_bytes(self, tokens: Sequence[int], batch: int = 1) -> float:
        """Size of the keys and values of ``batch`` prompts."""
        return self.size * batch * sum(layer.stored(n) for layer, n in zip(self.layers, tokens, strict=True))


# ------------------------------------------------------------------------------------------------------ reading modules


def named_matrices(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, int]]:
    """Parameters that tokens are multiplied with, and their entries (quantised ones may be packed)."""
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    linear = {id(m.weight): m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear)}
    for name, parameter in module.named_parameters():
        if parameter.ndim >= 2 and id(parameter) not in tables and not any(word in name for word in _NO_MATRIX):
            yield name, parameter, linear.get(id(parameter), parameter.numel())


def matrices_of(module: nn.Module, config: Any, without: set[int] | None = None) -> Matrices:
    """All of a module's, dense ones and experts.

    Args:
        module: a layer, or a whole model.
        config: which says to how many experts a token is sent.
        without: ids of parameters that are counted elsewhere.

    Raises:
        ValueError: there are experts, and the config does not say so.
    """
    dense = experts = 0
    for name, parameter, entries in named_matrices(module):
        if without is not None and id(parameter) in without:
            continue
        if ".experts." in f".{name}":
            experts += entries
        else:
            dense += entries
    if not experts:
        return Matrices(dense)
    names = ("num_experts_per_tok", "top_k_experts", "moe_topk")
    chosen = next((value for n in names if (value := getattr(config, n, None))), None)
    count = next((value for n in ("num_experts", "num_local_experts") if (value := getattr(config, n, None))), None)
    if chosen is None or count is None:
        raise ValueError(f"{type(config).__name__} does not say how many of its experts a token is sent to")
    return Matrices(dense, experts, chosen / count)


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The attention of a layer of a tower or language model, if it has one."""
    return next((child for name, child in layer.named_children() if name in ("self_attn", "attn", "attention")), None)


def width_of(layer: nn.Module) -> int:
    """Heads times head width: what the output projection of the attention takes in."""
    attention = attention_of(layer)
    for name in _OUTPUTS:
        projection = getattr(attention, name, None)
        projection = getattr(projection, "linear", projection)
        if (width := getattr(projection, "in_features", None)) is not None:  # adapters and quantised layers have it too
            return int(width)
    raise ValueError(f"{type(attention).__name__} has none of the output projections {', '.join(_OUTPUTS)}")


def _layer(layer: nn.Module, config: Any, at: int) -> DecoderLayer:
    matrices = matrices_of(layer, config)
    if "linear" in (layer_type(config, at) or ""):
        return _linear_layer(layer, matrices)
    attention: Any = attention_of(layer)
    width = width_of(layer)
    groups = getattr(attention, "num_key_value_groups", 1)
    stores = not getattr(attention, "is_kv_shared_layer", False)
    return DecoderLayer(matrices, width, 2 * width // groups, stores, window_of(config, at))


def _linear_layer(layer: nn.Module, matrices: Matrices) -> DecoderLayer:
    """Gated DeltaNet, as transformers computes it: exact within chunks of C tokens, a state between them.

    Per token and value head: 2 C (2 dk + dv) for the three products within a chunk, C (dk + dv) for the triangular
    solve, 6 dk dv with the state.
    """
    mixer: Any = getattr(layer, "linear_attn", None)
    if mixer is None or not hasattr(mixer, "head_k_dim"):
        raise ValueError(f"{type(layer).__name__} has linear attention of a kind that vtc cannot count")
    heads, dk, dv, c = mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim, DELTA_CHUNK
    recurrence = heads * (2 * c * (2 * dk + dv) + c * (dk + dv) + 6 * dk * dv)
    state = heads * dk * dv + mixer.conv1d.weight.numel()
    return DecoderLayer(matrices, recurrence=recurrence, step=6 * heads * dk * dv, state=state)
