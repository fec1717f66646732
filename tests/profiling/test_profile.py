"""`vtc profile`: times are where the time went, wrong results are no gains, inputs need no processor."""

import csv
import dataclasses
import itertools
import json
import time
from pathlib import Path

import pytest
import torch
import zoo
from typer.testing import CliRunner

import vtc
from vtc.cli import app
from vtc.methods import Reduction, Stage, method_class, register_method, registry
from vtc.methods.random import Random
from vtc.models import resolve
from vtc.places import Entry, Layer
from vtc.profiling.correctness import faults
from vtc.profiling.ledger import Ledger
from vtc.profiling.measure import profile
from vtc.profiling.memory import with_peak
from vtc.profiling.spread import Spread
from vtc.profiling.timing import time_decode, time_prefill
from vtc.profiling.workload import Workload, random_model
from vtc.signals import Transitions

tiny = pytest.importorskip("vtc_tinyvlm")
NAP = 0.3
NEXT_SMALL = Path(__file__).parents[2] / "benchmarks" / "configs" / "llava_next_small"


@pytest.fixture(scope="module")
def model():
    return tiny.load()[0]


@pytest.fixture
def methods():
    """Methods registered in a test are forgotten after it."""
    before = dict(registry._REGISTRY)
    yield
    registry._REGISTRY.clear()
    registry._REGISTRY.update(before)


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "160", "NO_COLOR": "1"})


# ------------------------------------------------------------------------------------------------------------ measuring


def test_a_spread_is_the_median_between_the_outer_tenths():
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of(list(range(101))) == Spread(50, 10, 90)
    assert Spread.range([5, 1, 2]) == Spread(2, 1, 5)


def test_what_is_measured_on_the_shipped_model(model):
    full, pruned = profile(model, Workload(text=16), "divprune", 0.25, [4], repeats=3, new_tokens=2)
    assert (full.config, full.speedup, full.ideal, full.select.high) == (None, None, None, 0.0)
    assert (pruned.method, pruned.keep, pruned.visual_tokens, pruned.kept_tokens) == ("divprune", 0.25, 144, 36)
    assert pruned.select.low > 0
    assert full.vision.low > 0
    assert pruned.faults == ()
    token = 2 * 5 * 3 * 64 * 4  # key and value, layers, heads, width, bytes of a float
    assert (full.cache_bytes, pruned.cache_bytes) == (4 * 160 * token, 4 * 52 * token)
    assert pruned.speedup.median > 1.1  # ideal 1.96; in one round both runs suffer alike from a busy machine
    assert pruned.realised.median == pytest.approx(pruned.speedup.median / pruned.ideal)
    assert pruned.decode.median > 0


def test_the_ideal_is_the_ratio_of_flops_by_hand(model):
    _, pruned = profile(model, Workload(text=16), "grid", 36, [2], repeats=1, warmup=0)
    d, f = 128, 512

    def block(rows):
        return 2 * rows * (4 * d * d + 2 * d * f) + 4 * rows**2 * d

    patches = 2 * 144 * 3 * 8 * 8 * d
    tower, without_the_unread = patches + 5 * block(145), patches + 4 * block(145) + block(1)
    projector = 2 * 144 * (128 * 192 + 192 * 192)

    def language_model(n):
        return (
            5 * (2 * n * (4 * 192 * 192 + 3 * 192 * 512) + 2 * n * n * 192)
            + 2 * 192 * model.config.text_config.vocab_size
        )

    ideal = (tower + projector + language_model(160)) / (without_the_unread + projector + language_model(52))
    assert pruned.ideal == pytest.approx(ideal, rel=1e-3)


def test_parts_are_where_the_time_went(model, methods):
    @register_method
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Sleepy(Random):
        name = "sleepy"

        def reduce(self, stage, tokens, budget):
            time.sleep(NAP)
            return super().reduce(stage, tokens, budget)

    inputs, (adapter, parts) = Workload(text=4).inputs(model, 1), resolve(model)

    def asleep(module):
        return module.register_forward_hook(lambda *ignored: time.sleep(NAP))

    with vtc.patch(model, "sleepy", keep=0.25):
        in_select = time_prefill(model, inputs)
        hook = asleep(adapter.tower(parts.base, "image").layers[0])
        in_vision = time_prefill(model, inputs)
        hook.remove()
        hook = asleep(parts.layers[0].input_layernorm)
        in_prefill = time_prefill(model, inputs)
        hook.remove()
    assert all(run.select >= NAP for run in (in_select, in_vision, in_prefill))
    assert [run.vision >= NAP for run in (in_select, in_vision, in_prefill)] == [False, True, False]
    assert [run.prefill >= NAP for run in (in_select, in_vision, in_prefill)] == [False, False, True]


