"""The method that turns ids and pictures into embeddings, watched: what stands where is noted, and nothing changed.

Nothing is dropped here. The columns of each picture, their structure and what was recorded of the vision tower are
attached to the embeddings, and the engine prunes them where it prunes those of every other family: in front of the
language model and inside it, with its masks, positions, caches, labels and beams.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vtc.dialect.arguments import CACHE, IDS, LABELS, MASK, POSITIONS, Arguments, Role, Spelling
from vtc.engine.compiled import between_graphs
from vtc.engine.context import Recording, current, during
from vtc.engine.embedded import Prompt
from vtc.engine.locate import Encoded
from vtc.tokens import Layout
from vtc_llava.layouts import layout
from vtc_llava.pictures import Picture, find, find_by_text, tile_counts
from vtc_llava.probe import Numbers, Probe

PICTURE, IGNORED = -200, -100
"""In the original code, the id that stands for a picture and the label that no loss sees."""
RETURNS = 6
_AT = {role: at for at, role in enumerate((IDS, POSITIONS, MASK, CACHE, LABELS))}


def watched(prepare: Callable[..., Any], root: Any, stage: Any) -> Callable[..., Any]:
    """Wrap the seam of a patched model.

    Args:
        prepare: the method.
        root: the model.
        stage: the engine's entry stage.
    """
    spelling = Spelling(prepare, f"{type(root).__name__}.{prepare.__name__}")
    seam = _Seam(prepare, root, stage)
    watch = between_graphs(seam.watch)

    @functools.wraps(prepare)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = spelling.bind(args, kwargs)
        if given.named.get("images") is None or current().bypassed:  # later steps come through here
            return prepare(*args, **kwargs)
        return watch(args, kwargs, given)

    return call


class _Seam:
    def __init__(self, prepare: Callable[..., Any], root: Any, stage: Any) -> None:
        self.prepare, self.root, self.stage = prepare, root, stage

    def watch(self, args: tuple[Any, ...], kwargs: dict[str, Any], given: Arguments) -> Any:
        """Call it twice: for what it makes, and for what it makes that of."""
        if self.root.training and getattr(self.root.config, "use_pos_skipping", False):
            raise ValueError(
                "config.use_pos_skipping moves positions at random in training, which dropped tokens cannot follow; "
                "set it to False"
            )
        probe, recorded = Probe(), Recording(self.stage.parts, "image", given.named)
        with probe.hearing(), during(recording=recorded):
            made = self.prepare(*args, **kwargs)
        embeds = self._embeds(made, given)
        if embeds is None:  # a step of one token, or nothing to see
            return made
        asked = self._asked(args, kwargs, given)
        with probe.answering():
            _, _, mask, _, numbers, labels = self.prepare(*asked[0], **asked[1])
        if numbers.shape != embeds.shape:
            raise ValueError(
                f"{self._name} made embeddings of shape {tuple(embeds.shape)} of a prompt, and of the same once more "
                f"{tuple(numbers.shape)}: what it does depends on more than its arguments, and is not understood"
            )
        there, labels = mask.bool().cpu(), labels.cpu()
        visual = (labels == IGNORED) & there
        self._check(visual, there, labels, given)
        if visual.any():
            self.stage.prompts.keep(embeds, self._prompt(visual, numbers, probe, recorded, given))
        if made[_AT[MASK]] is None and not there.all():  # else padding would be taken for text
            made = (*made[: _AT[MASK]], mask, *made[_AT[MASK] + 1 :])
        return made

    @property
    def _name(self) -> str:
        return f"{type(self.root).__name__}.{self.prepare.__name__}"

    def _embeds(self, made: Any, given: Arguments) -> Tensor | None:
        """The embeddings in what the seam returned.

        Raises:
            ValueError: it is something else than the original returns.
        """
        if not isinstance(made, tuple) or len(made) != RETURNS:
            count = len(made) if isinstance(made, tuple) else type(made).__name__
            raise ValueError(
                f"{self._name} returned {count} values, where the original LLaVA code returns {RETURNS}: this fork "
                "does more in it than vtc can follow, as forks that prune by themselves do. What works: the original "
                "code"
            )
        *_, embeds, labels = made
        if embeds is None:
            return None
        rows = len(given[IDS])
        if len(embeds) != rows:
            raise ValueError(
                f"{rows} rows went into {self._name}, and {len(embeds)} came out. LLaVA-NeXT cuts a batch to as many "
                "rows as `modalities` has entries, ['image'] by default: give one for each row"
            )
        if labels is not None and given[LABELS] is not None:
            vocabulary = self.root.get_input_embeddings().num_embeddings
            wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= vocabulary))]
            if len(wrong):
                raise ValueError(
                    f"labels have the value {int(wrong[0])}, which is neither {IGNORED} nor a token of the "
                    f"{vocabulary} in the vocabulary"
                )
        return embeds

    def _asked(self, args: tuple[Any, ...], kwargs: dict[str, Any], given: Arguments) -> tuple[list[Any], dict]:
        """The same arguments with column numbers for labels: they come back at text. What was left out is filled in,
        since the seam returns nothing where it is given nothing.
        """
        ids = given[IDS]
        count = torch.arange(ids.shape[1], device=ids.device)
        mask = torch.ones_like(ids) if given[MASK] is None else given[MASK]
        positions = count if given[POSITIONS] is None else given[POSITIONS]
        instead: dict[Role, Tensor] = {LABELS: count.expand_as(ids), POSITIONS: positions, MASK: mask}
        positional, named = list(args), dict(kwargs)
        for role, value in instead.items():
            if _AT[role] < len(positional):
                positional[_AT[role]] = value
            else:
                named[role.names[-1]] = value
        return positional, named

    def _check(self, visual: Tensor, there: Tensor, labels: Tensor, given: Arguments) -> None:
        """Warn of what the original code does silently, and pruning cannot mend."""
        ids = given[IDS]
        attended = torch.ones_like(ids, dtype=torch.bool) if given[MASK] is None else given[MASK].bool()
        texts = ((ids != PICTURE) & attended).sum(1).cpu()
        limit = getattr(self.root.config, "tokenizer_model_max_length", None)
        cut = (there & ~visual).sum(1) < texts
        if limit is not None and visual.shape[1] >= limit:
            cut |= visual[:, limit - 1]
        if cut.any():
            self.stage.say_once(
                f"{self._name} cut row {int(cut.nonzero()[0])} at config.tokenizer_model_max_length={limit} before any "
                "token was pruned: what stood behind is gone. Raise it, or set it to None"
            )
        if given[LABELS] is None and not there[:, -1].all():
            self.stage.say_once(
                "rows of different lengths were padded on the right, and the original LLaVA code would generate behind "
                "the padding, pruned or not; set model.config.tokenizer_padding_side = 'left' to generate"
            )

    def _prompt(self, visual: Tensor, embeds: Tensor, probe: Probe, recorded: Recording, given: Arguments) -> Prompt:
        """The pictures of the prompt, with their structure and what was recorded of them."""
        numbers, counts = Numbers.read(embeds), tile_counts(given.named["images"])
        told = probe.each > 0 and counts is not None and sum(counts) == probe.tiles and _all_told(visual, numbers)
        if told:
            pictures = find(visual, numbers, counts or (), probe.each)
        else:
            attended = torch.ones_like(given[IDS]) if given[MASK] is None else given[MASK]
            expected = ((given[IDS] == PICTURE) & attended.bool()).sum(1).tolist()
            pictures = find_by_text(visual, expected)
        values = self._signals(pictures, probe, recorded, told)
        placeholders, encoded = {}, {}
        for modality in ("image", "video"):
            own = [g for g, one in enumerate(pictures) if self._modality(one, given) == modality]
            if not own:
                continue
            placeholders[modality] = torch.zeros_like(visual)
            for g in own:
                placeholders[modality][pictures[g].row, pictures[g].columns] = True
            found = [self._layout(pictures[g], probe.each, modality) for g in own]
            known = all(one is not None for one in found)
            layouts = [one or Layout.plain(len(pictures[g].columns)) for g, one in zip(own, found, strict=True)]
            signals = {signal: [every[g] for g in own] for signal, every in values.items()}
            encoded[modality] = Encoded(tuple(layouts), signals, known=known)
        return Prompt(placeholders, encoded)

    def _layout(self, picture: Picture, each: int, modality: str) -> Layout | None:
        if picture.entry is None:
            return None
        flat = getattr(self.root.config, "mm_patch_merge_type", "flat") == "flat"
        return layout(picture, each, flat=flat, video=modality == "video")

    def _modality(self, picture: Picture, given: Arguments) -> str:
        """Of LLaVA-NeXT's argument, which has an entry for each of the images."""
        named, entry = given.named.get("modalities"), picture.entry
        named = [named] if isinstance(named, str) else named
        return "video" if named and entry is not None and entry < len(named) and named[entry] == "video" else "image"

    def _signals(
        self, pictures: list[Picture], probe: Probe, recorded: Recording, told: bool
    ) -> dict[Any, list[Tensor]]:
        """What was recorded of the tower, sent the way that the patches went: for each picture [n] or [n, c].

        Raises:
            ValueError: tokens are not patches of the tower.
        """
        every = {signal: torch.cat(parts) for signal, parts in recorded.items()}
        if not every:
            return {}
        # with select_feature="cls_patch" the tower's CLS token is a token, too, and comes first
        extra = (0, self.stage.adapter.tower(self.stage.parts.base, "image").special)
        alike = all(len(v) == probe.tiles and probe.each - v.shape[1] in extra for v in every.values())
        if not (told and alike and all(picture.exact for picture in pictures)):
            raise ValueError(
                f"method {self.stage.method.name!r} goes by single patches of the vision tower "
                f"({', '.join(sorted(s.key for s in every))}), and in this prompt {type(self.root).__name__} makes "
                "tokens of several patches, or encodes without encode_images. What works: methods that read nothing of "
                "the tower, e.g. 'divprune'"
            )
        return {s: [_sent(v, picture, probe.each) for picture in pictures] for s, v in every.items()}


def _all_told(visual: Tensor, numbers: Numbers) -> bool:
    """Whether a number came back of some patch of every run of visual columns."""
    return bool((visual.any(1) == (visual & numbers.patch).any(1)).all())


def _sent(values: Tensor, picture: Picture, each: int) -> Tensor:
    """Of values [tiles, patches, ...] those of a picture's columns, 0 at newlines and CLS tokens."""
    flat = torch.nn.functional.pad(values, (*(0, 0) * (values.dim() - 2), each - values.shape[1], 0)).flatten(0, 1)
    number = (picture.number + picture.first * each).masked_fill(picture.number < 0, -1).to(values.device)
    return torch.where((number < 0).view(-1, *[1] * (flat.dim() - 1)), 0, flat[number])
