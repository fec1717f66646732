"""lmms-eval's `llava`, which runs the original LLaVA code, as a base of ours. `nox -s lmms_eval` runs these."""

import importlib.util

import pytest
import torch

if any(importlib.util.find_spec(name) is None for name in ("lmms_eval", "llava")):
    pytest.skip("lmms-eval or llava-torch is not installed: `nox -s lmms_eval` runs these", allow_module_level=True)

import llava_models
import transformers as tf
from llava.model.builder import load_pretrained_model
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from lmms_reference import answers, evaluate
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import vtc
from vtc_lmms_eval import EvaluationStopped, scenes

pytestmark = pytest.mark.lmms_eval
QUESTIONS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The scenes, and a tiny checkpoint of the original code with a tokenizer of few words."""
    path = tmp_path_factory.mktemp("lmms_eval_llava")
    scenes.write(path, 6)
    model = llava_models.make(mm_use_im_patch_token=False)
    model.save_pretrained(path / "llava-tiny")
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, 120)}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tf.PreTrainedTokenizerFast(tokenizer_object=backend, **named).save_pretrained(path / "llava-tiny")
    return path


def arguments(folder, pruning):
    return f"base=llava,pretrained={folder / 'llava-tiny'},device_map=auto,{pruning}"


@pytest.mark.parametrize(("pruning", "left"), [("method=none", 16), ("method=divprune,keep=0.25", 4)])
def test_answers_are_those_of_the_patched_model(folder, pruning, left, monkeypatch):
    calls = []
    generate = LlavaLlamaForCausalLM.generate

    def recorded(self, *args, **kwargs):
        calls.append((args, {k: v for k, v in kwargs.items() if k != "stopping_criteria"}))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(LlavaLlamaForCausalLM, "generate", recorded)
    result = evaluate(folder, arguments(folder, pruning), limit=QUESTIONS)
    monkeypatch.undo()
    numbers = result["throughput"]
    assert numbers["avg_vtc_prompts"] == QUESTIONS
    assert numbers["avg_vtc_visual_tokens_before"] == 16
    assert numbers["avg_vtc_visual_tokens_after"] == left
    where = str(folder / "llava-tiny")
    tokenizer, model, _, _ = load_pretrained_model(where, None, "llava-tiny", device_map="auto")
    with vtc.patch(model, "divprune", keep=left / 16), torch.no_grad():
        texts = [
            tokenizer.decode(model.generate(*args, **kwargs)[0], skip_special_tokens=True) for args, kwargs in calls
        ]
    assert sorted(text.strip() for text in texts) == sorted(answers(result))


def test_a_pruner_that_does_not_fire_ends_the_evaluation(folder, monkeypatch):
    monkeypatch.setattr("vtc_llava.seam._Seam.watch", lambda self, args, kwargs, given: self.prepare(*args, **kwargs))
    with pytest.raises(
        EvaluationStopped, match="the pruner did not fire for a prompt with any number of visual tokens"
    ):
        evaluate(folder, arguments(folder, "method=divprune,keep=0.25"), limit=1)
