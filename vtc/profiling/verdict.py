"""What an estimate comes to, in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from vtc.feed import Picture
from vtc.methods import Method
from vtc.profiling.savings import LOW_CEILING, Savings


def assumptions(
    method: Method,
    picture: Picture,
    per_layer: Sequence[int],
    of_picture: int,
    asked: int | None,
    uneven: bool = False,
) -> Iterator[str]:
    """What was assumed where an estimate cannot know.

    Args:
        method: as it would run.
        picture: what was asked about.
        per_layer: visual tokens in each layer.
        of_picture: visual tokens that the picture makes.
        asked: visual tokens that were asked for instead, if any.
        uneven: frames or windows of the vision tower may lose different shares of their patches.
    """
    if asked is not None:
        yield f"{asked} visual tokens as asked for; {picture} makes {of_picture}."
    if per_layer[-1] == 0:
        first = per_layer.index(0)
        yield f"After layer {first} {method.name} drops all visual tokens or none, by the question: counted as dropped."
    for member in method.members:
        yield from _by_content(member)
    if uneven:
        yield (
            "How patches that leave inside the vision tower spread over frames and windows depends on the picture: "
            "counted as spread evenly, and as if all mergers came behind."
        )


def _by_content(method: Method) -> Iterator[str]:
    """What one method leaves to the picture."""
    if method.content_decides:
        yield f"How many tokens {method.name} keeps depends on the picture: counted with the most, keep={method.keep}."
    if method.name == "pixelprune":
        yield "How many tokens pixelprune keeps depends on the picture: counted for one that no neighbour predicts."
    if method.name == "globalcom2":
        yield "How budgets spread over crops depends on the picture: counted for a picture that shows nothing."


def verdict(e: Savings) -> Iterator[str]:
    """Whether it is worth it, and what limits it."""
    yield (
        f"By arithmetic the first token comes {e.ttft_ratio:.2f}x sooner, the language model's part alone "
        f"{e.llm_ratio:.2f}x."
    )
    yield (
        f"The vision tower is {e.vision_share:.0%} of the work before the first token, projector included: nothing "
        f"after it can beat {e.ceiling:.1f}x with {e.text_tokens} text tokens."
    )
    if e.in_tower:
        saved = 1 - e.before_pruned.flops / e.before.flops
        yield f"Patches that leave inside the tower save {saved:.0%} of that, so that this bound does not hold here."
    elif e.ceiling < LOW_CEILING:
        yield "Only patches that leave inside the tower can pass that, such as with vtc.InTower()."
    if e.halves:
        yield budget_first(e)
    yield from _ridge(e)
    yield from _decoding(e)
    yield from _memory(e)
    gain = min(e.ttft_ratio, e.ttft_time_ratio)
    where = f"on {e.device.name} at batch {e.batch}"
    if gain >= 1.5:
        yield f"Verdict: worth it, up to {gain:.2f}x {where}."
    elif gain >= 1.1:
        yield f"Verdict: a modest gain, up to {gain:.2f}x {where}."
    else:
        yield f"Verdict: not worth it for speed, {gain:.2f}x at best {where}."


def budget_first(e: Savings) -> str:
    """The processor's own budget beside pruning, where there is one."""
    ways = "; ".join(map(str, e.halves))
    return (
        "The processor has a budget of its own, and lowering it comes first: the vision tower gets less to do too. "
        f"Floors of the first token on {e.device.name}: unpruned: {e.visual_tokens} tokens, "
        f"{1e3 * e.ttft_seconds:.3g} ms; {ways}."
    )


def _ridge(e: Savings) -> Iterator[str]:
    each = sum(e.pruned.visual) / len(e.pruned.visual) + e.text_tokens
    full, left = e.batch * (e.visual_tokens + e.text_tokens), e.batch * each
    bound = f"below the {e.ridge_tokens:.0f} that {e.device.name} can multiply while it reads a weight"
    if full <= e.ridge_tokens:
        yield f"The {full} tokens are {bound}: prefill is bound by memory, and fewer tokens cannot make it faster."
    elif left < e.ridge_tokens:
        batch = math.ceil(e.ridge_tokens / each)
        yield f"The {left:.0f} tokens that stay are {bound}: part of the gain is lost, below batch {batch}."


def _memory(e: Savings) -> Iterator[str]:
    for costs, words in ((e.pruned, "even pruned"), (e.full, "unpruned")):
        need = e.weight_bytes + costs.cache_bytes
        if need > e.device.memory:
            yield f"Weights and cache need {_bytes(need)} {words}; {e.device.name} has {_bytes(e.device.memory)}."
            return


def _decoding(e: Savings) -> Iterator[str]:
    gain = f"{e.decode_ratio:.2f}x"
    cache = e.full.cache_bytes
    saved = f"the cache of the prompt shrinks from {_bytes(cache)} to {_bytes(e.pruned.cache_bytes)}"
    if e.decode_ratio < 1.05:
        yield f"Decoding gains nothing to speak of ({gain}), because it reads weights, not cache; {saved}."
    else:
        yield f"A decode step moves {gain} fewer bytes; {saved}."


def _bytes(number: float) -> str:
    return f"{number / 1e9:.3g} GB" if number >= 1e9 else f"{number / 1e6:.3g} MB"
