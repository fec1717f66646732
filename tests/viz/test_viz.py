"""Overlays: which pixels stay clear, and whether tokens lie on what they show."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from zoo import get_model, make_batch
from zoo.models import IMAGE

import vtc
import vtc_tinyvlm
from vtc import viz
from vtc.report import Report
from vtc.tokens import Layout, Segment
from vtc.viz import overlay
from vtc.viz.page import page
from vtc.viz.panels import Panel, joined, panels
from vtc.viz.picture import ACCENT, draw, newline_width
from vtc.viz.prompt_images import PromptImage, prompt_images
from vtc.viz.stages import stage_sheet

WHITE = (255, 255, 255)
PLAIN = SimpleNamespace(image_mean=[0.0] * 3, image_std=[1.0] * 3)
"""A processor that hands over colours as they are."""


def white(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), WHITE)


def clear_cells(picture: Image.Image, rows: int, columns: int, x0: int = 0, width: int | None = None) -> set[int]:
    """Cells whose middle is as bright as the white picture was."""
    width = width or picture.width
    found = set()
    for row in range(rows):
        for column in range(columns):
            at = (x0 + int((column + 0.5) * width / columns), int((row + 0.5) * picture.height / rows))
            if picture.getpixel(at) == WHITE:
                found.add(row * columns + column)
    return found


# -------------------------------------------------------------------------------------------------------------- overlay


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (3, 7), (24, 24), (1, 1)])
def test_exactly_the_kept_patches_are_clear(rows, columns):
    keep = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(0))[: max(1, rows * columns // 3)]
    picture = white(96, 80)
    drawn = overlay(picture, keep, (rows, columns))
    assert clear_cells(drawn, rows, columns) == set(keep.tolist())
    assert picture.tobytes() == white(96, 80).tobytes()


def test_small_pictures_grow_by_whole_factors_and_large_ones_stay():
    assert overlay(white(96, 96), [0], (4, 4)).size == (480, 480)
    assert overlay(white(96, 60), [0], (4, 4)).size == (480, 300)
    assert overlay(white(700, 500), [0], (4, 4)).size == (700, 500)
    assert overlay(white(10, 10), [0], (4, 4), size=1).size == (30, 30)  # a patch can always be seen


def test_dropped_patches_keep_a_trace_of_the_picture():
    picture = Image.new("RGB", (96, 96), (200, 30, 30))
    drawn = overlay(picture, [0], (2, 2))
    red, green, _ = drawn.getpixel((360, 360))
    assert green < red < 120
    assert overlay(picture, [0], (2, 2), dim=1.0).getpixel((360, 360)) == (16, 18, 24)


def test_pick_order_is_coloured():
    drawn = overlay(white(96, 96), [5, 0], (4, 4), order=True)
    assert drawn.getpixel((180, 180)) == (253, 231, 37)
    assert drawn.getpixel((60, 60)) == (68, 1, 84)


def test_a_layout_gives_one_panel_for_each_view_and_a_bar_for_each_newline():
    layout = Layout(4 + 9, (Segment("thumbnail", 0, 4, (2, 2)), Segment("crops", 4, 9, (3, 2), newline=True)))
    drawn = overlay(white(96, 96), [1, 4, 6, 8], layout)  # 6 is a newline
    bar = newline_width(480, 2)
    assert drawn.size == (480 + 12 + 480 + bar, 480)
    assert clear_cells(drawn, 2, 2, 0, 480) == {1}
    assert clear_cells(drawn, 3, 2, 492, 480) == {0, 3}
    at = [drawn.getpixel((492 + 480 + bar - 3, y)) for y in (80, 240, 400)]
    assert at[0] == ACCENT
    assert at[1] == at[2] != ACCENT
    frames = Layout(8, (Segment("frame", 0, 4, (2, 2)), Segment("frame", 4, 4, (2, 2))))
    drawn = overlay([white(480, 480), Image.new("RGB", (480, 480))], [0, 4], frames)
    assert drawn.getpixel((120, 120)) == WHITE
    assert drawn.getpixel((492 + 120, 120)) == (0, 0, 0)


def test_tokens_without_a_grid_are_cells_in_their_order():
    drawn = overlay(None, [0, 33], Layout.plain(40), size=480)
    cell = drawn.width // 32
    assert drawn.size == (32 * cell, 2 * cell)
    bright = {
        (x, y)
        for y in range(2)
        for x in range(32)
        if min(drawn.getpixel((x * cell + cell // 2, y * cell + cell // 2))) > 200
    }
    there = {(0, 0), (1, 1)}
    assert bright == there | {(x, 1) for x in range(8, 32)}  # paper, where the second row has ended


def test_crops_of_one_mosaic_are_told_apart_by_seams():
    segment = Segment("crops", 0, 4 * 7, (4, 6), True, (2, 2), (0, 0, 0, 1), (0, 0, 0, 0, 1, 1))
    (panel,) = panels(Layout(28, (segment,)))
    assert (panel.row_seams, panel.column_seams) == ((0.75,), (4 / 6,))
    drawn = draw(panel, Image.new("RGB", (600, 400)), {}, 1)
    assert min(drawn.getpixel((400, 150))) > 200 > 100 > max(drawn.getpixel((200, 150)))
    assert min(drawn.getpixel((50, 300))) > 200 > 100 > max(drawn.getpixel((50, 200)))


def test_tiles_join_to_a_mosaic_in_raster_order():
    tiles = panels(Layout(24, tuple(Segment("crops", 4 * i, 4, (2, 2)) for i in range(6))))
    mosaic = joined(tiles, (2, 3))
    assert (mosaic.rows, mosaic.columns) == (4, 6)
    assert [mosaic.tokens[2, column] for column in range(6)] == [12, 13, 16, 17, 20, 21]
    assert sorted(mosaic.tokens.values()) == list(range(24))


@pytest.mark.parametrize(
    ("keep", "grid", "words"),
    [
        ([4], (2, 2), ["4", "4 tokens"]),
        ([-1], (2, 2), ["-1"]),
        ([0], Layout.plain(4), ["grid", "image=None"]),
        ([0], Layout(0, ()), ["0 tokens"]),
        ([], Layout(0, ()), ["grid"]),
        ([0], Layout(5, (Segment("image", 0, 5, (2, 2)),)), ["5 tokens", "2 x 2"]),
    ],
)
def test_what_cannot_be_drawn_is_named(keep, grid, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        overlay(white(96, 96), keep, grid)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_other_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="dim=2"):
        overlay(white(96, 96), [0], (2, 2), dim=2)
    with pytest.raises(ValueError, match="2 images for 1"):
        overlay([white(9, 9)] * 2, [0], (2, 2))
    with pytest.raises(ValueError, match="at least one drawing"):
        viz.save_animation([], io.BytesIO())


def test_without_pillow_the_import_works_and_drawing_says_what_to_install():
    code = (
        "import sys; sys.modules['PIL'] = None\n"
        "from vtc.viz import overlay\n"
        "try: overlay(None, [0], (1, 1))\n"
        "except ImportError as e: print(e)\n"
        "from vtc.report import Report\n"
        "from vtc.tokens import Layout\n"
        "html = Report(4, (1, 1), 3, 1.0, 2.0, [[Layout.plain(4)]], [(0, [[[1]]])])._repr_html_()\n"
        "print('<table' in html, '<img' in html)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "visual-token-compression[viz]" in out
    assert "True False" in out


def test_without_jinja_a_report_is_escaped_text_and_a_page_says_what_to_install():
    code = (
        "import sys; sys.modules['jinja2'] = None\n"
        "from vtc.report import Report\n"
        "from vtc.viz.page import page\n"
        "report = Report(4, (2, 1), 3, 1.0, 2.0)\n"
        "print(report._repr_html_())\n"
        "try: page('title', report, [])\n"
        "except ImportError as e: print(e)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    text, told = out.splitlines()
    assert text.startswith("<p>visual tokens: 4 -&gt; 2 from layer 0, 1 from layer 1")
    assert "<" not in text[3:-4]
    assert "visual-token-compression[demo]" in told


def test_what_stands_on_a_page_is_escaped():
    drawing = Image.new("RGB", (2, 2))
    text = page("<b>", Report(4, (2, 1), 3, 1.0, 2.0), [('"><script>', drawing)])
    assert text.count("&lt;b&gt;") == 2
    assert "<script>" not in text
    assert "4 -&gt; 2 from layer 0" in text


# --------------------------------------------------------------------------------------------------- what the model saw


def gradient(height: int, width: int, blue: float = 0.6) -> torch.Tensor:
    """[3, H, W]: red grows to the right, green downwards; linear, so that a mean is the colour of the middle."""
    y = ((torch.arange(height) + 0.5) / height * 0.6 + 0.3)[:, None].expand(height, width)
    x = ((torch.arange(width) + 0.5) / width * 0.6 + 0.3)[None].expand(height, width)
    return torch.stack([x, y, torch.full_like(x, blue)])


def patch_means(tiles: torch.Tensor, side: int) -> torch.Tensor:
    """[tiles, 3, H, W] -> mean colour of each patch, raster order, [tiles, patches, 3]."""
    return torch.nn.functional.avg_pool2d(tiles, side).flatten(2).transpose(1, 2)


def cut(picture: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[3, H, W] into rows x columns tiles, raster order."""
    bands = picture.chunk(rows, dim=1)
    return torch.stack([tile for band in bands for tile in band.chunk(columns, dim=2)])


