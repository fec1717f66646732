"""`vtc convert mqt`: nothing is lost, nothing unknown is let through, no pickle is opened."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import published
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import vtc
import vtc_tinyvlm
from vtc.cli import app
from vtc.modules import LlavaMqtForConditionalGeneration, MatryoshkaQueryTransformer, load_mqt, shards
from vtc.modules.converting import convert_mqt
from vtc.modules.mqt import PUBLISHED


@pytest.fixture(scope="module")
def built() -> Any:
    return published.model()


@pytest.fixture
def given(tmp_path: Path, built: Any) -> tuple[Path, Path]:
    return published.write(tmp_path, built)


def edited(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def retouch(folder: Path, change: Any, name: str = "model-00001-of-00002.safetensors") -> None:
    """Change the tensors of one file, and the index with it."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)
    path = folder / "model.safetensors.index.json"
    if path.exists():
        index = json.loads(path.read_text())
        kept = {k: v for k, v in index["weight_map"].items() if v != name}
        path.write_text(json.dumps(index | {"weight_map": kept | dict.fromkeys(tensors, name)}))


@pytest.mark.parametrize("shard", [1, 20_000, 4 << 30])
def test_every_tensor_arrives_bit_for_bit(
    given: tuple[Path, Path], built: Any, tmp_path: Path, shard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one file or many; the language model has a row more for the image token, which features replace."""
    monkeypatch.setattr(shards, "SHARD", shard)
    seen: list[tuple[str, int, int]] = []
    done = convert_mqt(given[0], tmp_path / "out", given[1], heads=4, report=lambda *now: seen.append(now))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == (1 if shard > 1 << 30 else pytest.approx(50, abs=49))
    model = load_mqt(tmp_path / "out")
    assert isinstance(model, LlavaMqtForConditionalGeneration)
    assert not model.training
    found, want = model.state_dict(), built.state_dict()
    assert found.keys() == want.keys()
    assert done.written == len(found) == len(seen) - 1
    assert seen[-1][1:] == (len(found), len(found))
    for name, value in want.items():
        rows = value.shape[0] if name in ("lm_head.weight", "model.language_model.embed_tokens.weight") else None
        assert torch.equal(found[name][:rows] if rows else found[name], value), name
        assert found[name].dtype == torch.float16
    assert model.config.image_token_id == 240
    assert model.lm_head.weight.shape[0] == 241
    assert not model.lm_head.weight[240].any()
    assert model.generation_config.suppress_tokens == [240]
    assert {*done.recomputed} == {
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "vision_model.embeddings.position_ids",
    }
    assert {*done.left_out} == {"text_model.final_layer_norm.weight", "logit_scale"}
    config = model.config
    assert (config.num_queries, config.query_heads, config.vision_feature_layer) == (16, 4, -2)
    assert config.text_config.to_dict().keys() == built.config.text_config.to_dict().keys()
    for name, value in built.config.text_config.to_dict().items():
        if name not in ("vocab_size", "dtype", "architectures"):
            assert config.text_config.to_dict()[name] == value, name


@torch.no_grad()
def test_the_result_computes_what_the_parts_do(given: tuple[Path, Path], built: Any, tmp_path: Path) -> None:
    """Logits equal those of the model it was made of; `vtc.patch` takes it; so does a stranger's AutoModel."""
    convert_mqt(given[0], tmp_path / "out", given[1], heads=4)
    model = load_mqt(tmp_path / "out", dtype=torch.float32)
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    text = [1, 30, *[240] * 16, 50, 51, 52]
    theirs = torch.tensor([[239 if token == 240 else token for token in text]])
    whole = published.in_dtype(published.model(), torch.float32)
    want = whole(input_ids=theirs, pixel_values=pixels).logits
    with vtc.patch(model, "mqt", keep=1.0):
        found = model(input_ids=torch.tensor([text]), pixel_values=pixels).logits
    torch.testing.assert_close(found[..., :240], want, rtol=0, atol=1e-5)
    with vtc.patch(model, "mqt", keep=4) as handle:
        model.generate(input_ids=torch.tensor([text]), pixel_values=pixels, max_new_tokens=4, do_sample=False)
        assert handle.last_keep[0][0].tolist() == [0, 1, 2, 3]
    again = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(again(input_ids=torch.tensor([text]), pixel_values=pixels).logits, found)
    own, _ = published.tensors(built)
    alone = MatryoshkaQueryTransformer.from_published(own, heads=4).float().eval()
    patches = torch.randn(1, 64, 32)
    assert torch.equal(alone(patches), model.model.multi_modal_projector(patches))


def test_the_processor_counts_queries(given: tuple[Path, Path], tmp_path: Path) -> None:
    """With a tokenizer beside the checkpoint: prompts have one placeholder for each query."""
    _, processor = vtc_tinyvlm.load()
    tokenizer = processor.tokenizer
    tokenizer.save_pretrained(given[0])
    done = convert_mqt(given[0], tmp_path / "out", given[1], heads=4)
    assert done.processor
    found = tf.AutoProcessor.from_pretrained(tmp_path / "out")
    model = load_mqt(tmp_path / "out", dtype=torch.float32)
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<image>") == 4
    assert model.lm_head.weight.shape[0] == 240  # a row that was there
    picture = vtc_tinyvlm.evaluation_questions(1)[0].image.resize((40, 20))
    inputs = found(images=picture, text="<image> what ?", return_tensors="pt")
    assert int((inputs["input_ids"] == 4).sum()) == 16
    assert inputs["pixel_values"].shape[-2:] == (16, 16)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what ?"}]}]
    prompt = found.apply_chat_template(asked, add_generation_prompt=True)
    assert prompt.startswith("A chat between a curious user")
    assert prompt.endswith("user's questions. USER: <image>\nwhat ? ASSISTANT:")
    asked += [{"role": "assistant", "content": "red"}, {"role": "user", "content": "why ?"}]
    assert found.apply_chat_template(asked).endswith("what ? ASSISTANT: red</s> USER: why ?")
    top = inputs["pixel_values"][0, :, 0]  # image_aspect_ratio "pad": bars of the mean colour, which is 0 here
    assert top.abs().max() < 0.02
    with torch.no_grad():
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("count", ["second_stage", 4])
def test_how_many_tokens_training_drew_does_not_matter(given: tuple[Path, Path], tmp_path: Path, count: Any) -> None:
    """Published configs may say `second_stage`, with which the authors' code draws a number for each answer."""
    edited(given[0], num_visual_tokens=count)
    convert_mqt(given[0], tmp_path / "out", given[1], heads=4)
    assert load_mqt(tmp_path / "out").config.num_queries == 16


def test_on_the_command_line(given: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "made" / "out"
    arguments = ["convert", "mqt", str(given[0]), str(out), "--vision-tower", str(given[1]), "--heads", "4"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "98 tensors written to" in done.stdout
    assert "no processor was written" in done.stdout
    load_mqt(out)
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2
    assert "is not overwritten" in " ".join(again.stderr.split())


# ------------------------------------------------------------------------------------------------------------- refusals


def refused(given: tuple[Path, Path], words: str, error: type[Exception] = ValueError, heads: int = 4) -> None:
    """With these words, and nothing is left behind."""
    out = given[0].parent / "out"
    before = sorted(given[0].parent.iterdir())
    with pytest.raises(error, match=re.escape(words)):
        convert_mqt(given[0], out, given[1], heads=heads)
    assert sorted(given[0].parent.iterdir()) == before


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"query_abstractor_type": "resampler"}, "query_abstractor_type='resampler'; only 'matry_query'"),
        ({"query_abstractor_type": None}, "query_abstractor_type=None"),
        ({"model_type": "mpt"}, "model_type='mpt'; only 'llava' or 'llava_llama'"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature='cls_patch'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end=True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio='anyres'"),
        ({"num_visual_tokens": "some"}, "num_visual_tokens='some'"),
        ({"num_visual_tokens": 17}, "num_visual_tokens=17, and the resampler has 16 queries"),
        ({"vocab_size": None}, "vocab_size=None"),
        (
            {"hidden_size": 64, "num_attention_heads": 8},
            "proj is [32, 32], and model.multi_modal_projector.proj",
        ),
        ({"num_hidden_layers": 4}, "lack"),
        ({"num_hidden_layers": 2}, "model.layers.2."),
        ({"rope_theta": 500000.0}, "inv_freq is not what the model would compute"),
    ],
)
def test_a_config_that_is_not_understood(given: tuple[Path, Path], fields: dict[str, Any], words: str) -> None:
    edited(given[0], **fields)
    refused(given, words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.mm_projector.0.weight", "no place in the result: ['model.mm_projector.0.weight']"),
        (PUBLISHED + "mlp.weight", PUBLISHED + "mlp.weight"),
        ("model.vision_tower.vision_tower.vision_model.post_layernorm.bias", "model.vision_tower.vision_tower"),
        ("extra", "['extra']"),
        ("model.layers.9.self_attn.rotary_emb.inv_freq", "inv_freq is not what"),
    ],
)
def test_an_unknown_tensor_is_named(given: tuple[Path, Path], name: str, words: str) -> None:
    retouch(given[0], lambda tensors: tensors.update({name: torch.ones(3)}))
    refused(given, words)


