"""What is known of popular models without a hub: it builds, and gives the tokens that real processors give."""

import importlib
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as tf
import zoo
from PIL import Image
from typer.testing import CliRunner

from vtc import published
from vtc.cli import app
from vtc.feed import Picture
from vtc.models import list_models, resolve
from vtc.profiling.configs import config_of, settings_beside
from vtc.profiling.estimate import estimate
from vtc.profiling.feed import feed_of
from vtc.published import models

SIZES = [(640, 480), (333, 1000), (60, 70), (1200, 97), (1344, 896)]
NAMES = list(models())


def small(name):
    """A model on the meta device, as published but for the depth of its towers, which decides about no token."""
    config = models()[name].config()
    vision, text = config.vision_config, config.text_config
    for part, field in ((vision, "depth"), (vision, "num_hidden_layers"), (text, "num_hidden_layers")):
        if hasattr(part, field):
            setattr(part, field, 1)
    if hasattr(vision, "deepstack_visual_indexes"):
        vision.deepstack_visual_indexes = [0]
    for part in (vision, text):
        if getattr(part, "layer_types", None):
            part.layer_types = part.layer_types[:1]
    with torch.device("meta"):
        model = tf.AutoModelForImageTextToText.from_config(config)
    return resolve(model)[1]


def made(place, kind, shape, /, **settings):
    """What transformers' own image processor makes of a real picture of that size."""
    module = importlib.import_module(f"transformers.models.{place}.image_processing_pil_{place}")
    picture = Image.fromarray(np.zeros((shape[1], shape[0], 3), dtype=np.uint8))
    return getattr(module, f"{kind}ImageProcessorPil")(**settings)(images=picture, return_tensors="pt")


def features(kind, size, **attributes):
    """What a processor of transformers counts for a picture cut into crops; a tokenizer has no part in it."""
    processor = object.__new__(getattr(tf, f"{kind}Processor"))
    processor.__dict__ |= attributes
    side = attributes["image_processor"].side
    return processor._get_number_of_features(size[1], size[0], side, side)


class Pinpoints:
    def __init__(self, side, image_grid_pinpoints):
        self.side, self.image_grid_pinpoints = side, image_grid_pinpoints