def run(name: str, inputs, method="divprune", **options) -> vtc.Patch:
    with torch.inference_mode(), vtc.patch(get_model(name), method, **options) as handle:
        get_model(name)(**inputs)
    return handle


def check(image: PromptImage, kept: torch.Tensor, colours: torch.Tensor, tolerance: float = 0.006) -> None:
    """Every cell shows its token's colour where it is kept, and something much darker where it is dropped."""
    kept = set(kept.tolist())
    met: set[int] = set()
    for panel, picture in image.views:
        assert picture is not None
        pixels = np.asarray(picture.convert("RGB"), dtype=float) / 255
        drawn = draw(panel, picture, dict.fromkeys(kept), 240)
        wide = drawn.width - (newline_width_of(drawn, panel) if panel.newlines else 0)
        for (row, column), token in panel.tokens.items():
            y0, y1 = (round(i * pixels.shape[0] / panel.rows) for i in (row, row + 1))
            x0, x1 = (round(i * pixels.shape[1] / panel.columns) for i in (column, column + 1))
            shown = pixels[y0:y1, x0:x1].mean((0, 1))
            np.testing.assert_allclose(shown, colours[token].numpy(), atol=tolerance, err_msg=f"{panel.name} {token}")
            # halfway between the middle and a corner: no grid line, outline or seam is there
            x, y = int((column + 0.35) * wide / panel.columns), int((row + 0.35) * drawn.height / panel.rows)
            there = pixels[y * pixels.shape[0] // drawn.height, x * pixels.shape[1] // wide]
            change = abs(np.asarray(drawn.getpixel((x, y))) / 255 - there).max()
            assert change < 0.003 if token in kept else change > 0.1, f"{panel.name} {token}"
            met.add(token)
        met |= set(panel.newlines.values())
    lone = sum(segment.length for segment in image.layout.segments if segment.kind == "newline")
    assert len(met) == image.layout.length - lone


def newline_width_of(drawn: Image.Image, panel: Panel) -> int:
    return next(bar for bar in range(8, 16) if newline_width(drawn.width - bar, panel.columns) == bar)


def test_llava_patches_lie_on_the_cut_picture():
    batch = dict(make_batch("llava", (1, 2)))
    batch["pixel_values"] = torch.stack([gradient(8, 8, blue) for blue in (0.3, 0.6, 0.9)])
    handle = run("llava", batch, keep=0.4)
    for sample, numbers in enumerate([(0,), (1, 2)]):
        for image, kept, number in zip(
            prompt_images(handle, batch, PLAIN, sample), handle.last_keep[sample], numbers, strict=True
        ):
            check(image, kept, patch_means(batch["pixel_values"], 2)[number])


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_anyres_thumbnail_and_crops_lie_where_the_model_packs_them(name):
    batch = dict(make_batch(name, (1, 1, 1, 1)))  # wide, padded, upright and square pictures; OneVision scales two down
    base = get_model(name).model
    first = run(name, batch, keep=0.4)
    for index, layouts in enumerate(first.last_layouts):
        rows, columns = layouts[0].of_kind("crops")[0].crops
        tiles = cut(gradient(8 * rows, 8 * columns), rows, columns)
        batch["pixel_values"][index, : 1 + len(tiles)] = torch.cat([gradient(8, 8, 0.9)[None], tiles])
    handle = run(name, batch, keep=0.4)
    counts = [1 + np.prod(layouts[0].of_kind("crops")[0].crops) for layouts in handle.last_layouts]
    colours = [patch_means(tiles[:count], 2) for tiles, count in zip(batch["pixel_values"], counts, strict=True)]
    options = {"vision_feature_select_strategy": "default"} if name == "llava_next" else {}
    if name == "llava_onevision":
        options["vision_aspect_ratio"] = base.config.vision_aspect_ratio
    packed, _ = base.pack_image_features(colours, batch["image_sizes"], image_newline=torch.zeros(3), **options)
    scaled = 0
    for sample, tokens in enumerate(packed):
        (image,) = prompt_images(handle, batch, PLAIN, sample)
        scaled += np.prod(image.layout.of_kind("crops")[0].grid) < 16
        # scaling down reads the gradient at the middle of four patches, clamped at the border
        check(image, handle.last_keep[sample][0], tokens, 0.006 if name == "llava_next" else 0.03)
    assert scaled == (2 if name == "llava_onevision" else 0)


def test_qwen_patches_in_merge_order_become_the_picture():
    batch = dict(make_batch("qwen2_5_vl", (1, 2)))
    batch["pixel_values"] = torch.rand(batch["pixel_values"].shape, generator=torch.Generator().manual_seed(3)) * 0.6
    batch["pixel_values"] += 0.4
    # both frames of a picture's patch are the picture; four patches in a row make one token
    colours = batch["pixel_values"].view(-1, 4, 3, 2, 2, 2)[..., 0, :, :].mean((1, 3, 4))
    handle = run("qwen2_5_vl", batch, keep=0.4)
    start = 0
    for sample in range(2):
        for image, kept in zip(prompt_images(handle, batch, PLAIN, sample), handle.last_keep[sample], strict=True):
            check(image, kept, colours[start : start + image.layout.length])
            start += image.layout.length
    assert start == len(colours)


def test_qwen_patches_are_those_of_the_processor():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        patch_size=2, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 4096}
    )
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 16, 3), dtype=np.uint8))
    batch = dict(make_batch("qwen2_5_vl", (1,))) | dict(processor(images=picture, return_tensors="pt"))
    assert batch["image_grid_thw"].tolist() == [[1, 12, 8]]
    ids = batch["input_ids"][0]
    at = int((ids == IMAGE).nonzero()[0])
    rest = ids[ids != IMAGE]  # 6 x 4 tokens instead of those of the zoo's picture
    batch["input_ids"] = torch.cat([rest[:at], torch.full((24,), IMAGE), rest[at:]])[None]
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).long()
    (image,) = prompt_images(run("qwen2_5_vl", batch, keep=0.5), batch, processor)
    ((panel, again),) = image.views
    assert (panel.rows, panel.columns) == (6, 4)
    assert abs(np.asarray(again, dtype=int) - np.asarray(picture, dtype=int)).max() <= 1


