"""The lmms-eval integration, as far as it goes without lmms-eval: arguments, errors, plans, results, recipes."""

import csv
import dataclasses
import json
import subprocess
import sys
import types
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
import torch
from transformers import StoppingCriteriaList

import vtc
import vtc_lmms_eval
import vtc_tinyvlm
from vtc.config import CompressionConfig
from vtc.modules import LlavaMqtForConditionalGeneration
from vtc.profiling.exam import fingerprint
from vtc_lmms_eval import EvaluationStopped, bases, runs, samples, scenes
from vtc_lmms_eval.arguments import split
from vtc_lmms_eval.meter import Clock, Meter

ROOT = Path(__file__).parents[2]


# ------------------------------------------------------------------------------------------------------------ arguments


def asked(**given):
    return split({"base": "llava_hf", "pretrained": "x"} | {k.replace("__", "."): v for k, v in given.items()})


def test_arguments_are_split():
    a = asked(method="divprune", keep=0.25, dtype="float16", positions="compact")
    assert a.base == "llava_hf"
    assert a.rest == {"pretrained": "x", "dtype": "float16"}
    assert a.config.build() == vtc.DivPrune(keep=0.25)
    assert a.config.positions == "compact"


@pytest.mark.parametrize("keep", [1, 1.0, 64])
def test_keep_stays_what_lmms_eval_made_of_it(keep):
    read = asked(method="divprune", keep=keep).config.build().keep
    assert (read, type(read)) == (keep, type(keep))


def test_method_options():
    config = asked(method="todre", keep=0.1, method__stage2=True, method__variant="k_center").config
    assert config.build() == vtc.ToDRE(keep=0.1, stage2=True, variant="k_center")
    nested = asked(method="allocate", keep=0.5, method__selector='{"method":"divprune"}').config
    assert nested.build() == vtc.Allocate(keep=0.5, selector=vtc.DivPrune())
    lists = asked(method="transprune", method__layers="[1,2,3]").config.build()
    assert lists == vtc.TransPrune(layers=(1, 2, 3))


def test_none_is_unpruned():
    assert asked(method="none").config is None


def test_a_config_file_or_its_folder(tmp_path):
    config = CompressionConfig.of(vtc.Chain(vtc.DivPrune(keep=0.5), vtc.TransPrune()))
    file = config.save_pretrained(tmp_path)
    assert asked(vtc_config=str(file)).config.build() == config.build()
    assert asked(vtc_config=str(tmp_path)).config.build() == config.build()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "method=NAME"),
        ({"method": "divprun"}, "did you mean 'divprune'"),
        ({"method": "divprune", "keep": 1.5}, "keep=1.5"),
        ({"method": "divprune", "keep": "half"}, "half"),
        ({"method": "divprune", "method.stage2": True}, "no option 'stage2'"),
        ({"method": "divprune", "positions": "packed"}, "packed"),
        ({"method": "none", "keep": 0.5}, "leave out keep"),
        ({"vtc_config": "nowhere.json"}, "nowhere.json"),
        ({"vtc_config": "nowhere.json", "keep": 0.5}, "leave out keep"),
        ({"base": "", "method": "divprune"}, "base=ID"),
    ],
)
def test_bad_arguments_name_the_value(given, said):
    with pytest.raises((ValueError, TypeError, OSError), match=said):
        split({"base": "llava_hf"} | given)