def test_what_a_method_does_inside_the_model_is_selecting(model, monkeypatch):
    def slow(self, *arguments):
        time.sleep(NAP / 4)
        return score(self, *arguments)

    score = Transitions.score
    inputs = Workload(text=4).inputs(model, 1)
    monkeypatch.setattr(Transitions, "score", slow)
    with vtc.patch(model, "transprune"):
        run = time_prefill(model, inputs)
    assert run.select >= 4 * NAP / 4  # attention and MLP of the three layers behind its first stage, less the last
    assert run.prefill < run.select


def test_measuring_leaves_nothing_behind(model):
    def hooks():
        return [(len(m._forward_pre_hooks), len(m._forward_hooks), sorted(m.__dict__)) for m in model.modules()]

    before = hooks()
    profile(model, Workload(text=4), ["transprune", "todre"], 0.5, repeats=1, warmup=0, new_tokens=1)
    assert hooks() == before


def test_a_decode_step_is_timed_from_one_pass_to_the_next(model):
    hook = model.register_forward_pre_hook(lambda *ignored: time.sleep(0.1))
    steps = time_decode(model, Workload(text=4).inputs(model, 1), 3)
    hook.remove()
    assert len(steps) == 3
    assert min(steps) >= 0.1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_is_what_a_run_needed():
    def run():
        torch.ones(64, 2**20).sum()
        return "done"

    assert with_peak(torch.device("cpu"), lambda: None)[1] < 2**26
    result, peak = with_peak(torch.device("cpu"), run)
    assert result == "done"
    assert 0.95 * 2**28 <= peak < 1.25 * 2**28


# -------------------------------------------------------------------------------------------------------- wrong results


def broken(at, kept):
    """A method that keeps what it likes, whatever keep is."""
    members = {
        "name": "broken",
        "stages": lambda self, model: (Stage(at),),
        "counts": lambda self, layouts, stage=None, given=None: None,
        "reduce": lambda self, stage, tokens, budget: Reduction.of_mask(*kept(tokens)),
    }
    return register_method(dataclasses.dataclass(frozen=True, kw_only=True)(type("Broken", (Random,), members)))


def drop_always(tokens):
    mask = tokens.mask.clone()
    mask[:, 0] = False
    return mask, tuple(n - 1 for n in tokens.lengths)


def drop_never(tokens):
    return tokens.mask, tokens.lengths


@pytest.mark.parametrize(
    ("at", "kept", "told"),
    [
        (Layer(1), drop_always, "with keep=1.0 its logits differ"),
        (Entry(), drop_never, "keeps 288 of 288 tokens"),
    ],
)
def test_a_wrong_result_is_no_gain(model, methods, at, kept, told):
    broken(at, kept)
    _, wrong, right = profile(model, Workload(text=4), ["broken", "random"], 0.25, [2], repeats=1, warmup=0)
    assert told in "; ".join(wrong.faults)
    assert (wrong.speedup, wrong.realised) == (None, None)
    assert right.faults == ()
    assert right.speedup is not None


def test_logits_that_are_no_numbers_are_a_fault(model):
    with vtc.patch(model, "grid", keep=0.5) as handle:
        logits = model(**Workload(text=4).inputs(model, 1)).logits
        assert faults(handle, logits) == []
        assert faults(handle, logits * torch.nan) == ["its logits are not finite"]


def test_the_command_says_so_and_ends_with_1(methods, tmp_path):
    broken(Layer(1), drop_always)
    small = ("--text", 4, "--repeats", 1, "--new-tokens", 0)
    result = invoke("profile", "tinyvlm", "--method", "broken", *small, "--out", tmp_path)
    assert result.exit_code == 1
    assert "broken keep=0.25 batch=1: with keep=1.0 its logits differ" in result.stderr
    (_, row) = csv.DictReader((tmp_path / "profile.csv").open())
    assert (row["correct"], row["speedup"]) == ("False", "")