def test_video_frames_are_a_filmstrip():
    batch = dict(make_batch("qwen2_5_vl_video", (1,)))
    patches = torch.rand(batch["pixel_values_videos"].shape, generator=torch.Generator().manual_seed(3)) * 0.6 + 0.4
    batch["pixel_values_videos"] = patches
    handle = run("qwen2_5_vl_video", batch, keep=0.4)
    (film,) = prompt_images(handle, batch, SimpleNamespace(video_processor=PLAIN))
    assert [panel.name for panel, _ in film.views] == ["frame 1", "frame 2"]
    check(film, handle.last_keep[0][0], patches.view(-1, 4, 3, 2, 2, 2)[..., 0, :, :].mean((1, 3, 4)))

    batch = dict(make_batch("llava_next_video", (1,)))
    frames = torch.stack([gradient(8, 8, 0.3), gradient(8, 8, 0.9)])
    batch["pixel_values_videos"] = frames[None]
    handle = run("llava_next_video", batch, keep=0.4)
    (film,) = prompt_images(handle, batch, SimpleNamespace(video_processor=PLAIN))
    check(film, handle.last_keep[0][0], patch_means(frames, 4).flatten(0, 1))  # frames are pooled 2x2


def test_internvl_tiles_make_the_mosaic_that_looks_like_the_thumbnail():
    batch = dict(make_batch("internvl", (1, 1)))  # one tile; two tiles and a thumbnail
    whole = gradient(24, 12)
    small = torch.nn.functional.avg_pool2d(whole, (2, 1))
    batch["pixel_values"] = torch.stack([gradient(12, 12, 0.3), *cut(whole, 2, 1), small])
    base = get_model("internvl").model
    handle = run("internvl", batch, keep=0.4)
    patches = patch_means(batch["pixel_values"], 2).reshape(4, 6, 6, 3).contiguous()
    tokens = base.pixel_shuffle(patches, scale_factor=base.config.downsample_ratio).view(4, 9, 4, 3).mean(2)
    (one,), (tiled,) = (prompt_images(handle, batch, PLAIN, sample) for sample in range(2))
    check(one, handle.last_keep[0][0], tokens[0])
    assert [panel.name for panel, _ in tiled.views] == ["crops 2x1", "thumbnail"]
    assert [picture.size for _, picture in tiled.views] == [(12, 24), (12, 12)]
    check(tiled, handle.last_keep[1][0], tokens[1:].flatten(0, 1))


