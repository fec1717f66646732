"""`vtc estimate`: its arithmetic against torch's FLOP counter, real processors, real prunings and published values."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers as tf
import zoo
from PIL import Image
from release import CACHE
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import vtc
from vtc.cli import app
from vtc.costs import DELTA_CHUNK, Decoder
from vtc.devices import DEVICES, Device
from vtc.feed import Picture
from vtc.models import resolve
from vtc.profiling.encoder import Encoder
from vtc.profiling.estimate import Estimate, estimate
from vtc.profiling.feed import feed_of
from vtc.profiling.towers import tower_of

# ----------------------------------------------------------------------------------------- against torch's FLOP counter

ANY_SIZE = {"size": {"shortest_edge": 1, "longest_edge": 10**6}}
WHOLE = {"do_image_splitting": False}
SMALL = {"max_soft_tokens": 12}

# The picture behind the second sample of a zoo batch, and what a processor would have to be told to make it.
PICTURES = {
    "llava": (Picture(8, 8), {}),
    "llava_adjacent": (Picture(8, 8), {}),
    "llava_pixtral": (Picture(6, 8), {}),
    "llava_mqt": (Picture(8, 8), {}),
    "vipllava": (Picture(8, 8), {}),
    "llava_next": (Picture(16, 4), {}),
    "llava_next_video_image": (Picture(16, 4), {}),
    "llava_next_video": (Picture(8, 8, 2), {}),
    "llava_onevision": (Picture(16, 4), {}),
    "llava_onevision_video": (Picture(8, 8, 2), {}),
    "video_llava": (Picture(8, 8, 2), {}),
    "qwen2_vl": (Picture(12, 12), ANY_SIZE),
    "qwen2_5_vl": (Picture(12, 12), ANY_SIZE),
    "qwen2_5_vl_video": (Picture(12, 12, 4), ANY_SIZE),
    "qwen3_vl": (Picture(12, 12), ANY_SIZE),
    "qwen3_vl_video": (Picture(12, 12, 4), ANY_SIZE),
    "qwen3_vl_moe": (Picture(12, 12), ANY_SIZE),
    "qwen3_5": (Picture(12, 12), ANY_SIZE),
    "glm46v": (Picture(12, 12), ANY_SIZE),
    "glm46v_video": (Picture(12, 12, 4), ANY_SIZE),
    "internvl": (Picture(24, 12), {}),
    "idefics3": (Picture(12, 12), WHOLE),
    "smolvlm": (Picture(12, 12), WHOLE),
    "mistral3": (Picture(12, 16), {}),
    "ministral3": (Picture(12, 16), {}),
    "gemma3": (Picture(16, 16), {}),
    "gemma3_window8": (Picture(16, 16), {}),
    "gemma4": (Picture(16, 12), SMALL),
    "gemma4_bidirectional": (Picture(16, 12), SMALL),
    "paligemma": (Picture(8, 8), {}),
}


def test_every_family_is_compared():
    assert PICTURES.keys() == zoo.FAMILIES.keys()
    assert {zoo.get_model(name).config.model_type for name in PICTURES} == set(vtc.list_models())


def eager(name):
    """A copy whose attention and experts are plain matrix products, which is what the counter can see."""
    model = copy.deepcopy(zoo.get_model(name))
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def uncounted(decoder, parts):
    """FLOPs per token of the one product that torch's counter does not know: the delta rule's triangular solve."""
    config = parts.decoder.config
    linear = sum(layer.recurrence > 0 for layer in decoder.layers)
    if not linear:
        return 0
    widths = config.linear_key_head_dim + config.linear_value_head_dim
    return linear * config.linear_num_value_heads * DELTA_CHUNK * widths


@pytest.mark.parametrize("name", PICTURES)
@torch.no_grad()
def test_flops_are_those_that_torch_counts(name):
    model = eager(name)
    _, parts = resolve(model)
    picture, settings = PICTURES[name]
    sample = zoo.make_batch(name, (1, 1), padding="none").samples[1]
    ids = sample["input_ids"]
    if name == "llava_mqt":
        model(**sample, logits_to_keep=1)  # what its queries attend to is computed once
    with FlopCounterMode(display=False, depth=None) as counter:
        model(**sample, logits_to_keep=1)
    counted = {path.partition(".")[2]: sum(ops.values()) for path, ops in counter.get_flop_counts().items()}
    paths = {id(module): path for path, module in model.named_modules()}

    feed = feed_of(parts, picture, settings)
    newline = name == "llava_onevision_video"  # which the adapter adds
    assert sum(feed.lengths) + newline == sum(int((ids == token).sum()) for token in {*parts.placeholders.values()})

    encoder, decoder = Encoder.of(parts, picture.modality), Decoder.of(parts.decoder, model)
    tower = counted[paths[id(tower_of(parts, picture.modality))]]
    averaging = 0  # Gemma4 averages patches by a product with one-hot rows, which is no work of the model's
    if name.startswith("gemma4"):
        averaging = 2 * feed.patches * feed.lengths[0] * parts.config.vision_config.hidden_size
    assert encoder.vision(feed).flops == pytest.approx(tower - averaging, rel=1e-3)

    # The counter counts all of n x n in the language model, and every column of a window.
    n = ids.shape[1]
    whole = sum(4 * (n * n - n * n / 2) * layer.width for layer in decoder.layers)
    cut = sum(2 * max(0, n - layer.window) ** 2 * layer.width for layer in decoder.layers if layer.window is not None)
    solve = uncounted(decoder, parts) * -(-n // DELTA_CHUNK) * DELTA_CHUNK
    head = counted[paths[id(model.get_output_embeddings())]]
    ours = decoder.prefill([n] * len(decoder.layers)).flops + whole + cut - solve
    assert ours == pytest.approx(counted[paths[id(parts.decoder)]] + head, rel=1e-3)

    projected = counter.get_total_flops() - tower - head - counted[paths[id(parts.decoder)]]
    assert encoder.projection(feed).flops == pytest.approx(projected, rel=1e-3)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen3_vl", "glm46v", "qwen3_5"])
@torch.no_grad()
def test_flops_are_those_that_torch_counts_where_patches_leave_inside_the_tower(name):
    model, (picture, settings) = eager(name), PICTURES[name]
    method = vtc.InTower(rule=vtc.Random(), keep=0.5, after=1)  # whose draw is no product of matrices
    sample = zoo.make_batch(name, (1, 1), padding="none").samples[1]
    with vtc.patch(model, method), FlopCounterMode(display=False, depth=None) as counter:
        model(**sample, logits_to_keep=1)
    counted = {path.partition(".")[2]: sum(ops.values()) for path, ops in counter.get_flop_counts().items()}
    tower = tower_of(resolve(model)[1], picture.modality)
    e = estimate(model, (picture.width, picture.height), method=method, text=8, settings=settings)
    found = counted[next(path for path, module in model.named_modules() if module is tower)]
    early = 0  # a merger that runs before anything leaves, and is counted as if it came behind
    if name == "qwen3_vl":
        early = 2 * 5 * 128 * (128 + 32)  # of 9 units, 5 leave
    assert e.vision_pruned.flops == pytest.approx(found - early, rel=1e-3)
    assert e.vision_pruned.flops < e.vision.flops
    assert not any("frames and windows" in note for note in e.notes)


def test_units_that_leave_are_spread_evenly_over_frames_and_windows():
    config = CONFIGS["qwen2.5-vl-3b"]()
    none, half = (
        estimate(config, (1036, 1036), method=vtc.InTower(keep=keep, rule="diverse", after=8)) for keep in (1.0, 0.5)
    )
    assert none.vision_pruned.flops == none.vision.flops
    assert 0.6 < half.vision_pruned.flops / half.vision.flops < 0.65  # 8 of 32 blocks whole, the others half and less
    assert half.pruned.visual[0] == half.visual_tokens // 2
    assert any("frames and windows" in note for note in half.notes)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl_moe", "gemma3_window8", "gemma4", "glm46v"])
@torch.no_grad()
def test_decode_flops_and_cache_are_those_of_a_real_step(name):
    model = eager(name)
    _, parts = resolve(model)
    decoder = Decoder.of(parts.decoder, model)
    sample = zoo.make_batch(name, (1, 1), padding="none").samples[1]
    tokens = [sample["input_ids"].shape[1]] * len(decoder.layers)
    cache = getattr(model(**sample, use_cache=True, logits_to_keep=1), CACHE)
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert decoder.cache_bytes(tokens) == 2 * numbers
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.tensor([[30]]), use_cache=True, **{CACHE: cache})
    # some releases turn positions into angles by a product, which is not counted
    assert decoder.decode(tokens).flops == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_linear_attention_keeps_a_state_instead_of_a_cache():
    model = zoo.get_model("qwen3_5")
    linear, full = Decoder.of(model.get_decoder(), model).layers[:2]
    assert linear.stored(10) == linear.stored(1000) == 4 * 8 * 8 + 64 * 4  # recurrent and convolution state
    assert full.stored(1000) == 100 * full.stored(10)


def test_a_pooling_head_is_counted_where_the_config_has_one():
    def cost(head):
        vision = tf.SiglipVisionConfig(
            vision_use_head=head, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, image_size=8, patch_size=2,
        )  # fmt: skip
        text = tf.Qwen2Config(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
        torch.manual_seed(0)
        model = tf.LlavaForConditionalGeneration(tf.LlavaConfig(vision_config=vision, text_config=text)).eval()
        _, parts = resolve(model)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            tower_of(parts).set_attn_implementation("eager")
            tower_of(parts)(torch.zeros(1, 3, 8, 8))
        return Encoder.of(parts).vision(feed_of(parts, Picture(8, 8))).flops, counter.get_total_flops()

    (without, counted), (with_head, counted_head) = cost(False), cost(True)
    assert without == counted
    # scores and sums of a fused attention may escape the counter; they are 4 x 16 x 32
    assert with_head - without == pytest.approx(counted_head - counted, abs=4 * 16 * 32)
    assert with_head > without


# ----------------------------------------------------------------------------------------------------- published values


def clip_l():
    return tf.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip


def vicuna():
    return tf.LlamaConfig(
        vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32,
    )  # fmt: skip


def qwen2(width, hidden, layers, heads, groups, vocabulary=152064):
    return {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": groups,
    }  # fmt: skip


def qwen2_5_vl(text):
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": text["hidden_size"],
    }  # fmt: skip
    return tf.Qwen2_5_VLConfig(vision_config=vision, text_config=text)


def internvl(text):
    vision = tf.InternVLVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=[448, 448],
        patch_size=[14, 14],
    )  # fmt: skip
    return tf.InternVLConfig(vision_config=vision, text_config=tf.Qwen2Config(**text))


def llava_onevision_7b():
    vision = tf.SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=26, num_attention_heads=16, image_size=384,
        patch_size=14, vision_use_head=False,
    )  # fmt: skip
    return tf.LlavaOnevisionConfig(vision_config=vision, text_config=tf.Qwen2Config(**qwen2(3584, 18944, 28, 28, 4)))


def qwen3_vl_8b():
    vision = {
        "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16,
        "out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24],
    }  # fmt: skip
    return tf.Qwen3VLConfig(
        vision_config=vision, text_config=qwen2(4096, 12288, 36, 32, 8, vocabulary=151936) | {"head_dim": 128}
    )


CONFIGS = {
    "llava-1.5-7b": lambda: tf.LlavaConfig(vision_config=clip_l(), text_config=vicuna()),
    "llava-next-7b": lambda: tf.LlavaNextConfig(vision_config=clip_l(), text_config=vicuna()),
    "llava-onevision-7b": llava_onevision_7b,
    "qwen2.5-vl-7b": lambda: qwen2_5_vl(qwen2(3584, 18944, 28, 28, 4)),
    "qwen2.5-vl-3b": lambda: qwen2_5_vl(qwen2(2048, 11008, 36, 16, 2, vocabulary=151936)),
    "qwen3-vl-8b": qwen3_vl_8b,
    "internvl3-8b": lambda: internvl(qwen2(3584, 18944, 28, 28, 4, vocabulary=151674)),
    "internvl3-1b": lambda: internvl(qwen2(896, 4864, 24, 14, 2, vocabulary=151674)),
}
NEXT = {"image": (672, 672), "tokens": 2880}
VIDEO = {"image": (384, 384), "frames": 32}
SQUARE, TILES = {"image": (1036, 1036)}, {"image": (4 * 448, 3 * 448)}

# The check table of the cost model: visual tokens, vision and prefill in TFLOP, kept, ratio with vision and without,
# ceiling. It counts the 23 layers of LLaVA's tower whose output is used. transformers runs 24, and so does vtc: of
# those rows vision is 4 % higher, ceilings up to 2.4 % lower and ratios up to 1.5 % lower.
TABLE = [
    ("llava-1.5-7b", {"image": (336, 336)}, 576, 0.39, 8.40, 192, 2.36, 2.52, 7.2),
    ("llava-1.5-7b", {"image": (336, 336)}, 576, 0.39, 8.40, 128, 3.04, 3.36, 7.2),
    ("llava-1.5-7b", {"image": (336, 336)}, 576, 0.39, 8.40, 64, 4.28, 5.05, 7.2),
    ("llava-next-7b", NEXT, 2880, 1.95, 40.4, 640, 3.78, 4.37, 15.2),
    ("llava-next-7b", NEXT, 2880, 1.95, 40.4, 320, 6.08, 8.06, 15.2),
    ("llava-next-7b", NEXT, 2880, 1.95, 40.4, 160, 8.71, 13.9, 15.2),
    ("llava-onevision-7b", VIDEO, 6273, 21.3, 90.8, 0.25, 2.60, 4.16, 5.1),  # 32 x 196, and one newline
    ("llava-onevision-7b", VIDEO, 6273, 21.3, 90.8, 0.10, 3.68, 9.96, 5.1),
    ("qwen2.5-vl-7b", SQUARE, 1369, 7.69, 19.1, 0.50, 1.53, 1.94, 3.1),
    ("qwen2.5-vl-7b", SQUARE, 1369, 7.69, 19.1, 0.25, 2.06, 3.58, 3.1),
    ("qwen2.5-vl-7b", SQUARE, 1369, 7.69, 19.1, 0.10, 2.60, 7.26, 3.1),
    ("qwen2.5-vl-3b", SQUARE, 1369, 7.69, 8.26, 0.25, 1.60, 3.62, 2.0),
    ("qwen3-vl-8b", {"image": (1024, 1024)}, 1024, 5.78, 15.5, 0.25, 2.07, 3.45, 3.2),
    ("internvl3-8b", TILES, 3328, 9.57, 46.6, 0.25, 2.62, 3.93, 5.4),
    ("internvl3-8b", TILES, 3328, 9.57, 46.6, 0.10, 3.80, 8.93, 5.4),
    ("internvl3-1b", TILES, 3328, 9.39, 2.92, 0.10, 1.27, 10.0, 1.3),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]}-{row[5]}")
def test_check_table(row):
    name, asked, tokens, vision, prefill, keep, ratio, alone, ceiling = row
    e = estimate(CONFIGS[name](), **asked, keep=keep, text=64)
    assert e.visual_tokens == tokens
    assert e.before.flops / 1e12 == pytest.approx(vision, rel=0.05)
    assert e.full.prefill.flops / 1e12 == pytest.approx(prefill, rel=0.005)
    assert e.ttft_ratio == pytest.approx(ratio, rel=0.02)
    assert e.llm_ratio == pytest.approx(alone, rel=0.01)
    assert e.ceiling == pytest.approx(ceiling, rel=0.03)


def test_the_ridges_of_the_devices():
    ridges = {name: round(device.ridge) for name, device in DEVICES.items() if name != "cpu"}
    assert ridges == {"a100": 153, "4090": 164, "h200": 206, "h100": 295}


# -------------------------------------------------------------------------------------------- against real processors

SIZES = [(640, 480), (333, 1000), (60, 70), (1200, 97)]


def tokens_by_pixels(name, size):
    """Tokens that follow from the pixels which transformers' own image processor makes of a real picture."""
    import importlib

    place, cls, arguments = {
        "qwen2.5-vl-7b": ("qwen2_vl", "Qwen2VLImageProcessorPil", {"min_pixels": 3136, "max_pixels": 12845056}),
        "qwen3-vl-8b": (
            "qwen2_vl",
            "Qwen2VLImageProcessorPil",
            {"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "patch_size": 16},
        ),
        "glm46v": ("glm46v", "Glm46VImageProcessorPil", {}),
        "internvl3-8b": (
            "got_ocr2",
            "GotOcr2ImageProcessorPil",
            {"size": {"height": 448, "width": 448}, "crop_to_patches": True},
        ),
        "idefics3": ("idefics3", "Idefics3ImageProcessorPil", {}),
        "smolvlm": ("smolvlm", "SmolVLMImageProcessorPil", {}),
        "mistral3": ("pixtral", "PixtralImageProcessorPil", {"size": {"longest_edge": 1540}, "patch_size": 28}),
        "gemma4": ("gemma4", "Gemma4ImageProcessorPil", {}),
        "llava-next-7b": (
            "llava_next",
            "LlavaNextImageProcessorPil",
            {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
        ),
    }[name]
    module = importlib.import_module(f"transformers.models.{place}.image_processing_pil_{place}")
    picture = Image.fromarray(np.zeros((size[1], size[0], 3), dtype=np.uint8))
    made = getattr(module, cls)(**arguments)(images=picture, return_tensors="pt")
    if "image_grid_thw" in made:
        return int(made["image_grid_thw"].prod()) // 4
    if name == "mistral3":
        height, width = (int(side) for side in made["image_sizes"][0])
        return height * width // 28**2
    if name == "gemma4":
        return int(made["num_soft_tokens_per_image"][0])
    if name == "llava-next-7b":
        return made["pixel_values"].shape[1]  # pictures
    tiles = made["pixel_values"].shape[-4]
    return 256 * tiles if name == "internvl3-8b" else 169 * tiles


def meta(config):
    with torch.device("meta"):
        return tf.AutoModelForImageTextToText.from_config(config)


def small(name):
    """A config with the published way of cutting pictures and a language model of no size."""
    tiny = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    siglip = tiny | {"image_size": 364, "patch_size": 14}
    text = tiny | {"num_key_value_heads": 1, "vocab_size": 128, "pad_token_id": 0}
    if name == "glm46v":
        vision = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
        return tf.Glm46VConfig(
            vision_config={"model_type": "glm4v_vision", **vision}, text_config={"model_type": "glm4v_text", **text}
        )
    if name == "idefics3":
        return tf.Idefics3Config(vision_config=siglip, text_config=tf.LlamaConfig(**text), scale_factor=2)
    if name == "smolvlm":
        return tf.SmolVLMConfig(vision_config=siglip, text_config=tf.LlamaConfig(**text), scale_factor=2)
    if name == "mistral3":
        vision = tf.PixtralVisionConfig(**tiny, image_size=1540, patch_size=14)
        return tf.Mistral3Config(vision_config=vision, text_config=tf.MistralConfig(**text), spatial_merge_size=2)
    assert name == "gemma4"
    vision = tf.Gemma4VisionConfig(**tiny, num_key_value_heads=2, head_dim=32, patch_size=16, pooling_kernel_size=3)
    return tf.Gemma4Config(vision_config=vision, text_config=tf.Gemma4TextConfig(**text), audio_config=None)


@pytest.mark.parametrize(
    "name", ["qwen2.5-vl-7b", "qwen3-vl-8b", "glm46v", "internvl3-8b", "idefics3", "smolvlm", "mistral3", "gemma4"]
)
def test_visual_tokens_are_those_of_the_real_processor(name):
    _, parts = resolve(meta(CONFIGS[name]() if name in CONFIGS else small(name)))
    ours = {size: sum(feed_of(parts, Picture(*size)).lengths) for size in SIZES}
    assert ours == {size: tokens_by_pixels(name, size) for size in SIZES}


def test_llava_next_is_cut_as_its_processor_cuts():
    config = CONFIGS["llava-next-7b"]()
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 1
    _, parts = resolve(meta(config))
    for size in SIZES:
        assert len(feed_of(parts, Picture(*size)).sequences) == tokens_by_pixels("llava-next-7b", size)


def test_anyres_newlines_and_padding_count():
    next_7b = CONFIGS["llava-next-7b"]()
    e = estimate(next_7b, (672, 672))
    assert (e.visual_tokens, e.fed) == (576 + 48 * 48 + 48, "a thumbnail and 4 crops of 336x336")
    # published for 640x427 photographs: 2x2 crops, padding cut off
    assert estimate(next_7b, (640, 427)).visual_tokens == 576 + 32 * (48 + 1)
    asked = estimate(next_7b, (672, 672), tokens=2880)
    assert asked.visual_tokens == 2880
    assert asked.vision == e.vision
    assert "2880 visual tokens as asked for; 672x672 makes 2928." in asked.notes


def test_processor_files_beside_a_model_decide(tmp_path):
    config = CONFIGS["qwen2.5-vl-3b"]()
    config.save_pretrained(tmp_path)
    assert estimate(tmp_path, (1036, 1036)).visual_tokens == 1369
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 3136, "max_pixels": 504 * 504}))
    assert estimate(tmp_path, (1036, 1036)).visual_tokens == 324
    assert estimate(str(tmp_path / "config.json"), (1036, 1036)).visual_tokens == 324
    (tmp_path / "preprocessor_config.json").unlink()
    nested = {"image_processor": {"size": {"shortest_edge": 3136, "longest_edge": 504 * 504}}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert estimate(tmp_path, (1036, 1036)).visual_tokens == 324
    (tmp_path / "processor_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        estimate(tmp_path, (1036, 1036))


def test_video_frames():
    qwen = CONFIGS["qwen2.5-vl-3b"]()
    one, eight, nine = (estimate(qwen, (364, 280), frames=n) for n in (1, 8, 9))
    assert [e.visual_tokens for e in (one, eight, nine)] == [
        130,
        4 * 130,
        5 * 130,
    ]  # frames in pairs, the last repeated
    assert eight.vision.flops == pytest.approx(4 * one.vision.flops)  # frames do not see each other
    onevision = estimate(CONFIGS["llava-onevision-7b"](), (1000, 500), frames=1)
    assert onevision.visual_tokens == 197


def test_what_a_part_of_a_chain_leaves_to_the_picture_is_said():
    chain = vtc.Chain(vtc.PixelPrune(), vtc.Adaptive(vtc.DivPrune(), at_most=0.5))
    e = estimate(zoo.get_model("qwen2_5_vl"), (56, 56), method=chain)
    assert [name for name in ("pixelprune", "adaptive") if any(f"{name} keeps depends" in n for n in e.notes)] == [
        "pixelprune",
        "adaptive",
    ]
    assert e.pruned.visual == (e.visual_tokens // 2,) * len(e.pruned.visual)


def test_tower_and_entry_of_a_chain_are_counted():
    e = estimate(zoo.get_model("llava"), (16, 16), method=vtc.Chain(vtc.ToMe(keep=0.5), vtc.DivPrune(keep=0.5)))
    assert e.pruned.visual == (4, 4, 4)
    assert e.vision_pruned.flops < e.vision.flops


# ---------------------------------------------------------------------------------------------- against real pruning

METHODS = [
    vtc.DivPrune(keep=0.25),
    vtc.DivPrune(keep=5),
    vtc.DivPrune(keep=0.25, newlines="keep"),
    vtc.TransPrune(keep=0.25, layers=(1, 2), ratios=(0.5, 0.25)),
    vtc.TransPrune(keep=0.25, layers=(1, 2), ratios=(0.5, 0.25), newlines="keep"),
    vtc.Chain(vtc.DivPrune(keep=0.5), vtc.TransPrune(layers=(1, 2), ratios=(0.5, 0.25))),
    vtc.Allocate(keep=0.25),
    vtc.Allocate(keep=0.25, selector=vtc.ToDRE(stage2=True, layer=2, tau=1.0)),
    vtc.ToDRE(keep=0.5, stage2=True, layer=2, tau=1.0),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
@torch.no_grad()
def test_tokens_per_layer_and_flops_are_those_of_a_real_pruning(method):
    model = copy.deepcopy(zoo.get_model("llava_next"))
    sample = zoo.make_batch("llava_next", (1, 1), padding="none").samples[1]
    with vtc.patch(model, method) as p:
        model(**sample)
        report = p.report()
    text = round(report.text_tokens)
    e = estimate(model, (16, 4), method=method, text=text)
    assert e.pruned.visual == tuple(report.tokens_per_layer)
    assert e.average_keep == pytest.approx(report.average_keep)
    assert sum(e.pruned.layers) == pytest.approx(report.flops)
    assert sum(e.full.layers) == pytest.approx(report.flops_unpruned)
    if method.name == "todre":
        assert any("counted as dropped" in note for note in e.notes)


def test_tiles_that_are_images_have_budgets_of_their_own():
    e = estimate(small("idefics3"), (1456, 728), keep=10)
    assert e.visual_tokens == 9 * 169
    assert e.pruned.visual == (90,)


# ----------------------------------------------------------------------------------------------------------- properties


@pytest.fixture(scope="module")
def llava():
    return CONFIGS["llava-1.5-7b"]()


def test_keeping_all_changes_nothing(llava):
    e = estimate(llava, (336, 336), keep=1.0)
    assert e.full == e.pruned
    assert e.llm_ratio == e.decode_ratio == e.cache_ratio == e.average_keep == 1.0
    assert 1.0 < e.ttft_ratio < 1.01  # of 24 blocks the last is not read
    assert "not worth it for speed" in str(e)


def test_batch_scales_work_and_cache_but_not_weights(llava):
    one, eight = (estimate(llava, (336, 336), keep=64, batch=b) for b in (1, 8))
    assert eight.full.prefill.flops == 8 * one.full.prefill.flops
    assert eight.pruned.cache_bytes == 8 * one.pruned.cache_bytes
    assert eight.vision.bytes == one.vision.bytes
    assert one.ttft_ratio == eight.ttft_ratio
    assert one.decode_ratio < 1.05 < eight.decode_ratio
    # at batch 1 the 128 tokens that stay are below the ridge of 206, at batch 8 they are not
    assert one.ttft_time_ratio < 0.7 * one.ttft_ratio
    assert eight.ttft_time_ratio == pytest.approx(eight.ttft_ratio, rel=0.01)
    assert "below the 206" in str(one)
    assert "batch 2" in str(one)
    assert "below" not in str(eight)


def test_the_verdict_names_the_ceiling():
    e = estimate(CONFIGS["qwen2.5-vl-3b"](), (1036, 1036), keep=0.1)
    assert "48% of the work before the first token" in str(e)
    assert "nothing after it can beat 2.0x" in str(e)
    assert e.ttft_ratio < e.ceiling


def test_memory_and_memory_bound_prefill_are_said(llava):
    assert "Weights and cache need" in str(estimate(llava, (336, 336), batch=64, keep=1.0, device="4090"))
    tiny = Device("a toy", flops=1e15, bandwidth=1e9, memory=1e12)
    e = estimate(llava, (336, 336), device=tiny)
    assert "fewer tokens cannot make it faster" in str(e)
    assert "not worth it for speed" in str(e)


def test_packed_weights_count_as_what_they_stand_for():
    model = copy.deepcopy(zoo.get_model("llava"))
    whole = Decoder.of(model.get_decoder())
    down = model.get_decoder().layers[0].mlp.down_proj
    down.weight = torch.nn.Parameter(torch.zeros(down.weight.numel() // 2, 1))  # two 4-bit numbers in each
    assert Decoder.of(model.get_decoder()) == whole


def test_experts():
    config = zoo.get_model("qwen3_vl_moe").config
    decoder = Decoder.of(zoo.get_model("qwen3_vl_moe").get_decoder())
    matrices = decoder.layers[0].matrices
    assert matrices.experts == 4 * 3 * 32 * 32
    assert matrices.share == 0.5  # 2 of 4
    assert matrices.read(1) == matrices.met
    assert matrices.met < matrices.read(2) < matrices.read(100) == pytest.approx(matrices.dense + matrices.experts)
    e = estimate(config, (12, 12), settings=ANY_SIZE)
    assert e.visual_tokens == 9


def test_an_estimate_is_frozen_and_plain_data(llava):
    e = estimate(llava, (336, 336), keep=64, method="transprune")
    with pytest.raises(dataclasses.FrozenInstanceError):
        e.batch = 2
    said = json.loads(json.dumps(e.to_dict()))
    assert said["ttft_ratio"] == e.ttft_ratio
    assert said["pruned"]["visual"] == list(e.pruned.visual)
    assert said["verdict"] == list(e.verdict)
    assert {field.name for field in dataclasses.fields(Estimate)} <= said.keys()
    assert e.schedule == [(1, 7, 576), (8, 9, 502), (10, 12, 356), (13, 32, 64)]


def test_the_given_model_is_only_read():
    model = copy.deepcopy(zoo.get_model("llava"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    with vtc.patch(model, "grid", keep=0.5):
        assert estimate(model, (8, 8)).visual_tokens == 16  # a patched one too
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config


def test_a_7b_model_needs_no_memory(llava, monkeypatch):
    real = torch.nn.Parameter.__new__

    def on_meta(cls, data=None, requires_grad=True):
        assert data is None or data.is_meta, "a weight was allocated"
        return real(cls, data, requires_grad)

    monkeypatch.setattr(torch.nn.Parameter, "__new__", on_meta)
    assert estimate(llava, (336, 336)).parameters > 7e9


# --------------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("configs")
    for name in ("llava-1.5-7b", "llava-next-7b", "qwen2.5-vl-7b"):
        CONFIGS[name]().save_pretrained(root / name)
    tf.LlamaConfig().save_pretrained(root / "llama")
    tf.MllamaConfig().save_pretrained(root / "mllama")
    return root


def invoke(*arguments):
    return CliRunner().invoke(app, ["estimate", *map(str, arguments)], env={"COLUMNS": "160", "NO_COLOR": "1"})


@pytest.mark.parametrize(
    ("name", "arguments", "ratio"),
    [
        ("llava-1.5-7b", ("--image", "336x336", "--keep", "64"), 4.28),
        ("llava-next-7b", ("--image", "672x672", "--tokens", "2880", "--keep", "320"), 6.08),
        ("qwen2.5-vl-7b", ("--image", "1036x1036", "--keep", "0.25"), 2.06),
    ],
)
def test_ideal_ratios_on_the_command_line(folder, name, arguments, ratio):
    result = invoke(folder / name, *arguments, "--text", "64", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["ttft_ratio"] == pytest.approx(ratio, rel=0.02)


def test_the_page_says_what_was_asked_and_what_it_comes_to(folder):
    result = invoke(folder / "llava-1.5-7b" / "config.json", "--image", "336x336", "--method", "transprune", "-b", 1)
    assert result.exit_code == 2  # there is no -b
    result = invoke(
        folder / "llava-1.5-7b" / "config.json", "--image", "336x336", "--method", "transprune", "-k", 0.125
    )
    assert result.exit_code == 0, result.output
    for part in ("7.06 B parameters", "576 visual tokens", "vision tower", "prefill", "first token", "KV cache"):
        assert part in result.stdout
    assert "13 - 32" in result.stdout  # layers
    assert "Verdict: " in result.stdout


def test_the_shipped_models_go_by_name():
    result = invoke("tinyvlm-next", "--image", "192x192", "--device", "cpu", "--json")
    assert json.loads(result.stdout)["visual_tokens"] == 144 + 24 * 25


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("llava-1.5-7b", ("--device", "h300"), ("'h300'", "a100, h100, h200, 4090, cpu")),
        ("llama", (), ("'llama'", "has no vision tower")),
        ("mllama", (), ("'mllama'", "cross-attention")),
        ("llava-1.5-7b", ("--image", "0x10"), ("width=0", "[1, 10000]")),
        ("llava-1.5-7b", ("--image=-5x10",), ("'-5x10'", "WIDTHxHEIGHT")),
        ("llava-1.5-7b", ("--image", "large"), ("'large'", "WIDTHxHEIGHT")),
        ("llava-1.5-7b", ("--image", "99999x10"), ("width=99999",)),
        ("qwen2.5-vl-7b", ("--image", "5000x10"), ("5000x10", "aspect ratio must be smaller than 200")),
        ("llava-1.5-7b", ("--keep", "1.5"), ("keep=1.5", "(0, 1]")),
        ("llava-1.5-7b", ("--keep", "0"), ("keep=0", "at least 1")),
        ("llava-1.5-7b", ("--method", "divprun"), ("'divprun'", "divprune")),
        ("llava-1.5-7b", ("--method", "globalcom2"), ("globalcom2", "'llava'")),
        ("qwen2.5-vl-7b", ("--method", "todre"), ("'cls'", 'pivot="random"')),
        ("llava-1.5-7b", ("--frames", "8"), ("'llava'", "images only", "qwen2_5_vl")),
        ("qwen2.5-vl-7b", ("--frames", "0"), ("frames=0",)),
        ("llava-1.5-7b", ("--batch", "0"), ("batch=0", "at least 1")),
        ("llava-1.5-7b", ("--text", "-1"), ("text=-1", "at least 1")),
        ("llava-1.5-7b", ("--tokens", "0"), ("tokens=0", "at least 1")),
        ("llava-1.5-7b", ("--option", "sort=1"), ("sort", "newlines")),
        ("nowhere", (), ("nowhere", "there is no")),
        (".", (), ("no config.json",)),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, name, arguments, words):
    result = invoke(folder / name, *arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("vtc: ")
    for word in words:
        assert word in line


def test_bad_input_of_the_api(llava):
    for bad in ("336x336", (336,), 336):
        with pytest.raises(TypeError, match="is no \\(width, height\\)"):
            estimate(llava, bad)
    with pytest.raises(TypeError, match=r"width=336\.0"):
        estimate(llava, (336.0, 336))
    with pytest.raises(TypeError, match="batch=True"):
        estimate(llava, batch=True)
    with pytest.raises(TypeError, match="neither a config"):
        estimate({"model_type": "llava"})
    with pytest.raises(TypeError, match="carries its own"):
        estimate(llava, method=vtc.DivPrune(), keep=0.5)
    with pytest.raises(vtc.UnsupportedModelError):
        estimate(torch.nn.Linear(2, 2))
    text_only = tf.Gemma4Config(audio_config=None)
    text_only.vision_config = None
    with pytest.raises(ValueError, match="'gemma4' config has no vision tower"):
        estimate(text_only)


def test_a_family_without_a_rule_is_refused_by_name():
    vision = tf.SiglipVisionConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    config = tf.AyaVisionConfig(vision_config=vision)
    with pytest.raises(ValueError, match=r"a 'aya_vision' model makes of a picture is not known here; known: gemma3"):
        estimate(config)