def counted(name, size):
    """Visual tokens by the classes of transformers, constructed with the published sizes."""
    entry = models()[name]
    values, settings = entry.values, dict(entry.settings)
    vision, family = values["vision_config"], values["model_type"]
    if family.startswith("qwen"):
        return int(made("qwen2_vl", "Qwen2VL", size, **settings)["image_grid_thw"].prod()) // 4
    if family == "internvl":  # InternVLProcessor asks for crops, whatever preprocessor_config.json says
        return 256 * len(made("got_ocr2", "GotOcr2", size, crop_to_patches=True, **settings)["pixel_values"])
    if family == "smolvlm":
        tiles = made("smolvlm", "SmolVLM", size, **settings)["pixel_values"].shape[1]
        return tiles * (vision["image_size"] // vision["patch_size"] // values["scale_factor"]) ** 2
    if vision["model_type"] == "pixtral":
        cell = vision["patch_size"] * values.get("spatial_merge_size", 1)
        settings["patch_size"] = {"height": cell, "width": cell}  # as PixtralProcessor hands it on
        height, width = (int(n) for n in made("pixtral", "Pixtral", size, **settings)["image_sizes"][0])
        return height * width // cell**2
    if family == "llava_next":
        counts = features(
            "LlavaNext", size, patch_size=14, num_additional_image_tokens=1,
            image_processor=Pinpoints(336, settings["image_grid_pinpoints"]),
        )  # fmt: skip
        return counts - 1  # CLS
    if family == "llava_onevision":
        return features(
            "LlavaOnevision", size, num_image_tokens=729, vision_aspect_ratio=values["vision_aspect_ratio"],
            image_processor=Pinpoints(384, settings["image_grid_pinpoints"]),
        )  # fmt: skip
    place, kind = {"llava": ("clip", "CLIP"), "paligemma": ("siglip", "Siglip"), "gemma3": ("gemma3", "Gemma3")}[family]
    height, width = made(place, kind, size, **settings)["pixel_values"].shape[-2:]
    if family == "gemma3":
        assert (height, width) == (vision["image_size"],) * 2
        return values["mm_tokens_per_image"]
    return (height // vision["patch_size"]) * (width // vision["patch_size"])


def different():
    """One model of all that have the same rule: other weights make no other tokens."""
    rules = {}
    for name, entry in models().items():
        values, vision = entry.values, entry.values["vision_config"]
        shapes = [vision.get(field) for field in ("image_size", "patch_size", "spatial_merge_size")]
        rules.setdefault(json.dumps([values["model_type"], shapes, values.get("scale_factor"), entry.settings]), name)
    return list(rules.values())


@pytest.mark.parametrize("name", different())
def test_visual_tokens_are_those_of_the_real_processor(name):
    parts, settings = small(name), models()[name].settings
    ours = {size: sum(feed_of(parts, Picture(*size), settings).lengths) for size in SIZES}
    assert ours == {size: counted(name, size) for size in SIZES}


def billions(name):
    """Parameters that a model's name claims."""
    claim = re.search(r"(\d+(?:\.\d+)?)([bm])(?![a-z])", name.partition("/")[2].lower())
    number, unit = claim.groups()
    return float(number) / (1000 if unit == "m" else 1)


@pytest.mark.parametrize("name", NAMES)
def test_it_has_about_the_parameters_of_its_name(name):
    """A slip in a digit would show."""
    entry = models()[name]
    with torch.device("meta"):
        model = tf.AutoModelForImageTextToText.from_config(entry.config())
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert 0.8 < parameters / billions(name) < (1.8 if "onevision" in name else 1.4)  # its name tells no tower


def test_every_entry_says_where_it_was_read_and_when():
    assert len(NAMES) > 40
    for name, entry in models().items():
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", name)
        assert entry.sources
        for source in entry.sources:
            assert re.match(r"https://(huggingface\.co|github\.com)/", source)
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", entry.read)
        assert entry.values["model_type"] in list_models()
        assert entry.settings
        json.dumps(dict(entry.values))


def test_no_field_is_one_that_transformers_does_not_know():
    """A misspelt name would be kept as it is, and decide nothing."""
    for name, entry in models().items():
        config = entry.config()
        fresh = type(config)()
        for part, values in ((fresh, entry.values), *((getattr(config, p), entry.values[p]) for p in PARTS)):
            known = type(part)().to_dict() if part is not fresh else fresh.to_dict() | dict.fromkeys(PARTS)
            aliases = getattr(type(part), "attribute_map", {})
            unknown = [field for field in values if field not in {*known, *aliases, *READ_ANYHOW}]
            assert not unknown, f"{name}: {unknown}"


PARTS = ("vision_config", "text_config")
READ_ANYHOW = ("head_dim", "vision_use_head")  # models look for them in configs that do not declare them


def test_names_in_any_case_and_without_owner(tmp_path, monkeypatch):
    entry = models()["Qwen/Qwen2.5-VL-3B-Instruct"]
    assert published.find("qwen/qwen2.5-vl-3b-instruct") is published.find("Qwen2.5-VL-3B-Instruct") is entry
    assert published.find("Qwen2.5-VL") is None
    assert published.find("Qwen/") is None
    assert config_of("Qwen2.5-VL-3B-Instruct").text_config.hidden_size == 2048
    assert settings_beside("Qwen2.5-VL-3B-Instruct") == dict(entry.settings)
    assert settings_beside("Qwen2.5-VL-3B-Instruct", "video") == {}
    # a folder of that name goes before
    folder = tmp_path / "Qwen" / "Qwen2.5-VL-3B-Instruct"
    config = entry.config()
    config.text_config.hidden_size = 1024
    config.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    assert config_of("Qwen/Qwen2.5-VL-3B-Instruct").text_config.hidden_size == 1024


# ------------------------------------------------------------------------------------------- budgets of the processors


@pytest.mark.parametrize(
    ("name", "size", "words", "tokens"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", (1036, 1036), "max_pixels=536648", 676),
        ("Qwen/Qwen3-VL-4B-Instruct", (1024, 1024), "max_pixels=524288", 484),
        ("OpenGVLab/InternVL3-8B-hf", (1792, 1344), "max_patches=11", 1792),
        ("HuggingFaceTB/SmolVLM2-2.2B-Instruct", (1036, 1036), "size={'longest_edge': 768}", 405),
        ("mistral-community/pixtral-12b", (1024, 1024), "size={'longest_edge': 640}", 1600),
    ],
)
def test_half_of_the_tokens_by_the_processors_own_budget(name, size, words, tokens):
    """The real processor, given the setting that is named, makes as many tokens as are said."""
    e = estimate(name, size, method="grid", keep=0.25)
    lower, kept = e.halves
    assert (lower.words, kept.words) == (words, "keep=0.5 (grid)")
    key, _, value = words.partition("=")
    entry = models()[name]
    less = published.Published(
        name, entry.sources, entry.read, entry.values, dict(entry.settings) | {key: json.loads(value.replace("'", '"'))}
    )
    assert lower.tokens <= 0.55 * e.visual_tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models(), name, less)
        assert lower.tokens == counted(name, size)
    assert kept.tokens == pytest.approx(e.visual_tokens / 2, rel=0.02)  # tiles are rounded one by one
    assert lower.seconds < kept.seconds  # the tower has less to do, too
    assert lower.ttft_ratio > kept.ttft_ratio
    assert "lowering it comes first" in str(e)
    assert words in str(e)
    assert e.to_dict()["halves"][0]["tokens"] == lower.tokens


def test_no_budget_is_invented_where_there_is_none():
    for name in ("llava-hf/llava-1.5-7b-hf", "google/gemma-3-4b-it", "llava-hf/llava-v1.6-vicuna-7b-hf"):
        e = estimate(name, (640, 480))
        assert e.halves == ()
        assert "budget of its own" not in str(e)
    # as small as the processor lets it be; as many as asked for; a video
    assert estimate("Qwen/Qwen3-VL-4B-Instruct", (256, 256)).halves == ()
    assert estimate("Qwen/Qwen3-VL-4B-Instruct", (640, 480), tokens=100).halves == ()
    assert estimate("Qwen/Qwen3-VL-4B-Instruct", (640, 480), frames=4).halves == ()


def test_a_method_without_keep_is_not_compared_at_a_half():
    e = estimate("Qwen/Qwen2.5-VL-3B-Instruct", (640, 480), method="pixelprune")
    assert [way.words for way in e.halves] == ["max_pixels=153272"]  # half of 644x476


def test_tune_compares_the_budget_too():
    from vtc.commands.tune import budget_beside
    from vtc.config import CompressionConfig

    module = importlib.import_module("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    images = module.Qwen2VLImageProcessorPil(min_pixels=56, max_pixels=10**6, patch_size=2)
    asked = [SimpleNamespace(image=Image.new("RGB", (64, 48)))]

    def beside(family):
        processor = SimpleNamespace(image_processor=images)
        exam = SimpleNamespace(model=zoo.get_model(family), asked=asked, processor=processor)
        return budget_beside(exam, CompressionConfig("grid", {"keep": 0.5}))

    said = beside("qwen2_5_vl")  # 16 x 12 tokens of 4 x 4 pixels
    assert "lowering it comes first" in said
    assert "unpruned: 192 tokens" in said
    assert "max_pixels=1536: " in said
    assert "keep=0.5 (grid): 96 tokens" in said
    assert "an 8-core CPU" in said
    assert beside("llava") is None


# --------------------------------------------------------------------------------------------------------- command line


def invoke(*arguments):
    return CliRunner().invoke(app, ["estimate", *map(str, arguments)], env={"COLUMNS": "160", "NO_COLOR": "1"})


def test_an_estimate_without_a_hub_names_its_source():
    result = invoke("Qwen/Qwen2.5-VL-3B-Instruct", "--image", "1036x1036")
    assert result.exit_code == 0, result.output
    entry = models()["Qwen/Qwen2.5-VL-3B-Instruct"]
    for words in ("1369 visual tokens", "lowering it comes first", f"read on {entry.read}", entry.sources[0]):
        assert words in result.stdout


def test_the_table_has_a_line_for_each_model():
    result = invoke("--table", "qwen2.5-vl", "--image", "1036x1036")
    assert result.exit_code == 0, result.output
    for line in (
        r"Qwen/Qwen2.5-VL-3B-Instruct +3.75 +1369 +48% +2.0x +tower +max_pixels=536648",
        r"Qwen/Qwen2.5-VL-72B-Instruct +73.4 +1369 +4% +\d+.\dx +entry +max_pixels=536648",
    ):
        assert re.search(line, result.stdout), result.stdout
    assert "llava" not in result.stdout
    (first, *_) = said = json.loads(invoke("--table", "llava-1.5", "--image", "336x336", "--json").stdout)
    assert [each["name"] for each in said] == ["llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf"]
    assert first["best_place"] == "entry"


def test_methods_and_keeps_may_be_lists():
    result = invoke("llava-1.5-7b-hf", "--image", "336x336", "--method", "grid,fastv", "--keep", "0.5,64")
    assert result.exit_code == 0, result.output
    assert "comes first" not in result.stdout
    assert "comes first" in invoke("internvl3-1b-hf", "--method", "grid", "--keep", "0.5,64").stdout
    rows = [line for line in result.stdout.splitlines() if re.match(r" *(unpruned|grid|fastv)", line)]
    assert len(rows) == 5
    said = json.loads(invoke("llava-1.5-7b-hf", "-m", "grid", "-k", "0.5,64", "--image", "336x336", "--json").stdout)
    alone = json.loads(invoke("llava-1.5-7b-hf", "-m", "grid", "-k", "64", "--image", "336x336", "--json").stdout)
    assert said[1] == alone
    every = invoke("tinyvlm", "--method", "all")
    assert every.exit_code == 0
    assert "left out: " in every.stderr
    assert "divprune" in every.stdout
    assert "globalcom2" not in every.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "name a model, or --table"),
        (("--table", "nowhere"), "has 'nowhere' in its name"),
        (("--table", "--frames", "4"), "--frames and --tokens are for one model"),
        (("--table", "--keep", "0.5,0.25"), "one --method and one --keep"),
        (("llava-1.5-7b-hf", "--keep", ","), "--keep ',' is an empty list"),
        (("llava-1.5-7b-hf", "--keep", "0.5,many"), "--keep 'many'"),
        (("llava-1.5-7b-hf", "--method", "grid,grit"), "did you mean 'grid'"),
    ],
)
def test_bad_input(arguments, words):
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert words in line
