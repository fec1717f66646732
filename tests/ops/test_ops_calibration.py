"""The bias of calibrated attention: against loops, against an attention over copies, and RESTORE's recorded vectors."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vtc.ops import gathered
from vtc.ops.calibration import distance_bias, size_bias, turns

FOLDERS = [folder / "shared/conformance" for folder in Path(__file__).parents]
FOLDER = next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[0])
RECORDED = FOLDER / "more/restore_SELFDERIVED_a.npz"


def rotary(positions: Tensor, width: int, base: float = 1e4) -> tuple[Tensor, Tensor]:
    """Cos and sin [..., width] as a rotary embedding gives them."""
    angles = positions[..., None].double() * base ** (-torch.arange(0, width, 2).double() / width)
    both = torch.cat([angles, angles], -1)
    return both.cos().float(), both.sin().float()


def test_size_is_what_copies_would_weigh() -> None:
    """A key of size s takes as much attention as s copies of it."""
    torch.manual_seed(0)
    q, k, v = torch.randn(5, 8), torch.randn(4, 8), torch.randn(4, 8)
    size = torch.tensor([1, 3, 1, 7])
    logits = q @ k.T / math.sqrt(8) + size_bias(size)
    copied_k, copied_v = k.repeat_interleave(size, 0), v.repeat_interleave(size, 0)
    copied = (q @ copied_k.T / math.sqrt(8)).softmax(-1) @ copied_v
    torch.testing.assert_close(logits.softmax(-1) @ v, copied)


def test_where_nothing_stands_there_is_no_bias() -> None:
    bias = size_bias(torch.tensor([[0.0, 1.0, math.e]], dtype=torch.float64))
    assert bias.dtype == torch.float32
    torch.testing.assert_close(bias, torch.tensor([[0.0, 0.0, 1.0]]))


@pytest.mark.parametrize("scale", [1.0, 1.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distance_by_loops(scale: float, dtype: torch.dtype) -> None:
    """However the embedding is scaled (YaRN), only angles count."""
    width, at = 16, [0, 1, 2, 9, 40, 300]
    turned = turns(*(scale * part.to(dtype) for part in rotary(torch.tensor(at), width)))
    found = distance_bias(turned[2:], turned)
    assert found.dtype == torch.float32
    for row, m in zip(found, at[2:], strict=True):
        for value, n in zip(row, at, strict=True):
            mean = sum(math.cos((m - n) * 1e4 ** (-2 * j / width)) for j in range(width // 2)) / (width // 2)
            assert value == pytest.approx(math.log(2 - mean), abs=2e-6 if dtype == torch.float32 else 2e-2)
    assert float(found.min()) >= -1e-6  # nothing is taken from anybody


def test_other_constants_and_autocast() -> None:
    turned = turns(*rotary(torch.arange(40), 32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = distance_bias(turned, turned, c=3.0)
    torch.testing.assert_close(found, distance_bias(turned, turned, c=3.0))
    torch.testing.assert_close(found.diagonal(), torch.full((40,), math.log(2.0)))


@pytest.mark.skipif(not RECORDED.is_file(), reason="the recorded vectors are not here")
@pytest.mark.parametrize("case", range(3))
def test_restore_as_recorded(case: int) -> None:
    """Bias and attention of the recorded sequences, and what was merged to make them."""
    data = np.load(RECORDED)
    meta: dict[str, Any] = json.loads(str(data["meta_json"]))[case]
    head = f"{meta['key']}__"
    found = {k.removeprefix(head): torch.from_numpy(data[k]) for k in data.files if k.startswith(head)}
    x = runpy.run_path(str(FOLDER / "check.py"))["features"](meta["kind"], meta["seed"], meta["N"], meta["d"])
    group = torch.full((1, meta["N"]), len(found["anchors"]))
    group[0, found["rest"]] = found["assign"]
    group[0, found["anchors"]] = torch.arange(len(found["anchors"]))
    total, size = gathered(torch.from_numpy(x)[None], group, len(found["anchors"]))
    assert torch.equal(size[0].long(), found["size"])
    torch.testing.assert_close((total / size[..., None])[0].float(), found["merged"], rtol=0, atol=1e-6)
    first, behind = meta["n_text_before"], meta["n_text_after"]
    medians = [first + int(torch.where(group[0] == anchor)[0].median()) for anchor in range(len(size[0]))]
    assert found["median_pos"].tolist() == medians
    at = [*(first + found["kept"]).tolist(), *medians]
    stands = sorted(zip(at, [1] * len(found["kept"]) + size[0].tolist(), strict=True))
    assert found["seq_pos"].tolist() == [
        *range(first),
        *(p for p, _ in stands),
        *(first + meta["N"] + i for i in range(behind)),
    ]
    assert found["seq_size"].tolist() == [1] * first + [s for _, s in stands] + [1] * behind
    length, width = len(found["seq_pos"]), meta["head_dim"]
    turned = turns(*rotary(found["seq_pos"], width, meta["rope_base"]))
    bias = size_bias(found["seq_size"]) + distance_bias(turned, turned, meta["c"])
    torch.testing.assert_close(bias, found["bias"], rtol=0, atol=2e-6)
    draw = np.random.default_rng(meta["seed"] + 100000)
    draw.choice(meta["N"], meta["n_kept"], replace=False)
    q, k, v = (torch.from_numpy(draw.standard_normal((2, length, width)).astype("float32")) for _ in range(3))
    mask = bias.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, found["attn_out"], rtol=0, atol=5e-6)
    without = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert (without - found["attn_out"]).abs().max() > 0.05