@pytest.mark.parametrize("name", [PUBLISHED + "proj", "model.embed_tokens.weight"])
def test_a_missing_tensor_is_named(given: tuple[Path, Path], name: str) -> None:
    for file in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        retouch(given[0], lambda tensors: tensors.pop(name, None), file)
    where = "model.multi_modal_projector.proj" if "proj" in name else "model.language_model.embed_tokens.weight"
    refused(given, f"lack: ['{where}']")


def test_a_tower_that_does_not_fit(given: tuple[Path, Path]) -> None:
    retouch(given[1], lambda t: t.pop("vision_model.embeddings.class_embedding"), "model.safetensors")
    refused(given, "lack: ['model.vision_tower.embeddings.class_embedding']")
    edited(given[1], model_type="siglip")
    refused(given, "'siglip' model; only CLIP")
    edited(given[1], model_type="clip", vision_config={"hidden_size": 96})
    refused(given, "patches of width 32, and this tower's have 96")
    edited(given[1], vision_config={"hidden_size": 64})
    refused(given, "makes no CLIPVisionConfig")


def test_heads_must_fit(given: tuple[Path, Path]) -> None:
    refused(given, "heads=5", heads=5)


class Trap:
    """What a pickle may do when it is opened."""

    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('a pickle was opened')",))