def test_a_broken_config_is_named(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json"):
        asked(vtc_config=str(tmp_path / "broken.json"))


# ---------------------------------------------------------------------------------------------------------------- bases


@pytest.mark.parametrize("installed", ["0.6.1", "0.7.2", "0.8.0", "1.0"])
def test_versions_outside_the_tested_range(installed):
    with pytest.raises(ValueError, match=f"lmms-eval {installed} is outside the range"):
        bases.check_version(installed)


@pytest.mark.parametrize("installed", ["0.7.3", "0.7.4", "0.7.3+local"])
def test_versions_inside_the_tested_range(installed):
    bases.check_version(installed)


class Base:
    def __init__(self, pretrained="x", device="cuda", device_map=""): ...


class Chat(Base):
    pass


@pytest.mark.parametrize(
    ("given", "processes", "device_map"),
    [
        ({}, 1, "cuda"),
        ({"device": "cpu"}, 1, "cpu"),
        ({"device_map": "auto"}, 1, "auto"),
        ({}, 8, None),
        ({"device": "cpu"}, 2, "cpu"),
    ],
)
def test_an_empty_device_map_is_filled_in(given, processes, device_map):
    assert bases.placed(Chat, given, processes).get("device_map") == device_map


class OneAtATime:
    """As lmms-eval's llava_hf: the assertion comes after the weights."""

    def __init__(self, pretrained="x", batch_size=1):
        self.batch_size_per_gpu = int(batch_size)

    def generate_until(self, requests):
        assert self.batch_size_per_gpu == 1, "Do not support batch_size_per_gpu > 1 for now"


class InTheConstructor:
    """As internvl_hf."""

    def __init__(self, pretrained="x", batch_size=1):
        batch_size_int = int(batch_size)
        assert batch_size_int == 1, f"Batch size should be 1, but got {batch_size_int}."


class Batches(OneAtATime):
    """As qwen2_5_vl; what it inherits and replaces does not count, nor does a remark."""

    def generate_until(self, requests):
        # assert self.batch_size_per_gpu == 1
        assert len(requests) == 1 or self.batch_size_per_gpu > 0


@pytest.mark.parametrize("batch", [8, "8"])
@pytest.mark.parametrize("base", [OneAtATime, InTheConstructor])
def test_a_base_that_takes_no_batches_says_so_before_its_weights_are_loaded(base, batch, monkeypatch):
    monkeypatch.setattr(bases, "version", lambda name: "0.7.3")
    with pytest.raises(ValueError, match=r"base='one' takes one sample at a time.* not --batch_size 8.*batch_size 1"):
        bases.check_batch(base, "one", batch)
    for fine in (1, "1", "auto", None):
        bases.check_batch(base, "one", fine)
    bases.check_batch(Batches, "many", batch)


def test_the_familys_verdict_needs_no_weights(tmp_path):
    config = json.loads((vtc_tinyvlm.CHECKPOINT / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))  # and nothing else
    fits = CompressionConfig.of(vtc.DivPrune(keep=0.25))
    bases.check_family(Base, {"pretrained": str(tmp_path)}, fits)
    with pytest.raises(ValueError, match="thumbnail"):
        bases.check_family(Base, {"pretrained": str(tmp_path)}, CompressionConfig.of(vtc.GlobalCom2(keep=0.25)))
    with pytest.raises(OSError, match="nobody/nothing: its config, the first thing wanted from the hub"):
        bases.check_family(Base, {"pretrained": "nobody/nothing"}, fits)


def test_the_entry_point_is_declared():
    found = {e.name: e.value for e in entry_points(group="lmms_eval.models")}
    if "vtc" not in found:
        pytest.skip("vtc is not installed here, only importable")
    assert found["vtc"] == "vtc_lmms_eval:manifest"


def test_stopping_is_no_exception_that_lmms_eval_would_catch():
    assert not issubclass(EvaluationStopped, Exception)
    assert EvaluationStopped("why").code == "why"  # which Python prints before it ends with status 1


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, vtc_lmms_eval; print('torch' in sys.modules, 'lmms_eval' in sys.modules)"
    path = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=path)
    assert done.stdout.split() == ["False", "False"], done.stderr


# ---------------------------------------------------------------------------------------------------------------- meter


def test_the_clock_counts_steps_and_changes_nothing():
    model, processor = vtc_tinyvlm.load()
    asked = vtc_tinyvlm.evaluation_questions(2)
    inputs = processor(
        images=[q.image for q in asked], text=[q.prompt for q in asked], return_tensors="pt", padding=True
    )
    plain = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    clock, meter = Clock(torch.device("cpu")), Meter()
    with vtc.patch(model, "divprune", keep=36) as handle:
        pruned = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, stopping_criteria=StoppingCriteriaList([clock])
        )
        clock.stop()
        meter.timed(clock)
        meter.counted(2, 288, handle)
    again = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(plain, again)
    assert clock.steps == pruned.shape[1] - inputs["input_ids"].shape[1]
    assert clock.begin < clock.first < clock.end
    summary = Meter.merged([meter, meter]).summary()
    assert summary["vtc_prompts"] == 4
    assert summary["vtc_visual_tokens_before"] == 144
    assert summary["vtc_visual_tokens_after"] == 36
    assert summary["vtc_kept_fraction_over_layers"] == 0.25
    assert 0 < summary["vtc_ttft_ms_median"] < 1e5
    assert summary["vtc_decode_tokens_per_s_and_sequence"] > 0


