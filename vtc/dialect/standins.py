"""Stand-ins: the code of a module, its config and its sizes, and none of its weights.

What a layer computes can be tried out on one, and the layer never notices. Linear maps become random ones that cost
next to nothing, parameters random numbers, the rest the same code. All of it runs on the CPU, eagerly and in float32,
whatever the model is: half precision, quantised, offloaded, on a meta device, or in the middle of somebody's forward.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vtc.dialect.arguments import EMBEDS, ENDS, IDS, MASK, POSITIONS, ROTARY, USE_CACHE, Arguments, Spelling
from vtc.dialect.attention import hidden_states, self_attention, set_self_attention
from vtc.dialect.compilers import uncompiled
from vtc.dialect.masks import set_window
from vtc.dialect.modules import set_attention
from vtc.dialect.towers import Heard, spelling

TOKENS, WINDOW = 6, 3
"""How long the prompts of a trial are, and how far layers with a sliding window look back in them."""

_OWN = ("forward", "_compiled_call_impl")
"""What others put over a module's own code: accelerate, kernels, torch.compile."""
_SMALL = 2**16
"""How many numbers a parameter may have that are all random."""
_LOUD = 2.0
"""By how much a linear map enlarges: what happens to large queries, keys or logits only (clips, caps) has to show."""


def stand_in(module: nn.Module, instead: Mapping[nn.Module, nn.Module] | None = None) -> nn.Module:
    """A stand-in of a module.

    Args:
        module: is left as it is.
        instead: modules in it, and what takes their places as it is.
    """
    return _StandIn(instead or {}).of(module)


class _StandIn:
    """Makes the stand-ins of one tree of modules, which share a config."""

    def __init__(self, instead: Mapping[nn.Module, nn.Module]) -> None:
        self.instead = instead
        self.configs: dict[int, Any] = {}
        self.random = torch.Generator("cpu").manual_seed(0)

    def of(self, module: nn.Module) -> nn.Module:
        module = uncompiled(module)
        if module in self.instead:
            return self.instead[module]
        wide, high = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if isinstance(wide, int) and isinstance(high, int):  # whatever kind of linear map it is, quantised or adapted
            return _Linear(wide, high, self.random)
        if isinstance(module, nn.Embedding):
            return _Embedding(module.embedding_dim, self.random)
        twin = module.__class__.__new__(module.__class__)
        twin.__dict__.update({name: self._attribute(name, value) for name, value in [*vars(module).items()]})
        for name in _OWN:
            twin.__dict__.pop(name, None)
        twin.__dict__ |= {
            "training": False,
            "_parameters": {name: self._numbers(value) for name, value in module._parameters.items()},
            "_buffers": {name: self._attribute(name, value) for name, value in module._buffers.items()},
            "_modules": {n: None if child is None else self.of(child) for n, child in module._modules.items()},
        }
        return twin

    def _attribute(self, name: str, value: Any) -> Any:
        if name == "config":
            return self._eager(value)
        if "_hooks" in name and isinstance(value, dict):
            return OrderedDict()
        if not isinstance(value, Tensor):
            return value
        if value.is_meta:
            return torch.rand(value.shape, generator=self.random, dtype=torch.float32)
        value = value.detach().to("cpu", copy=True)
        return value.float() if value.is_floating_point() else value

    def _eager(self, config: Any) -> Any:
        """The same config for eager attention, since maps are wanted, and with windows that end within a trial."""
        if id(config) not in self.configs:
            self.configs[id(config)] = twin = copy.deepcopy(config)
            set_attention(twin, "eager")
            set_window(twin, WINDOW)
        return self.configs[id(config)]

    def _numbers(self, parameter: Tensor | None) -> Tensor | None:
        """Random numbers around 1, which scales of norms are, in a parameter's shape; large ones repeat themselves."""
        if parameter is None:
            return None
        shape = parameter.shape if parameter.numel() <= _SMALL else parameter.shape[-1:]
        numbers = 1 + 0.3 * torch.randn(shape, generator=self.random, dtype=torch.float32)
        return nn.Parameter(numbers.expand(parameter.shape), requires_grad=False)


class _Linear(nn.Module):
    """A random linear map in which each output depends on three inputs: as good as any to tell code from code."""

    def __init__(self, width: int, out: int, random: torch.Generator) -> None:
        super().__init__()
        self.in_features, self.out_features = width, out
        self.weight = torch.zeros(0, dtype=torch.float32)  # its dtype may be asked for
        self.source = torch.randint(width, (3, out), generator=random)
        self.factor = _LOUD * torch.randn(3, out, generator=random, dtype=torch.float32) / 3**0.5

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        return (x[..., self.source] * self.factor).sum(-2)


class _Embedding(nn.Module):
    """Random numbers for whatever ids."""

    def __init__(self, width: int, random: torch.Generator) -> None:
        super().__init__()
        self.embedding_dim, self.random = width, random
        self.weight = torch.zeros(0, dtype=torch.float32)

    def forward(self, ids: Tensor) -> Tensor:
        """[...] → [..., d]."""
        return torch.randn(*ids.shape, self.embedding_dim, generator=self.random, dtype=torch.float32)