@pytest.mark.parametrize("name", ["llava_pixtral", "mistral3"])
def test_pictures_padded_to_the_largest_lose_the_padding(name):
    batch = dict(make_batch(name, (1, 2)))
    handle = run(name, batch, keep=0.5)
    sizes = [
        tuple(picture.size[::-1])
        for s in range(2)
        for i in prompt_images(handle, batch, PLAIN, s)
        for _, picture in i.views
    ]
    assert sizes == [tuple(size) for size in batch["image_sizes"].tolist()]


def test_idefics_tiles_are_images_of_their_own_without_the_black_ones():
    batch = dict(make_batch("idefics3", (2, 1)))
    batch["pixel_values"] = batch["pixel_values"].abs().clamp(0.05, 1) * (batch["pixel_values"] != 0)
    handle = run("idefics3", batch, keep=0.5)
    flat = [tile for sample in batch["pixel_values"] for tile in sample if tile.any()]
    found = [i.views[0][1] for sample in range(2) for i in prompt_images(handle, batch, PLAIN, sample)]
    assert len(found) == len(flat) < batch["pixel_values"].shape[:2].numel()
    for picture, tile in zip(found, flat, strict=True):
        assert abs(np.asarray(picture) / 255 - tile.permute(1, 2, 0).numpy()).max() < 0.003


