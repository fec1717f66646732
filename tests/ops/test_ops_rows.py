"""Rows of attention, one by one."""

from __future__ import annotations

import torch

from vtc.ops.scores import row_attention


def test_rows_one_by_one_are_what_their_mean_is_made_of() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 70, 8, generator=generator), torch.randn(2, 2, 90, 8, generator=generator)
    counted = torch.arange(70) >= torch.tensor([[0], [66]])
    mask = torch.arange(90) >= torch.tensor([[0], [3]])
    each = row_attention(query, key, 0.3, counted=counted, mask=mask, each=True)
    mean = row_attention(query, key, 0.3, counted=counted, mask=mask)
    assert each.shape == (2, 70, 90)
    assert not each[~counted].any()
    torch.testing.assert_close(each.sum(1) / counted.sum(1, keepdim=True), mean)
    for b, t in ((0, 0), (0, 69), (1, 67)):
        logits = torch.stack([query[b, h, t] @ key[b, h // 2].T for h in range(4)]) * 0.3
        seen = (torch.arange(90) <= 20 + t) & mask[b]
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).mean(0)
        torch.testing.assert_close(each[b, t], weights)