def test_without_images_there_is_nothing_to_report():
    assert Meter(requests=3).summary() == {}


# ----------------------------------------------------------------------------------------------------------------- runs

SETTINGS = runs.Settings("llava_hf", "model", "cpu", threads=1)


@pytest.fixture
def pretend(monkeypatch):
    """A version of lmms-eval, where there is none."""
    real = version
    monkeypatch.setattr(
        runs.importlib.metadata, "version", lambda name: {"lmms-eval": "0.7.3"}.get(name) or _or_zero(real, name)
    )


def _or_zero(real, name):
    try:
        return real(name)
    except ImportError:
        return "0"


def results(folder, throughput, scores):
    where = folder / "model"
    where.mkdir(parents=True, exist_ok=True)
    (where / "2026_results.json").write_text(json.dumps({"results": scores, "throughput": throughput}))


GOOD = {"avg_vtc_prompts": 4, "avg_vtc_ttft_ms_median": 5.0}
SCORES = {"t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_stderr_clt,none": 0.1}}


def test_a_plan_is_methods_times_keeps_times_tasks(tmp_path):
    file = CompressionConfig.of(vtc.DivPrune()).save_pretrained(tmp_path)
    todo = runs.plan(["none", "divprune", "todre", str(file)], ["0.25", "64"], ["todre.stage2=true"], ["gqa", "pope"])
    assert len(todo) == (1 + 2 + 2 + 1) * 2
    assert todo[0].pruning == ("method=none",)
    assert todo[6].pruning == ("method=todre", "keep=0.25", "method.stage2=true")
    assert todo[-1].pruning == (f"vtc_config={file}",)
    with pytest.raises(ValueError, match="stage2=true"):
        runs.plan(["divprune"], ["0.25"], ["stage2=true"], ["gqa"])


def test_results_are_read_and_not_run_again(tmp_path, pretend):
    (run,) = runs.plan(["divprune"], ["0.25"], [], ["t"])
    folder = run.folder(SETTINGS, tmp_path)
    results(folder, GOOD, SCORES)
    outcome = runs.execute(run, SETTINGS, tmp_path)  # would fail: there is no model named "model"
    assert (outcome.reason, outcome.seconds) == ("", 0.0)
    assert outcome.scores == {("t", "acc"): 0.5}
    assert outcome.numbers == {"prompts": 4, "ttft_ms_median": 5.0}
    other = runs.Settings("llava_hf", "model", "cpu", threads=1, limit=8)
    assert run.folder(other, tmp_path) != folder  # other settings never meet these results


def test_a_changed_config_file_is_another_run(tmp_path, pretend):
    file = CompressionConfig.of(vtc.DivPrune()).save_pretrained(tmp_path)
    (run,) = runs.plan([str(file)], [], [], ["t"])
    before = run.folder(SETTINGS, tmp_path)
    CompressionConfig.of(vtc.DivPrune(keep=0.5)).save_pretrained(tmp_path)
    assert run.folder(SETTINGS, tmp_path) != before


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("pass", "left no result file"),
        ("import sys; sys.exit('vtc: generate raised RuntimeError: boom')", "generate raised RuntimeError: boom"),
        ("raise KeyError('task')", "exit status 1: KeyError: 'task'"),
        (
            "import sys; print('[rank1]: OSError: the port is taken'); "
            "print('torch.distributed.elastic.multiprocessing.errors.ChildFailedError: '); print('=' * 9); sys.exit(1)",
            "exit status 1: OSError: the port is taken",
        ),
        ("import sys; print('=' * 60); sys.exit(3)", "exit status 3: nothing was said"),
    ],
)
def test_a_failing_run_says_why(tmp_path, pretend, monkeypatch, code, said):
    monkeypatch.setattr(runs.Run, "command", lambda self, settings, folder: [sys.executable, "-c", code])
    (run,) = runs.plan(["divprune"], ["0.25"], [], ["t"])
    assert said in runs.execute(run, SETTINGS, tmp_path).reason