def test_pickles_are_not_opened(given: tuple[Path, Path]) -> None:
    for path in given[0].glob("*.safetensors*"):
        path.unlink()
    torch.save({"trap": Trap()}, given[0] / "pytorch_model.bin")
    refused(given, "pytorch_model.bin are pickles, which may run code and are not opened", FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="save_file"):
        convert_mqt(given[0], given[0].parent / "out", given[1])


def test_an_index_cannot_point_elsewhere(given: tuple[Path, Path]) -> None:
    path = given[0] / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = "../clip/model.safetensors"
    path.write_text(json.dumps(index))
    refused(given, "names files outside of its folder: '../clip/model.safetensors'")


def test_an_index_that_does_not_tell_the_truth(given: tuple[Path, Path]) -> None:
    path = given[0] / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"more": "model-00001-of-00002.safetensors"}}))
    refused(given, "has 'more', and it has not")
    name, *_ = index["weight_map"]
    path.write_text(json.dumps({"weight_map": {k: v for k, v in index["weight_map"].items() if k != name}}))
    refused(given, f"has '{name}', and the index does not name it")


def test_a_folder_that_is_not_there(given: tuple[Path, Path], tmp_path: Path) -> None:
    (given[0] / "config.json").write_text("{")
    refused(given, "is no JSON")
    (given[0] / "config.json").unlink()
    refused(given, "config.json", FileNotFoundError)


def test_a_failure_leaves_nothing_behind(given: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    refused(given, "no space left", OSError)


# -------------------------------------------------------------------------------------------------------------- loading


def test_loading_what_is_not_whole(given: tuple[Path, Path], tmp_path: Path) -> None:
    convert_mqt(given[0], tmp_path / "out", given[1], heads=4)
    retouch(tmp_path / "out", lambda tensors: tensors.pop("model.multi_modal_projector.query"), "model.safetensors")
    with pytest.raises(ValueError, match=r"is not whole: .*multi_modal_projector.query"):
        load_mqt(tmp_path / "out")


def test_loading_another_model() -> None:
    with pytest.raises(ValueError, match=r"model_type 'llava', not 'llava_mqt'.*vtc convert mqt"):
        load_mqt(vtc_tinyvlm.CHECKPOINT)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_mqt("/nowhere")