# --------------------------------------------------------------------------------------------------------------- inputs

UNKNOWN = ("idefics3", "smolvlm", "gemma4", "gemma4_bidirectional", "video_llava")
FAMILIES = [name for name in zoo.FAMILIES if not name.endswith(("_video", "adjacent")) and name not in UNKNOWN]


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_from_a_config_are_what_the_model_takes(family):
    model = zoo.get_model(family)
    _, parts = resolve(model)
    inputs = Workload(image=(64, 32), text=6, settings={"min_pixels": 64}).inputs(model, 2)
    ids = inputs["input_ids"]
    visual = ids == parts.placeholders["image"]
    assert (~visual).sum(1).tolist() == [6, 6]
    assert not set(ids[~visual].tolist()) & set(zoo.SPECIAL_IDS)
    with vtc.patch(model, "grid", keep=0.5) as handle, torch.inference_mode():
        logits = model(**inputs).logits
    assert sum(map(len, handle.last_keep[0])) == pytest.approx(visual[0].sum() / 2, abs=1)
    assert not torch.equal(logits[0], logits[1])  # samples have pixels of their own


def test_token_counts_are_those_of_the_papers():
    model = random_model(NEXT_SMALL)
    counts = []
    for size in ((672, 672), (336, 672), (640, 480)):
        ids = Workload(image=size).inputs(model, 1)["input_ids"]
        counts.append(int((ids == model.config.image_token_id).sum()))
    assert counts == [576 + 48 * 49, 576 + 48 * 25, 576 + 36 * 49]
    model = zoo.get_model("qwen2_5_vl")
    grids = [
        Workload(image=(64, 32), settings=settings).inputs(model, 1)["image_grid_thw"].tolist()
        for settings in ({"min_pixels": 64}, None)
    ]
    assert grids == [[[1, 16, 32]], [[1, 20, 40]]]  # cells of 2 pixels; Qwen's processor makes pictures 56x56 at least


def test_a_processor_cuts_the_picture_where_there_is_one(model):
    _, processor = tiny.load()
    with_one, without = (Workload((200, 120), 9).inputs(model, 2, which) for which in (processor, None))
    assert {n: x.shape for n, x in with_one.items()} == {n: x.shape for n, x in without.items()}
    assert with_one["input_ids"][0, 0] == processor.tokenizer.bos_token_id


def test_random_weights_are_not_zero_and_always_the_same():
    one, two = (random_model(NEXT_SMALL) for _ in range(2))
    assert type(one).__name__ == "LlavaNextForConditionalGeneration"
    for name, weight in one.named_parameters():
        assert weight.dim() < 2 or weight.std() > 1e-3, name
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    half = random_model(NEXT_SMALL / "config.json", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"image": (0, 5)}, "image=0x5"),
        ({"image": (4, 1000)}, "more than 200 times"),
        ({"text": 0}, "text=0"),
    ],
)
def test_a_workload_that_cannot_be(arguments, told):
    with pytest.raises(ValueError, match=told):
        Workload(**arguments)