@pytest.mark.parametrize(
    ("throughput", "scores", "said"),
    [({}, SCORES, "never fired"), (GOOD, {}, "no score"), (GOOD, {"t": {"acc,none": float("nan")}}, "no score")],
)
def test_results_that_do_not_count(tmp_path, throughput, scores, said):
    (run,) = runs.plan(["divprune"], ["0.25"], [], ["t"])
    results(tmp_path, throughput, scores)
    assert said in runs.read(run, tmp_path).reason


def test_a_damaged_result_file(tmp_path):
    (run,) = runs.plan(["divprune"], ["0.25"], [], ["t"])
    (tmp_path / "x_results.json").write_text("{")
    assert "cannot be read" in runs.read(run, tmp_path).reason


def test_the_progress_is_that_of_the_answers(tmp_path, pretend, monkeypatch):
    code = "print('Model Responding:  40%|##'); print('Model Responding: 100%|##')"
    monkeypatch.setattr(runs.Run, "command", lambda self, settings, folder: [sys.executable, "-c", code])
    seen = []
    runs.execute(runs.plan(["none"], [], [], ["t"])[0], SETTINGS, tmp_path, seen.append)
    assert seen[-1] == 1.0


def test_the_table_joins_tasks(tmp_path):
    a, b = runs.plan(["divprune"], ["0.25"], [], ["t", "u"])
    w, x = runs.plan(["none"], [], [], ["t", "u"])
    outcomes = [
        runs.Outcome(w, "", {("t", "acc"): 0.8}, {"prompts": 1.0}),
        runs.Outcome(x, "", {("u", "acc"): 0.5}, {"prompts": 1.0}),
        runs.Outcome(a, "", {("t", "acc"): 0.4}, {"prompts": 1.0, "ttft_ms_median": 1.0}),
        runs.Outcome(b, "", {("u", "acc"): 0.5}, {"prompts": 3.0, "ttft_ms_median": 5.0}),
    ]
    said = {("t", "0"): "a", ("t", "1"): "b"}, {("u", "0"): "c"}, {("t", "0"): "a", ("t", "1"): "x"}, {("u", "0"): "c"}
    outcomes = [dataclasses.replace(o, said=each) for o, each in zip(outcomes, said, strict=True)]
    whole, pruned = runs.joined(outcomes)
    assert samples.loyalty(pruned.said, whole.said) == pytest.approx(2 / 3)
    assert pruned.numbers == {"prompts": 4.0, "ttft_ms_median": 4.0}
    assert runs.retention(pruned, whole, runs.headlines(outcomes)) == pytest.approx(0.75)
    runs.write_csv(outcomes, tmp_path / "summary.csv")
    rows = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert [row["loyalty"] for row in rows] == ["1.0", "1.0", "0.5", "1.0"]
    runs.write_csv(outcomes[2:], tmp_path / "summary.csv")  # nothing to be loyal to
    assert [row["loyalty"] for row in csv.DictReader((tmp_path / "summary.csv").open())] == ["", ""]


