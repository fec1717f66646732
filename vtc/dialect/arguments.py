"""Arguments by role: one name for what releases and families spell differently."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vtc.dialect.releases import running_release
from vtc.errors import UnsupportedModelError


@dataclass(frozen=True)
class Role:
    """What an argument is for.

    Attributes:
        what: in words, for messages.
        names: as it is spelled somewhere, the newest spelling first.
    """

    what: str
    names: tuple[str, ...]

    def read(self, given: Mapping[str, Any]) -> Any:
        """The value among arguments by name, ``None`` if it is not there. Of two spellings the newest counts."""
        return next((given[name] for name in self.names if given.get(name) is not None), None)


CACHE = Role("the key-value cache", ("cache", "past_key_values"))
IDS = Role("the token ids", ("input_ids",))
EMBEDS = Role("the token embeddings", ("inputs_embeds",))
MASK = Role("the attention mask", ("attention_mask",))
POSITIONS = Role("the position ids", ("position_ids",))
USE_CACHE = Role("whether to fill a cache", ("use_cache",))
HIDDEN = Role("the hidden states", ("hidden_states",))
ROTARY = Role("the rotary embeddings", ("position_embeddings",))
ENDS = Role("where sequences that share a row end", ("cu_seqlens", "cu_seq_lens_q"))
LONGEST = Role("how long the longest of them is", ("max_seqlen",))
ENCODED = Role("images encoded ahead", ("mm_encoder_outputs",))
DEEPSTACK = Role("features added to early layers", ("deepstack_visual_embeds",))
INSTEAD = Role("features added to layers where nothing entered", ("deepstack_features",))
LABELS = Role("the labels", ("labels",))
LOGITS = Role("which logits to compute", ("logits_to_keep",))
NEW_LENGTH = Role("how many columns are new", ("next_sequence_length",))


class Spelling:
    """How one callable spells the roles, told from its signature."""

    def __init__(self, function: Callable[..., Any], owner: str, needs: tuple[Role, ...] = ()) -> None:
        """Look.

        Args:
            function: what is called.
            owner: what to call it in messages.
            needs: roles without which it cannot be served.

        Raises:
            UnsupportedModelError: it has no argument for one of them under a name that is known.
        """
        self.parameters = dict(inspect.signature(function).parameters)
        self.extra = next((p.name for p in self.parameters.values() if p.kind is p.VAR_KEYWORD), None)
        for role in needs:
            if self.name(role) is None:
                raise UnsupportedModelError(
                    f"{owner} has no argument for {role.what} under a name that vtc knows ({', '.join(role.names)}). "
                    f"It takes: {', '.join(self.parameters)}. {running_release()}"
                )

    def name(self, role: Role) -> str | None:
        """The argument of a role, ``None`` if the signature names none."""
        return next((name for name in role.names if name in self.parameters), None)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """The arguments of one call; what came by position gets its name."""
        named = dict(zip(self.parameters, args, strict=False)) if args else {}
        return Arguments(self, named | dict(kwargs))


class Arguments:
    """The arguments of one call, read and written by role.

    Attributes:
        named: all of them, by keyword.
    """

    def __init__(self, spelling: Spelling, named: dict[str, Any]) -> None:
        self._spelling, self.named = spelling, named

    def __getitem__(self, role: Role) -> Any:
        return role.read(self.named)

    def __setitem__(self, role: Role, value: Any) -> None:
        """Write it as the callable spells it; other spellings are taken out, so that none of them can win."""
        name = self._spelling.name(role) or next((n for n in role.names if n in self.named), role.names[0])
        for other in role.names:
            if other != name:
                self.named.pop(other, None)
        self.named[name] = value

    def pop(self, role: Role) -> Any:
        """Take a value out, under whatever name it came."""
        value = self[role]
        for name in role.names:
            self.named.pop(name, None)
        return value

    def copy(self) -> Arguments:
        """The same arguments, to be changed apart."""
        return Arguments(self._spelling, dict(self.named))
