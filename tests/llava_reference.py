"""What a model of the original LLaVA code must say on a pruned prompt, by hand: without vtc, without its own seam.

Embeddings, unpadding, newlines, positions and the growing sequence are put together here, one prompt at a time and with
no cache; what is used of the model are its weights, the layers of its language model, and transformers' CLIP tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from llava_models import IDS, MOSAICS, OWN, PATCHES, PICTURE, SIDE, SIZES, TEXT, pictures
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    embeds [N, d], unpruned; spans: for each of its pictures the columns; newlines: for each picture which of its tokens
    are newlines; patches: for each picture the tile and the patch of its tokens, None for newlines; text [N].
    """

    embeds: Tensor
    spans: list[range]
    newlines: list[list[int]]
    patches: list[list[tuple[int, int] | None]]
    text: list[int | None]


def tower_states(model, tiles: Tensor, layer: int = -2) -> Tensor:
    """[tiles, 1 + patches, width] after the layers before ``layer`` + 1."""
    return model.get_vision_tower().vision_tower(tiles, output_hidden_states=True).hidden_states[layer]


def picture(model, index: int, kind: str) -> tuple[list[Tensor], list[tuple[int, int] | None]]:
    """The tokens of a picture, one by one, and which tile and patch each is."""
    tiles = pictures(kind)[index]
    features = model.model.mm_projector(tower_states(model, tiles)[:, 1:])
    tokens: list[Tensor] = list(features[0])
    patches: list[tuple[int, int] | None] = [(0, p) for p in range(PATCHES)]
    if kind == "flat":
        return tokens, patches
    if len(tiles) == 1:
        return [*tokens, model.model.image_newline], [*patches, None]
    across, down = MOSAICS[index]
    width, height = SIZES[index]
    columns, rows = across * SIDE, down * SIDE
    # the picture was fitted into the canvas and padded in the middle of one side; as many rows or columns go again
    if width / height > columns / rows:
        padding = (rows - int(height * columns / width)) // 2
        there = [(y, x) for y in range(padding, rows - padding) for x in range(columns)]
        last = columns - 1
    else:
        padding = (columns - int(width * rows / height)) // 2
        there = [(y, x) for y in range(rows) for x in range(padding, columns - padding)]
        last = columns - padding - 1
    for y, x in there:
        tile, patch = 1 + (y // SIDE) * across + x // SIDE, (y % SIDE) * SIDE + x % SIDE
        tokens.append(features[tile, patch])
        patches.append((tile, patch))
        if x == last:
            tokens.append(model.model.image_newline)
            patches.append(None)
    return tokens, patches


def prompt(model, row: int, kind: str) -> Prompt:
    table = model.model.embed_tokens.weight
    embeds, spans, newlines, origins, text = [], [], [], [], []
    own = iter(OWN[row] if row < len(OWN) else ())
    for token in [*IDS, TEXT][row]:
        if token != PICTURE:
            embeds.append(table[token])
            text.append(token)
            continue
        tokens, patches = picture(model, next(own), kind)
        spans.append(range(len(embeds), len(embeds) + len(tokens)))
        newlines.append([i for i, patch in enumerate(patches) if patch is None])
        origins.append(patches)
        embeds += tokens
        text += [None] * len(tokens)
    return Prompt(torch.stack(embeds), spans, newlines, origins, text)


def columns_left(prompt: Prompt, keep: Sequence[Tensor]) -> list[int]:
    """Columns of text and of the kept tokens."""
    gone = {c for span, kept in zip(prompt.spans, keep, strict=True) for i, c in enumerate(span) if i not in kept}
    return [c for c in range(len(prompt.embeds)) if c not in gone]


def run(model, embeds: Tensor, positions: Tensor, drop_after: int | None = None, left: Sequence[int] = ()) -> Tensor:
    """Logits [M, V] of a sequence [N, d], causal, layer by layer; after so many layers only some columns go on."""
    core = model.model
    hidden, places = embeds[None], positions[None]
    for index in range(len(core.layers) + 1):
        if index == drop_after:
            hidden, places = hidden[:, left], places[:, left]
        if index == len(core.layers):
            return model.lm_head(core.norm(hidden))[0]
        length = hidden.shape[1]
        mask = torch.full((length, length), torch.finfo(hidden.dtype).min).triu(1)[None, None]
        rotary = core.rotary_emb(hidden, places)
        out = core.layers[index](hidden, attention_mask=mask, position_ids=places, position_embeddings=rotary)
        hidden = out[0] if isinstance(out, tuple) else out
    raise AssertionError


def greedy(
    model, prompt: Prompt, keep: Sequence[Tensor], steps: int, compact: bool = False, after: int = 0
) -> tuple[list[int], Tensor]:
    """Tokens and logits [steps, V] of the pruned prompt; tokens leave in front of the language model, or in it."""
    left = columns_left(prompt, keep)
    whole = len(prompt.embeds)
    embeds = prompt.embeds if after else prompt.embeds[left]
    positions = torch.arange(whole) if after else torch.tensor(left)
    next_position = whole
    if compact:
        positions, next_position = torch.arange(len(left)), len(left)
    tokens, logits = [], []
    for _ in range(steps):
        stays = [*left, *range(whole, whole + len(tokens))] if after else ()
        logits.append(run(model, embeds, positions, after or None, stays)[-1])
        tokens.append(int(logits[-1].argmax()))
        embeds = torch.cat([embeds, model.model.embed_tokens.weight[tokens[-1]][None]])
        positions = torch.cat([positions, torch.tensor([next_position])])
        next_position += 1
    return tokens, torch.stack(logits)


def cls_attention(model, index: int, kind: str, layer: int) -> Tensor:
    """What the CLS token looks at, [tiles, patches], in a layer of the tower: from weights, head by head."""
    vision = model.get_vision_tower().vision_tower
    block = vision.encoder.layers[layer]
    entering = tower_states(model, pictures(kind)[index], layer if layer >= 0 else layer - 1)
    hidden, attention = block.layer_norm1(entering), block.self_attn
    heads = vision.config.num_attention_heads
    query, key = attention.q_proj(hidden[:, :1]), attention.k_proj(hidden)
    size = query.shape[-1] // heads
    rows = [
        (query[..., h * size : (h + 1) * size] @ key[..., h * size : (h + 1) * size].mT / size**0.5).softmax(-1)
        for h in range(heads)
    ]
    return torch.stack(rows).mean(0)[:, 0, 1:]


def last_row(model, prompt: Prompt, layer: int) -> Tensor:
    """What the last token of the prompt looks at in a layer of the language model, [N], averaged over heads."""
    core, config = model.model, model.config
    hidden, places = prompt.embeds[None], torch.arange(len(prompt.embeds))[None]
    rotary = core.rotary_emb(hidden, places)
    mask = torch.full((hidden.shape[1],) * 2, torch.finfo(hidden.dtype).min).triu(1)[None, None]
    for block in core.layers[:layer]:
        out = block(hidden, attention_mask=mask, position_ids=places, position_embeddings=rotary)
        hidden = out[0] if isinstance(out, tuple) else out
    block = core.layers[layer]
    normed, size = block.input_layernorm(hidden)[0], config.hidden_size // config.num_attention_heads
    cos, sin = (part[0] for part in rotary)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    group = config.num_attention_heads // config.num_key_value_heads
    queries = block.self_attn.q_proj(normed).split(size, -1)
    keys = block.self_attn.k_proj(normed).split(size, -1)
    rows = [(turned(q)[-1] @ turned(keys[h // group]).T / size**0.5).softmax(-1) for h, q in enumerate(queries)]
    return torch.stack(rows).mean(0)