def test_what_has_no_grid_has_no_picture_but_is_drawn():
    batch = dict(make_batch("gemma4", (1,)))
    handle = run("gemma4", batch, keep=0.5)
    (image,) = prompt_images(handle, batch)
    ((panel, picture),) = image.views
    assert picture is None
    assert not panel.placed
    assert viz.show(handle, batch).width > 100


def test_inputs_of_another_prompt_are_refused():
    batch = dict(make_batch("llava", (2,)))
    handle = run("llava", batch, keep=0.5)
    with pytest.raises(ValueError, match="do not fit"):
        viz.show(handle, {"pixel_values": batch["pixel_values"][:1]})
    with pytest.raises(ValueError, match="sample=1"):
        viz.show(handle, batch, sample=1)
    with vtc.patch(get_model("llava"), "divprune") as fresh, pytest.raises(ValueError, match="nothing to show"):
        viz.show(fresh, batch)


# ------------------------------------------------------------------------------------------------------- order of picks


def ordered(name: str, method, **options):
    handle = run(name, dict(make_batch(name, (1, 2))), method, **options)
    return handle, handle.last_order


def test_the_order_of_a_large_run_begins_with_every_smaller_run():
    _, order = ordered("llava", "divprune", keep=8)
    for count in (1, 3, 5):
        small, _ = ordered("llava", "divprune", keep=count)
        for sample in range(2):
            for picks, kept in zip(order[sample], small.last_keep[sample], strict=True):
                assert sorted(picks[:count].tolist()) == kept.tolist()
    assert [len(picks) for own in order for picks in own] == [8, 8, 8]


def test_newlines_that_are_kept_unasked_have_no_place_in_the_order():
    handle, order = ordered("llava_next", "divprune", keep=0.3, newlines="keep")
    for sample, own in enumerate(order):
        for picks, kept, layout in zip(own, handle.last_keep[sample], handle.last_layouts[sample], strict=True):
            assert set(picks.tolist()) == set(kept.tolist()) - set(layout.newlines())
            assert picks.tolist() != sorted(picks.tolist())


def test_a_chain_has_the_order_of_its_first():
    chain = vtc.Chain(vtc.DivPrune(keep=0.5), vtc.TransPrune(layers=(1, 2), ratios=(0.75, 0.5)))
    _, order = ordered("llava", chain)
    _, first = ordered("llava", "divprune", keep=0.5)
    assert [o.tolist() for own in order for o in own] == [o.tolist() for own in first for o in own]


