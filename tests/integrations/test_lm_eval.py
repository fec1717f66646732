"""EleutherAI's lm-evaluation-harness: its model for images is patched like any other, in one line."""

import importlib.util

import pytest

import vtc

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed: `nox -s lmms_eval` runs these", allow_module_level=True)

from lm_eval import simple_evaluate
from lm_eval.models.hf_vlms import HFMultimodalLM
from lmms_reference import own_answers

from vtc_lmms_eval import scenes

pytestmark = pytest.mark.lmms_eval

QUESTIONS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The shipped model with a chat template, and its questions."""
    path = tmp_path_factory.mktemp("lm_eval")
    scenes.write(path, QUESTIONS)
    return path


def task(folder):
    """As a file of theirs would say it."""
    return {
        "task": "scenes",
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(folder / "scenes.parquet")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_image": ["image"],
        "doc_to_text": "<image> {{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def test_one_line_patches_its_model(folder):
    """Batches of their own making; the last method loses answers, so that equality says something."""
    lm = HFMultimodalLM(pretrained=str(folder / "model"), device="cpu", dtype="float32", batch_size=5)
    scores = []
    for method in (None, vtc.DivPrune(keep=0.25), vtc.Random(keep=2)):
        handle = vtc.patch(lm.model, method) if method else None
        found = simple_evaluate(model=lm, tasks=[task(folder)], bootstrap_iters=0)
        samples = sorted(found["samples"]["scenes"], key=lambda sample: sample["doc_id"])
        assert [sample["filtered_resps"][0] for sample in samples] == own_answers(method)[:QUESTIONS]
        scores.append(found["results"]["scenes"]["exact_match,none"])
        if handle is not None:
            assert handle.report().tokens_per_layer[-1] == {"divprune": 36, "random": 2}[method.name]
            handle.unpatch()
    assert scores[0] == 1.0
    assert scores[1] >= scores[0] - 0.1
    assert scores[2] < 0.8