class _Enough(Exception):
    """Raised where all that was wanted has been seen."""


class _Spy(nn.Module):
    """Takes the place of a module: notes what it is called with, and stops there or hands on what it got."""

    def __init__(self, place: nn.Module, stops: bool) -> None:
        super().__init__()
        self.__dict__["place"], self.stops = place, stops
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["place"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Note the call."""
        self.args, self.kwargs = args, kwargs
        if self.stops:
            raise _Enough
        return hidden_states(args, kwargs)


def calls_of_layers(
    decoder: Any, spelling: Spelling, layers: list[nn.Module], last: int
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What a decoder calls its layers with for a short prompt, up to layer ``last``: random hidden states, and whatever
    it makes of positions that lie far apart and of a mask.

    Args:
        decoder: is left as it is.
        spelling: of its arguments.
        layers: its layers.
        last: the last one that is wanted.
    """
    spies = [_Spy(layer, stops=index == last) for index, layer in enumerate(layers)]
    trial = stand_in(decoder, dict(zip(layers, spies, strict=True)))
    furthest = getattr(decoder.config, "max_position_embeddings", None) or 4096
    call = spelling.bind((), {})
    call[IDS] = torch.arange(1, TOKENS + 1)[None]  # some make more of ids than embeddings
    if spelling.name(IDS) is None:
        call[EMBEDS] = _Embedding(decoder.config.hidden_size, torch.Generator("cpu").manual_seed(0))(call.pop(IDS))
    call[MASK] = torch.ones(1, TOKENS, dtype=torch.long)  # without it, far positions are taken for packed samples
    call[POSITIONS] = torch.linspace(0, furthest - 1, TOKENS).long()[None]
    call[USE_CACHE] = False
    with contextlib.suppress(_Enough):
        trial(**call.named)
    return [(spy.args, spy.kwargs) for spy in spies[: last + 1]]


@dataclass(frozen=True)
class Trial:
    """What one layer did with a short prompt.

    Attributes:
        layer: a stand-in of it.
        call: what it was called with.
        entered: [1, T, d], what reached its attention.
        weights: float [1, H, T, T], the attention that it computed, or ``None`` where it does not tell.
    """

    layer: nn.Module
    call: Arguments
    entered: Tensor
    weights: Tensor | None

    @classmethod
    def of(cls, layer: nn.Module, call: Arguments) -> Trial:
        """Run a stand-in of a layer up to its attention, and its attention."""
        attention = self_attention(layer)
        assert attention is not None
        heard = _Spy(stand_in(attention), stops=True)
        networks = [child for child in map(uncompiled, layer.children()) if [*child.children()]]  # norms have no parts
        trial = stand_in(layer, {child: _Spy(child, stops=True) for child in networks} | {attention: heard})
        with contextlib.suppress(_Enough):
            trial(**call.named)
        _, weights, *_ = heard.place(*heard.args, **heard.kwargs)
        set_self_attention(trial, heard.place)
        return cls(trial, call, hidden_states(heard.args, heard.kwargs), weights)


def attend(attention: Any, masked: bool) -> tuple[nn.Module, Tensor, Heard, list[Tensor]]:
    """A stand-in of a vision tower's attention, called with random numbers: hidden states, and as far as it takes them
    a rotary embedding and where sequences end.

    Args:
        attention: is left as it is.
        masked: give it a mask too, if it takes no ends.

    Returns:
        It; the hidden states [1, T, d]; what else it was called with; and the attention that it computed,
        [1, H, n, n] of each sequence.
    """
    trial, random = stand_in(attention), torch.Generator("cpu").manual_seed(0)
    takes = spelling(attention)
    width = (attention.qkv if hasattr(attention, "qkv") else attention.q_proj).in_features
    hidden = torch.randn(1, TOKENS, width, generator=random, dtype=torch.float32)
    call = takes.bind((), {})
    if takes.name(ROTARY) is not None:
        angles = torch.randn(TOKENS, attention.head_dim, generator=random, dtype=torch.float32)
        call[ROTARY] = (angles.cos(), angles.sin())
    packed = takes.name(ENDS) is not None
    if packed:
        call[ENDS] = torch.tensor([0, 2, TOKENS])
    elif masked and takes.name(MASK) is not None:
        apart = torch.zeros(TOKENS, TOKENS, dtype=torch.float32)
        apart[:2, 2:] = apart[2:, :2] = torch.finfo(torch.float32).min
        call[MASK] = apart[None, None]
    with _Maps() as maps:
        returned = trial(hidden[0] if packed else hidden, **call.named)
    told = [x for x in returned[1:2] if isinstance(x, Tensor)] if isinstance(returned, tuple) else []
    return trial, hidden, Heard.of(trial, (hidden,), call.named), told or maps.found


class _Maps(TorchDispatchMode):
    """Notes every softmax: attention that is computed eagerly, and handed out or not."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "softmax" in func.__name__:
            self.found.append(result)
        return result
