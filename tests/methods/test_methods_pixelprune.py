"""PixelPrune: its rule by hand, on pictures in which units are copies of their neighbours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from zoo import GREEDY, get_model, make_batch

import vtc
from vtc.methods.base import Stage
from vtc.methods.pixelprune import predicted
from vtc.places import Entry, Tower
from vtc.signals import Pixels
from vtc.tokens import Layout


def kept_by_hand(x: Tensor, tau: float) -> list[int]:
    """Of cells [rows, columns, c], one by one."""

    def like(a: Tensor, b: Tensor) -> bool:
        return all(abs(p - q) <= tau for p, q in zip(a.tolist(), b.tolist(), strict=True))

    kept = []
    rows, columns = x.shape[:2]
    for i in range(rows):
        for j in range(columns):
            if i == j == 0:
                guess = None
            elif i == 0:
                guess = x[i, j - 1]
            elif j == 0:
                guess = x[i - 1, j]
            else:
                left, top, corner = x[i, j - 1], x[i - 1, j], x[i - 1, j - 1]
                guess = top if like(corner, left) and not like(corner, top) else left
            if guess is None or not like(x[i, j], guess):
                kept.append(i * columns + j)
    return kept


@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (5, 1), (4, 7), (9, 9)])
def test_the_rule(shape: tuple[int, int], tau: float) -> None:
    for seed in range(20):
        x = torch.randint(0, 3, (*shape, 2), generator=torch.Generator().manual_seed(seed)).float()
        found = predicted(x, tau)
        assert (~found).flatten().nonzero()[:, 0].tolist() == kept_by_hand(x, tau)


def test_an_edge_runs_on() -> None:
    """Three areas: a token stays only where one begins."""
    picture = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [2, 2, 2, 2, 2], [2, 2, 2, 2, 2]]).float()[..., None]
    assert (~predicted(picture, 0.0)).nonzero().tolist() == [[0, 0], [0, 3], [2, 0]]


def drawn(batch: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """The same pictures in three colours."""
    rng, found = torch.Generator().manual_seed(seed), dict(batch)
    for name in ("pixel_values", "pixel_values_videos"):
        if name in batch:
            units = torch.randint(0, 3, (len(batch[name]) // 4, 1, 1), generator=rng).float()
            found[name] = units.expand(-1, 4, batch[name].shape[1]).reshape(batch[name].shape)
    return found


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl_video", "qwen3_vl_video", "qwen3_5", "glm46v_video"])
def test_what_stays_is_what_pixels_say(family: str) -> None:
    model, batch = get_model(family), make_batch(family)
    given = drawn(batch)
    with vtc.patch(model, vtc.PixelPrune()) as p:
        model.generate(**given, **GREEDY)
        kept = p.last_keep
    expected = {}
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        at = 0
        for times, height, width in given.get(f"{kind}_grid_thw", torch.zeros(0, 3)).tolist():
            rows, columns, own = height // 2, width // 2, []
            for frame in range(times):
                units = given[name][at : at + height * width : 4]
                own += [frame * rows * columns + i for i in kept_by_hand(units.unflatten(0, (rows, columns)), 0.0)]
                at += height * width
            expected.setdefault(kind, []).append(own)
    images = [k.tolist() for kepts in kept for k in kepts]
    assert len(images) == sum(map(len, expected.values()))
    assert sorted(images) == sorted([k for found in expected.values() for k in found])
    assert 0 < sum(map(len, images)) < sum(len(c) for columns in batch.images for c in columns)


def test_of_different_pictures_everything_stays() -> None:
    model, batch = get_model("qwen3_vl"), make_batch("qwen3_vl")
    before = model.generate(**batch, **GREEDY)
    with vtc.patch(model, vtc.PixelPrune()) as p:
        assert torch.equal(model.generate(**batch, **GREEDY), before)
        assert all(len(k) == len(c) for ks, cs in zip(p.last_keep, batch.images, strict=True)
                   for k, c in zip(ks, cs, strict=True))  # fmt: skip


def test_pixels_are_refused_elsewhere() -> None:
    with pytest.raises(ValueError, match=r"needs 'pixels', which this .* cannot give.*vtc\.Adaptive"):
        vtc.patch(get_model("llava"), vtc.PixelPrune())

    @vtc.register_method
    class Late(vtc.PixelPrune):
        name = "pixels_behind"

        def stages(self, model: object) -> tuple[Stage, ...]:
            return (Stage(Entry(), needs=(Pixels(),)),)

    @vtc.register_method
    class Deep(vtc.PixelPrune):
        name = "pixels_inside"

        def stages(self, model: object) -> tuple[Stage, ...]:
            return (Stage(Tower(2), needs=(Pixels(),)),)

    with pytest.raises(ValueError, match="needs 'pixels'"):
        vtc.patch(get_model("qwen3_vl"), Late())
    vtc.patch(get_model("qwen3_vl"), Deep()).unpatch()  # pixels are known in front of every block


@pytest.mark.parametrize("tau", [-0.1, float("nan"), "none"])
def test_tau(tau: object) -> None:
    with pytest.raises((ValueError, TypeError), match="tau="):
        vtc.PixelPrune(tau=tau)  # type: ignore[arg-type]


def test_bare_tensors() -> None:
    features, pixels = torch.rand(6, 4), torch.tensor([0.0, 0, 1, 0, 0, 0])[:, None]
    layout = Layout.plain(6, (2, 3))
    assert vtc.select("pixelprune", features, signals={"pixels": pixels}, layout=layout).index.tolist() == [0, 2, 5]
    with pytest.raises(ValueError, match="pixels"):
        vtc.select("pixelprune", features)
