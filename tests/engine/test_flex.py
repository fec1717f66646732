"""flex_attention under a patch, before and inside the language model: the same logits as sdpa.

torch compiles flex_attention, which needs a working C++ compiler on a CPU and takes a minute a shape; here its eager
form runs, which sees the same block masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from release import RELEASE
from test_layers import FITTING, SCHEDULES
from zoo import FAMILIES, GREEDY, make_batch

import vtc

CACHES: list[dict[str, Any]] = [{}, {"use_cache": False}, {"cache_implementation": "static"}]
# transformers has none for these decoders, and vtc refuses it for the last three (test_bad_input.py).
WITHOUT = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_video", "glm46v", "gemma3", "gemma4", "paligemma")
FLEXIBLE = [name for name in FITTING if name == "qwen3_vl_moe" or not name.startswith(WITHOUT)]


@pytest.fixture(autouse=True)
def eager_flex() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def with_attention(family: str, implementation: str) -> Any:
    model = FAMILIES[family].build()  # of its own: the models of get_model are everybody's
    model.set_attn_implementation({"text_config": implementation} if implementation != "sdpa" else implementation)
    return model


def test_flex_attention_is_refused_elsewhere() -> None:
    for family in set(FITTING) - set(FLEXIBLE):
        with pytest.raises(ValueError, match="flex_attention"):
            vtc.patch(with_attention(family, "flex_attention"), "grid")


@pytest.mark.sampled(newest=2, older=5, by=("family", "schedule", "cache"))
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("schedule", [None, "twice", "entry_and_inside"])
@pytest.mark.parametrize("family", FLEXIBLE)
def test_flex_attention_is_sdpa(family: str, schedule: str | None, cache: dict[str, Any]) -> None:
    if "cache_implementation" in cache and RELEASE < (5, 24):
        pytest.skip("before 5.24, generate asks a block mask for .contiguous(), which it has not, patched or not")
    method = vtc.DivPrune(keep=0.5) if schedule is None else SCHEDULES[schedule]
    logits, sets = [], []
    for implementation in ("sdpa", "flex_attention"):
        model, batch = with_attention(family, implementation), make_batch(family, padding="left")
        with vtc.patch(model, method) as patch:
            out = model.generate(**batch, **GREEDY, **cache, output_logits=True, return_dict_in_generate=True)
            logits.append(torch.stack(out.logits, 1))
            sets.append(patch.last_keep)
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-4)
    for one, other in zip(*sets, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
