"""The methods at the suite's budgets, a bracket around the entry stage, and a prefill made by hand to check them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import vtc
from benchmarks.gpu.cases import error
from benchmarks.gpu.models import Spec
from vtc.methods import make_method

METHODS = ("divprune", "todre", "idpruner", "transprune", "globalcom2", "random")
UNPRUNED = "unpruned"

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}
"""Of logits, by relative norm: batch shape alone changes the order of sums, and many layers of bf16 amplify that."""


def method(name: str, spec: Spec, tokens: int) -> vtc.Method:
    """A method at the budget of a model's row in the table.

    Args:
        name: one of :data:`METHODS`, or any other registered name.
        spec: the model.
        tokens: visual tokens of an image.
    """
    if name == "transprune":
        return vtc.TransPrune()  # its own schedule, as published
    if name in ("globalcom2", "allocate"):  # an integer would be for each part of the image
        return make_method(name, keep=spec.keep / tokens)
    if name == "todre" and spec.name.startswith("Qwen"):
        return vtc.ToDRE(keep=spec.keep, pivot="random")  # no CLS token there
    if name == "chain":
        return vtc.Chain(vtc.DivPrune(keep=0.5), vtc.TransPrune(keep=0.5))
    return make_method(name, keep=spec.keep)


@torch.no_grad()
def prefill(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits [B, V] of the last position, after one forward pass with a cache."""
    return model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]


@contextmanager
def around_entry(model: Any, before: Callable[[], object], after: Callable[[], object]) -> Iterator[None]:
    """Call ``before`` and ``after`` directly around the entry stage of a patched model: select and compact.

    vtc works in a pre-hook of the decoder; a pre-hook in front of it and one behind enclose it and nothing else.
    """

    def hook(call: Callable[[], object]) -> Callable[..., None]:
        def run(*_: Any) -> None:  # returns nothing: what a pre-hook returns would replace the arguments
            call()

        return run

    decoder = model.get_decoder()
    first = decoder.register_forward_pre_hook(hook(before), prepend=True)
    last = decoder.register_forward_pre_hook(hook(after))
    try:
        yield
    finally:
        first.remove()
        last.remove()


class _Seen(Exception):
    """The decoder was reached: what it would have got is known."""


@torch.no_grad()
def by_hand(model: Any, inputs: dict[str, Tensor], columns: Tensor) -> Tensor:
    """Logits [V] of the first prompt with only some of its columns: no patch, the decoder called with what they hold.

    Args:
        model: not patched.
        inputs: of a batch; the first prompt is taken.
        columns: LongTensor [M], of that prompt, ascending.
    """
    from transformers import DynamicCache

    decoder, seen = model.get_decoder(), {}

    def stop(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)
        raise _Seen

    hook = decoder.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(**inputs, use_cache=True, logits_to_keep=1)
    except _Seen:
        pass
    finally:
        hook.remove()
    embeds = seen["inputs_embeds"][:1]
    columns = columns.to(embeds.device)
    positions = seen.get("position_ids")
    if positions is None:
        positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
    batch = min(1, positions.dim() - 2)  # [B, N], or [3, B, N]
    positions = positions[..., :1, :] if batch >= 0 else positions
    # renamed in transformers 5.24
    cache = "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"
    hidden = decoder(
        inputs_embeds=embeds[:, columns],
        position_ids=positions[..., columns],
        **{cache: DynamicCache(config=decoder.config)},  # with a cache, gaps are gaps and not packed prompts
        use_cache=True,
    )[0]
    return model.get_output_embeddings()(hidden[:, -1])[0]


def check(
    spec: Spec, model: Any, inputs: dict[str, Tensor], name: str, tokens: int
) -> tuple[str, str, vtc.Patch | None]:
    """Judge a pruned prefill.

    Kept indices must be ascending, in range and as many as asked for; logits finite. What a method keeps before the
    language model is repeated by hand and compared, and, so that this can fail, so is a prompt with as many other
    tokens, which must differ. Stages inside the language model and merging are not repeated here; tests/ does that.

    Returns:
        Why it is wrong (empty if it is right), what else to say, and the handle, undone.

    Raises:
        ValueError: the method refuses the model.
    """
    chosen = method(name, spec, tokens)
    with vtc.patch(model, chosen) as handle:
        logits = prefill(model, inputs)
        kept, columns = handle.last_keep, handle.last_columns
    assert kept is not None
    if not bool(torch.isfinite(logits).all()):
        return "logits that are not finite", "", handle
    for sample, (images, layouts) in enumerate(zip(kept, handle.last_layouts or [], strict=True)):
        for one, layout in zip(images, layouts, strict=True):
            if not 0 < len(one) < tokens or bool((one.diff() <= 0).any()) or int(one[0]) < 0 or int(one[-1]) >= tokens:
                return f"sample {sample}: {len(one)} kept tokens are no ascending part of {tokens}", "", handle
            wanted = chosen.counts([layout])
            if wanted is not None and (len(one),) != wanted:
                return f"sample {sample}: {len(one)} tokens kept instead of {wanted[0]}", "", handle
    if handle.stage.layers.steps or chosen.merges:
        return "", "kept tokens and finite logits checked", handle
    return *compare(
        model, inputs, logits[0], columns[0] if columns else torch.arange(inputs["input_ids"].shape[1])
    ), handle


def compare(model: Any, inputs: dict[str, Tensor], logits: Tensor, columns: Tensor) -> tuple[str, str]:
    """Why logits [V] are not those of the first prompt's columns [M]; and how near they are."""
    tolerance = TOLERANCE[logits.dtype]
    distance = error(logits, by_hand(model, inputs, columns))
    visual = (inputs["input_ids"][0] == model.config.image_token_id).cpu()
    others = visual.clone()
    others[columns] = False
    many = int(visual[columns].sum())
    wrong = torch.cat([columns[~visual[columns]], others.nonzero()[:many, 0]]).sort().values
    control = error(logits, by_hand(model, inputs, wrong))
    if not distance <= tolerance:
        return f"logits are {distance:.2g} from the same prompt by hand, more than {tolerance:g}", ""
    if not control > 2 * distance:
        return f"the check is blind: other tokens give logits only {control:.2g} away, these {distance:.2g}", ""
    return "", f"{distance:.1e} from by hand, other tokens {control:.1e}"