def test_answers_are_read_from_the_log_of_the_same_run(tmp_path):
    results(tmp_path, GOOD, SCORES)
    where = tmp_path / "model"
    lines = [{"doc_id": 0, "filtered_resps": "a  cat"}, {"doc_id": 1, "filtered_resps": ["yes", 2]}]
    (where / "2026_samples_t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (where / "2025_samples_t.jsonl").write_text("an older run's\n")
    found = runs.read(runs.plan(["none"], [], [], ["t"])[0], tmp_path)
    assert not found.reason
    assert found.said == {("t", "0"): fingerprint("a cat"), ("t", "1"): fingerprint('["yes", 2]')}
    assert samples.loyalty(found.said, {("t", "1"): fingerprint("no")}) == 0.0
    assert samples.loyalty(found.said, {}) is None
    (where / "2026_samples_t.jsonl").write_text("{}\n")
    assert "cannot be read: KeyError" in runs.read(found.run, tmp_path).reason


# --------------------------------------------------------------------------------------------------------------- scenes


def test_scenes_are_scored_as_our_own_evaluation_scores_them():
    doc = {"answer": "red", "type": "color"}
    right = scenes.process_results(doc, ["Red red"])
    assert right["answer"]["score"] == right["answer_color"] == 1.0
    assert right["exact"]["score"] == 0.0
    scores = [{"type": "color", "score": 1.0}, {"type": "rel", "score": 0.0}, {"type": "count", "score": 0.0}]
    assert scenes.headline(scores) == 0.5  # count is left out


def test_the_task_is_written_with_the_model(tmp_path):
    scenes.write(tmp_path, 6)
    assert "vtc_scenes" in (tmp_path / "vtc_scenes.yaml").read_text()
    assert vtc_tinyvlm.load(tmp_path / "model")[1].chat_template == scenes.CHAT_TEMPLATE
    with pytest.raises(ValueError, match="0"):
        scenes.write(tmp_path, 0)


# -------------------------------------------------------------------------------------------------------------- recipes


@pytest.fixture
def reproduce(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "reproduce"))
    import reproduce

    return reproduce


def test_every_recipe_is_a_method_that_can_be_built(reproduce):
    for recipe in reproduce.RECIPES:
        given = dict(argument.split("=", 1) for argument in recipe.pruning)
        given["keep"] = int(given["keep"]) if given["keep"].isdigit() else float(given["keep"])
        given = {k: v == "true" if v in ("true", "false") else v for k, v in given.items()}
        assert split({"base": recipe.base} | given).config.method == given["method"]


def test_the_readme_shows_the_recipes(reproduce):
    assert reproduce.markdown() in (ROOT / "benchmarks" / "reproduce" / "README.md").read_text()


def test_the_methods_pages_speak_the_arguments():
    for name in ("divprune", "todre", "idpruner", "transprune", "globalcom2", "chain", "allocate"):
        text = (ROOT / "vtc" / "methods" / f"{name}.py").read_text()
        assert f",method={name},keep=" in text
        assert "vtc_method" not in text


def test_a_reproduction_is_judged(reproduce):
    recipe = next(r for r in reproduce.RECIPES if r.name == "divprune-next")
    whole = {("gqa", "exact_match"): 0.643, ("pope", "pope_f1_score"): 0.86, ("mme", "mme_perception_score"): 1500.0}
    pruned = {("gqa", "exact_match"): 0.55, ("pope", "pope_f1_score"): 0.83, ("mme", "mme_perception_score"): 1362.0}
    assert [fits for _, fits in reproduce.judged(recipe, whole, pruned)] == [True, False, True, True, True, True]
    todre = next(r for r in reproduce.RECIPES if r.name == "todre-10")
    whole = dict.fromkeys(todre.retention.over, 0.8)
    assert reproduce.judged(todre, whole, dict.fromkeys(whole, 0.76))[0][1]
    assert not reproduce.judged(todre, whole, dict.fromkeys(whole, 0.7))[0][1]


def test_a_base_that_picks_classes_by_type_learns_of_mqt(monkeypatch):
    """As llava_hf does; what it knows stays, and a module without such a table is left alone."""
    module = types.ModuleType("stand_in")
    module.model_map = {"llava": "theirs"}
    monkeypatch.setitem(sys.modules, "stand_in", module)
    for table in ({"llava": "theirs"}, {"llava": "theirs", "llava_mqt": "their own"}, {"other": "theirs"}):
        module.model_map = dict(table)
        bases.teach(type("Base", (), {"__module__": "stand_in"}))
        assert module.model_map | table == module.model_map
        known = module.model_map.get("llava_mqt")
        assert known == table.get("llava_mqt", LlavaMqtForConditionalGeneration if "llava" in table else None)


def test_only_commands_know_the_integration():
    assert vtc_lmms_eval.MODEL_ID == "vtc"
    sources = [path for path in (ROOT / "vtc").rglob("*.py") if path.parent.name != "commands"]
    assert sources
    assert not any("vtc_lmms_eval" in path.read_text() for path in sources)