@pytest.mark.parametrize("method", [vtc.GlobalCom2(keep=0.5), vtc.DivPrune(keep=1.0)])
def test_where_there_is_no_order_none_is_told(method):
    _, order = ordered("llava_next", method)
    assert order == [[None], [None, None]]


# ------------------------------------------------------------------------------------------------------- whole prompts


@pytest.fixture(scope="module")
def tinyvlm():
    model, processor = vtc_tinyvlm.load()
    question = vtc_tinyvlm.evaluation_questions(1)[0]
    return model, processor, processor(images=question.image, text=question.prompt, return_tensors="pt")


def shown(tinyvlm, method, **options):
    model, processor, inputs = tinyvlm
    with torch.inference_mode(), vtc.patch(model, method, **options) as handle:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    return handle, (handle, inputs, processor)


def block(drawn: Image.Image, number: int, size: int) -> Image.Image:
    """The panel of one of several drawings of a single square picture: margin, heading, gap."""
    x, y = 12 + number * (size + 20), 12 + 22
    return drawn.crop((x, y, x + size, y + size))


def test_every_stage_inside_the_model_has_a_drawing(tinyvlm):
    handle, call = shown(tinyvlm, "transprune", keep=0.25)
    drawn = viz.show(*call)
    ((panel, picture),) = prompt_images(*call)[0].views
    assert len(handle.last_stages) == 4
    for number, (_, kept) in enumerate(handle.last_stages):
        expected = draw(panel, picture, dict.fromkeys(kept[0][0].tolist()), 300)
        assert block(drawn, number, expected.width).tobytes() == expected.tobytes()
    frames = viz.animate(*call)
    assert len(frames) == 5  # all tokens come first
    assert len({frame.size for frame in frames}) == 1


def test_a_stage_that_removes_everything_is_dark_all_over(tinyvlm):
    handle, call = shown(tinyvlm, vtc.ToDRE(keep=0.25, stage2=True, tau=1.0))
    assert [len(kept[0][0]) for _, kept in handle.last_stages] == [36, 0]
    end = np.asarray(block(viz.show(*call), 1, 480))
    assert not (end == np.array(ACCENT)).all(-1).any()


def test_picks_appear_in_their_order(tinyvlm):
    handle, call = shown(tinyvlm, "divprune", keep=0.25)
    frames = viz.animate(*call, order=True)
    assert len(frames) == 13
    ((panel, picture),) = prompt_images(*call)[0].views
    order = handle.last_order[0][0].tolist()
    for count, frame in ((3, frames[1]), (18, frames[6]), (36, frames[12])):
        ranks = {token: rank for rank, token in enumerate(order[:count])}
        expected = draw(panel, picture, ranks, 480, True, last=35)
        assert block(frame, 0, 480).tobytes() == expected.tobytes()
    buffer = io.BytesIO()
    viz.save_animation(frames, buffer)
    movie = Image.open(buffer)
    assert (movie.format, movie.n_frames, movie.size) == ("GIF", 13, frames[0].size)
    x, y = 12 + 40 * (order[0] % 12) + 20, 34 + 40 * (order[0] // 12) + 20
    movie.seek(12)
    assert movie.convert("RGB").getpixel((x, y)) == (253, 231, 37)  # the palette has the colours of the order


def test_a_report_is_html_with_bars_and_cells(tinyvlm):
    handle, _ = shown(tinyvlm, "transprune", keep=0.25)
    report = handle.report()
    text = report._repr_html_()
    assert re.findall(r">(\d+(?: - \d+)?)</td>", text)[::2] == ["0", "1", "2", "3 - 4"]
    shares = [float(share) for share in re.findall(r"width: ([\d.]+)%; height", text)]
    each = [len(kept[0][0]) for _, kept in handle.last_stages]
    assert shares == pytest.approx([100 * n / 144 for n in each], abs=0.06)
    (found,) = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", text)
    cells = Image.open(io.BytesIO(base64.b64decode(found)))
    images = [PromptImage(layout, tuple((p, None) for p in panels(layout))) for layout in handle.last_layouts[0]]
    assert cells.tobytes() == stage_sheet(images, [(a, kept[0]) for a, kept in handle.last_stages], size=200).tobytes()
    bright = (np.asarray(block(cells, 3, 204)) > 200).all(-1).mean()  # 12 x 17 pixels
    assert 0.1 < bright < each[3] / 144
    assert report == handle.report()  # what is drawn takes no part in comparisons
