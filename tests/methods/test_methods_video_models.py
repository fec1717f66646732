"""Methods for videos end to end: clips of different lengths, pictures beside them, against pruning by hand."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from reference import decoder_call
from test_contract import check, continued
from test_methods_video import evs, vidcom2
from zoo import FAMILIES, Batch, get_model, make_batch
from zoo.inputs import ANYRES_MAX_1, VIDEO_KIND, AnyRes, Grid, Item
from zoo.models import VIDEO
from zoo.parts import END, STAMP, START

import vtc
from vtc.methods import Method
from vtc.methods.allocate import Allocate
from vtc.methods.dycoke import DyCoke
from vtc.methods.evs import EVS
from vtc.methods.fastvid import FastVID
from vtc.methods.holitom import HoliTom
from vtc.methods.vcast import VCast
from vtc.methods.vidcom2 import VidCom2


@dataclass(frozen=True)
class Clips(Grid):
    """As its base, but videos have three frames, four, five and so on in turn."""

    def _item(self, index: int, is_video: bool, rng: torch.Generator) -> Item:
        if not is_video:
            return super()._item(index, is_video, rng)
        height, width = [(4, 8), (6, 6), (8, 4)][index % 3]
        times = 3 + index % 3
        pixels = {
            "patches": torch.randn(times * height * width, 24, generator=rng),
            "grid": torch.tensor([times, height, width]),
        }
        tokens = height * width // 4
        run = [VIDEO] * tokens
        ids = [STAMP, START, *run, END] * times if self.video == "frames" else [START, *run * times, END]
        return Item(tuple(ids), (times * tokens,), pixels, VIDEO_KIND)


@dataclass(frozen=True)
class Frames(AnyRes):
    """As its base, but a video has five frames."""

    def _video(self, rng: torch.Generator) -> Item:
        pixels = {"frames": torch.randn(5, 3, 8, 8, generator=rng)}
        return Item((VIDEO,) * self.video_tokens, (self.video_tokens,), pixels, VIDEO_KIND)


CAMERAS = {
    "qwen2_5_vl_video": Clips("block"),
    "qwen3_vl_video": Clips("frames"),
    "llava_onevision_video": Frames(ANYRES_MAX_1, True, video_tokens=21),
    "llava_next_video": Frames(video_tokens=20),
    "video_llava": None,
}
PLAIN = [EVS(keep=0.5), VidCom2(keep=0.4), VCast(keep=0.4), DyCoke(keep=0.8), DyCoke(drop=0.7)]
PLAIN += [VidCom2(keep=0.4, budgets="released"), Allocate(keep=0.4, by="frame", frames="curvature")]
MERGING = [FastVID(keep=0.5), FastVID(keep=7, segments=2, tau=-1.0)]
MERGING += [HoliTom(keep=0.4, tau=0.0), HoliTom(keep=7, tau=0.0)]
SAID = (PLAIN[0], MERGING[0], MERGING[3])  # for these also what the model says; it follows from keep-sets and values
SIGNALS = ("llava_next_video", "video_llava")  # whose towers tell what they look at, of frames too


@functools.cache
def batch_of(family: str) -> Batch:
    camera = CAMERAS[family]
    made = FAMILIES[family] if camera is None else dataclasses.replace(FAMILIES[family], camera=camera)
    return make_batch(made, images_per_sample=(1, 2, 0, 1))


@torch.no_grad()
def kept_by(model: Any, inputs: Any, method: Method) -> list[list[list[int]]]:
    model.set_attn_implementation("sdpa")
    with vtc.patch(model, method) as handle:
        model(**inputs)
        return [[kept.tolist() for kept in own] for own in handle.last_keep or [[]]]  # None: nothing visual


def embeddings(model: Any, batch: Batch) -> list[list[torch.Tensor]]:
    """Of each image of each sample, what enters the language model."""
    found = []
    for sample, images in zip(batch.samples, batch.images, strict=True):
        embeds = decoder_call(model, sample)["inputs_embeds"][0]
        found.append([embeds[columns] for columns in images])
    return found


def frames_in(family: str, batch: Batch, row: int) -> int:
    """Of the first item of a sample, a video."""
    if "video_grid_thw" in batch.samples[row]:
        return int(batch.samples[row]["video_grid_thw"][0, 0])
    return batch.samples[row]["pixel_values_videos"].shape[1]


CASES = [(family, method) for family in CAMERAS for method in PLAIN]
CASES += [(family, method) for family in SIGNALS for method in MERGING]


@pytest.mark.parametrize(("family", "method"), CASES, ids=lambda x: x if isinstance(x, str) else x.name)
def test_a_batch_of_clips(family: str, method: Method) -> None:
    """The places are those of vtc.select on what enters the model, or of loops; what is said follows from them."""
    model, batch = get_model(family), batch_of(family)
    together = kept_by(model, batch, method)
    keep, values = [], []
    for row, own in enumerate(embeddings(model, batch)):
        kept, now = [], []
        for number, x in enumerate(own):
            if number:  # a picture
                whole = isinstance(method, Allocate)
                mine = torch.tensor(together[row][1])
                assert whole or mine.tolist() == [*range(len(x))]
                kept.append(mine)
                now.append(x[mine])
                continue
            frames = frames_in(family, batch, row)
            newline = len(x) % frames
            clip = x[: len(x) - newline].unflatten(0, (frames, -1))
            if method.merges:
                found = vtc.select(method, clip, signals=recorded(family, method)[row])
                chosen, merged = found.index, found.features
            else:
                chosen = vtc.select(method, clip).index
                merged = clip.flatten(0, 1)[chosen]
            n = clip.shape[:2].numel()
            if isinstance(method, EVS):
                places = evs(clip.tolist(), max(clip.shape[1], int(0.5 * n)))
                assert chosen.tolist() == sorted(t * clip.shape[1] + p for t, p in places)
            if isinstance(method, VidCom2):
                exact = None if method.budgets == "released" else max(frames, int(0.4 * n))
                places = vidcom2(clip.tolist(), 0.4, exact)
                assert chosen.tolist() == sorted(t * clip.shape[1] + p for t, p in places)
            last = torch.arange(n, len(x))
            kept.append(torch.cat([chosen, last]))
            now.append(torch.cat([merged, x[last]]))
        keep.append(kept)
        values.append(now)
    assert together == [[k.tolist() for k in own] for own in keep]
    assert together == [kept_by(model, sample, method)[0] for sample in batch.samples]
    if method in SAID:
        check(model, batch, method, continued(model, batch, keep, values if method.merges else None))


@functools.cache
def tower_rows(family: str) -> list[dict[str, torch.Tensor]]:
    """Of each clip what the tower looks at, [frames, patches], by an eager pass: CLS of layer -2, the last's mean."""
    from tower_reference import pixels_of, tower_of

    model, batch = get_model(family), batch_of(family)
    pixels, tower = pixels_of(model, batch, "video"), tower_of(model.model, "video")
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            weights = tower(pixels, output_attentions=True).attentions
    finally:
        tower.set_attn_implementation(before)
    rows = {"cls": weights[-2].mean(1)[:, 0, 1:], "received": weights[-1].mean((1, 2))[:, 1:]}
    if family == "llava_next_video":  # pooled 2x2, as its features
        side = {n: r.unflatten(1, (4, 4)) for n, r in rows.items()}
        rows = {n: torch.nn.functional.avg_pool2d(r[:, None], 2)[:, 0].flatten(1) for n, r in side.items()}
    else:  # Video-LLaVA's features have the CLS token's in front
        rows = {n: torch.nn.functional.pad(r, (1, 0)) for n, r in rows.items()}
    clips = sum(len(images) > 0 for images in batch.images)
    chunks = {n: r.chunk(clips) for n, r in rows.items()}
    by_clip = [{n: parts[i] for n, parts in chunks.items()} for i in range(clips)]
    rest = iter(by_clip)
    return [next(rest) if images else {} for images in batch.images]


def recorded(family: str, method: Any) -> list[dict[str, torch.Tensor]]:
    """Of each clip the published signal; both of these families have a CLS token."""
    return [{method.published: row[method.published]} if row else {} for row in tower_rows(family)]