def test_what_is_not_known_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="'idefics3' makes of a picture is not known"):
        Workload().inputs(zoo.get_model("idefics3"), 1)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="'llama', has no vision tower"):
        random_model(tmp_path)
    for wrong in ({"repeats": 0}, {"batches": [0]}, {"new_tokens": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            profile(model, Workload(), "grid", 0.5, **wrong)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "name a checkpoint, or a config"),
        (("tinyvlm", "--random-weights", "x"), "exactly one of them"),
        (("--random-weights", "/no/where"), "there is no '/no/where'"),
        (("tinyvlm", "--method", "divprun"), "unknown method 'divprun'; did you mean 'divprune'"),
        (("tinyvlm", "--keep", "0.5,2.5"), "keep=2.5"),
        (("tinyvlm", "--keep", ","), "--keep ',' is an empty list"),
        (("tinyvlm", "--batch", "1,0"), "0 is below 1"),
        (("tinyvlm", "--batch", "one"), "not a list of whole numbers"),
        (("tinyvlm", "--image", "big"), "WIDTHxHEIGHT"),
        (("tinyvlm", "--image", "1x999"), "processors refuse"),
        (("tinyvlm", "--dtype", "float12"), "float12"),
        (("tinyvlm", "--device", "toaster"), "toaster"),
        (("tinyvlm", "--method", "globalcom2"), "globalcom2"),
    ],
)
def test_bad_arguments_are_one_line(arguments, told):
    result = invoke("profile", *arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert told in line


# ------------------------------------------------------------------------------------------------------ what is written


def test_the_command_writes_table_json_rows_and_chart(tmp_path):
    small = ("profile", "tinyvlm", "--text", 4, "--repeats", 1, "--new-tokens", 1, "--out", tmp_path)
    result = invoke(*small, "--method", "divprune,grid", "--keep", "0.5,36", "--batch", "1,2")
    assert result.exit_code == 0, result.output
    for text in ("unpruned", "divprune 0.5", "grid 36", "realised", "Measured on cpu"):
        assert text in result.stdout
    assert "…" not in result.stdout  # 80 columns are enough
    rows = list(csv.DictReader((tmp_path / "profile.csv").open()))
    keys = [(row["batch"], row["method"], row["keep"]) for row in rows]
    wanted = [("none", "1.0"), *itertools.product(("divprune", "grid"), ("0.5", "36"))]
    assert keys == [(batch, *cell) for batch in "12" for cell in wanted]
    for name in (
        "date",
        "device",
        "driver",
        "torch",
        "triton",
        "transformers",
        "model",
        "dtype",
        "ttft_ms",
        "ttft_ms_p90",
    ):
        assert rows[1][name], name
    document = json.loads((tmp_path / "profile.json").read_text())
    assert [each["method"] for each in document["measurements"]] == [row["method"] for row in rows]
    assert (tmp_path / "profile.png").stat().st_size > 10_000
    rows_alone = ("--out", tmp_path / "profile.csv")  # the last --out counts
    assert invoke(*small, "--method", "grid", "--calibration", "size+distance", *rows_alone).exit_code == 0
    longer = list(csv.DictReader((tmp_path / "profile.csv").open()))
    assert [row["calibration"] for row in longer] == [""] * (len(rows) + 1) + ["size+distance"]
    assert json.loads((tmp_path / "profile.json").read_text()) == document


def test_all_means_every_method_that_fits(monkeypatch):
    ours = [name for name in vtc.list_methods() if method_class(name).__module__.startswith("vtc.")]
    monkeypatch.setattr(registry, "_REGISTRY", {name: method_class(name) for name in ours})  # tests add others
    result = invoke("profile", "tinyvlm", "--method", "all", "--text", 4, "--repeats", 1, "--new-tokens", 0)
    assert result.exit_code == 0, result.output
    for name in ours:
        assert name in result.stdout
    assert "left out: globalcom2" in result.stdout.replace("\n", " ")


def test_a_ledger_goes_on_where_it_stopped(tmp_path):
    path, told = tmp_path / "rows.csv", []
    first = Ledger(path, ["a", "b"])
    first.add({"a": 1, "b": None})
    first.add({"a": 0.123456789, "b": 'x,"y"\nz'})
    whole = path.read_bytes()
    path.write_bytes(whole + b"3,unfin")
    again = Ledger(path, ["a", "b"], told.append)
    assert again.rows == [{"a": "1", "b": ""}, {"a": "0.123457", "b": 'x,"y"\nz'}] == first.rows
    assert path.read_bytes() == whole
    assert "'3,unfin'" in told[0]
    with pytest.raises(ValueError, match="does not fit"):
        again.add({"a": 1})


@pytest.mark.parametrize("content", [b"\xff\xfe\x00rubbish", b"name,age\nx,3\n", b"a,b\n1\n", b'a,b\n"1\n', b"a,b"])
def test_a_file_that_is_another_is_kept(tmp_path, content):
    path, told = tmp_path / "rows.csv", []
    for number in (1, 2):
        path.write_bytes(content)
        ledger = Ledger(path, ["a", "b"], told.append)
        assert ledger.rows == []
        ledger.add({"a": 1, "b": 2})
        assert (tmp_path / f"rows.aside{number}.csv").read_bytes() == content
        assert f"rows.aside{number}.csv" in told[-1]
        assert path.read_text() == "a,b\n1,2\n"
