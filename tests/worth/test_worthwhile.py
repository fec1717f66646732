"""`vtc.patch(..., when="worthwhile")`: the unpruned answer or the pruned one to the bit, by what the device does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from generating import generate, prepared, second_turn
from methods.every import SAMPLES
from nosync import NoSync
from release import CACHE
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner
from zoo import get_model, make_batch

import vtc
import vtc_tinyvlm
from vtc import cache
from vtc.binding import bind
from vtc.cli import app
from vtc.compress import compress_inputs
from vtc.devices import Device
from vtc.dialect import compilers
from vtc.engine.locate import Located
from vtc.engine.verdict import Verdict
from vtc.methods.stages import Step, steps_of
from vtc.models import resolve
from vtc.profiling.exam import Answers
from vtc.profiling.measure import profile
from vtc.profiling.tune import tune
from vtc.tokens import Layout
from vtc.worth import judge, overhead, pace, selection_time
from vtc.worth.overhead import Overhead, overhead_of
from vtc.worth.pace import Pace, pace_of
from vtc.worth.selection_time import SIZES, SelectionTime, selection_time_of
from vtc_lmms_eval.arguments import split
from vtc_vllm.settings import read, settled

CPU, FLOAT = torch.device("cpu"), torch.float32
SLOW = Pace(Device("a slow device", 1e6, 1e6, math.inf), 1e-6, queues=False)
FAST = Pace(Device("a fast device", 1e15, 1e15, math.inf), 1e-6, queues=False)
INSTANTLY, QUICK = SelectionTime((64,), (1e-6,), (1e-6,)), Overhead(1e-5, 1e-6, 1e-5)
TINY = str(vtc_tinyvlm.CHECKPOINT)

Set = Callable[[Pace], None]


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is known of this machine, and nothing is left on it."""
    monkeypatch.setenv(cache.CACHE, str(tmp_path / "cache"))


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Set:
    """Let the device be one that was made up."""

    def choose(device: Pace) -> None:
        monkeypatch.setattr(judge, "pace_of", lambda *ignored: device)
        monkeypatch.setattr(judge, "selection_time_of", lambda *ignored: INSTANTLY)
        monkeypatch.setattr(judge, "overhead_of", lambda *ignored: QUICK)

    return choose


def logits(model: Any, inputs: Any) -> Any:
    with torch.inference_mode():
        return model(**inputs, use_cache=True)


def same(a: Any, b: Any) -> bool:
    """Outputs equal to the bit, cache and all."""
    layers = zip(a[CACHE].layers, b[CACHE].layers, strict=True)
    stored = all(torch.equal(x.keys, y.keys) and torch.equal(x.values, y.values) for x, y in layers)
    return stored and torch.equal(a.logits, b.logits)


# ----------------------------------------------------------------------------------------------------- one or the other


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llava", "divprune"),
        ("llava_next", "fastv"),
        ("qwen2_5_vl", "divprune"),
        ("gemma3", "fastv"),
        ("llava", "dart"),
    ],
)
def test_a_prompt_is_pruned_or_left_alone_to_the_bit(family: str, method: str, on: Set) -> None:
    model, batch = prepared(family, images_per_sample=(1, 2, 0))
    plain = logits(model, batch)
    with vtc.patch(model, SAMPLES[method]) as handle:
        pruned, kept = logits(model, batch), handle.last_keep
    assert plain.logits.shape != pruned.logits.shape
    on(FAST)
    with vtc.patch(model, SAMPLES[method], when="worthwhile") as handle:
        assert same(logits(model, batch), plain)
        report = handle.report()
        assert report.verdict is not None
        assert not report.verdict.pays
        assert str(report).startswith(f"left alone: {report.verdict.visual} visual tokens; pruning saves ")
        assert report.verdict.visual == sum(layout.length for row in handle.last_layouts or () for layout in row)
        assert set(report.tokens_per_layer) == {report.visual_tokens}
        assert report.flops == report.flops_unpruned
        assert handle.last_columns is None
        assert [[len(k) for k in row] for row in handle.last_keep or ()] == [
            [layout.length for layout in row] for row in handle.last_layouts or ()
        ]
    on(SLOW)
    with vtc.patch(model, SAMPLES[method], when="worthwhile") as handle:
        assert same(logits(model, batch), pruned)
        assert str(handle.report()).startswith("worthwhile: ")
        assert all(
            torch.equal(a, b)
            for mine, theirs in zip(handle.last_keep or (), kept or (), strict=True)
            for a, b in zip(mine, theirs, strict=True)
        )


@pytest.mark.parametrize(
    ("method", "how"),
    [
        ("divprune", {}),
        ("fastv", {"cache_implementation": "static"}),
        ("transprune", {"num_beams": 2}),
    ],
)
def test_generation_of_what_is_left_alone_is_the_unpatched_models(method: str, how: dict[str, Any], on: Set) -> None:
    model, batch = prepared("llava")
    options = {"output_logits": True, "return_dict_in_generate": True, **how}
    plain = generate(model, batch, **options)
    with vtc.patch(model, SAMPLES[method]):
        pruned = generate(model, batch, **options)
    for device, expected in ((FAST, plain), (SLOW, pruned)):
        on(device)
        with vtc.patch(model, SAMPLES[method], when="worthwhile"):
            found = generate(model, batch, **options)
        assert torch.equal(found.sequences, expected.sequences)
        assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))


def test_a_later_turn_on_a_prompt_that_was_left_alone(on: Set) -> None:
    model, batch = prepared("llava", images_per_sample=(1, 1), padding="none")

    def both() -> Any:
        first = generate(model, batch, return_dict_in_generate=True)
        _, more = second_turn(batch, first.sequences)
        return generate(model, more, **{CACHE: first[CACHE]})

    expected = both()
    on(FAST)
    with vtc.patch(model, vtc.FastV(keep=0.4, layer=1), when="worthwhile"):
        assert torch.equal(both(), expected)


@pytest.mark.parametrize("calibration", ["size+distance", "size"])
def test_attention_is_not_calibrated_where_nothing_left(calibration: str, on: Set) -> None:
    model, batch = prepared("llava")
    plain = logits(model, batch)
    on(FAST)
    method = vtc.Merge(vtc.DivPrune(keep=0.4))
    with vtc.patch(model, method, when="worthwhile", calibration=calibration):
        assert same(logits(model, batch), plain)


def test_hidden_images_and_padding_on_the_right(on: Set) -> None:
    model, batch = prepared("llava", padding="right")
    batch["attention_mask"][0, batch.images[0][0][:3]] = 0
    plain = logits(model, batch)
    on(FAST)
    with vtc.patch(model, vtc.DivPrune(keep=0.4), when="worthwhile") as handle:
        assert same(logits(model, batch), plain)
        assert len((handle.last_keep or [])[0][0]) == len(batch.images[0][0]) - 3


def test_batch_decides(on: Set) -> None:
    """A device with a queue: one prompt keeps it waiting for orders, many do not."""
    model = get_model("llava")
    on(replace(FAST, device=Device("between", 1e9, 1e15, math.inf), operation=1e-4, queues=True))
    with vtc.patch(model, vtc.DivPrune(keep=0.4), when="worthwhile") as handle:
        found = []
        for samples in (1, 64):
            logits(model, make_batch("llava", (1,) * samples))
            found.append(handle.report().verdict)
    assert [verdict.pays for verdict in found] == [False, True]
    assert found[0].saves == 0.0
    assert found[0].costs < found[1].costs


def test_deciding_waits_for_no_device(on: Set) -> None:
    model, batch = prepared("llava", images_per_sample=(1, 1), padding="none")
    for device in (FAST, SLOW):
        on(device)
        handle = vtc.patch(model, vtc.FasterVLM(keep=0.5), when="worthwhile")
        plan = handle.stage.before_decoder

        def hook(*args: Any, plan: Any = plan) -> Any:
            with NoSync():
                return plan(*args)

        handle.stage.before_decoder = hook  # type: ignore[method-assign]
        with handle:
            logits(model, batch)
        assert handle.report().verdict is not None


def test_without_it_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "pace_of", lambda *ignored: pytest.fail("measured"))
    for config in (vtc.DivPrune(keep=0.5), vtc.CompressionConfig("divprune", when="always")):
        with vtc.patch(get_model("llava"), config) as handle:
            assert handle.stage.judge is None
    with vtc.patch(get_model("llava"), "divprune", keep=1.0, when="worthwhile") as handle:  # nothing to decide
        assert handle.stage.judge is None


# ------------------------------------------------------------------------------------------------------------- refusals


@contextmanager
def untouched(model: Any) -> Iterator[None]:
    """What happens here leaves no trace on a model."""

    def seen() -> Any:
        hooks = [(dict(m._forward_pre_hooks), dict(m._forward_hooks)) for m in model.modules()]
        return hooks, [set(m.__dict__) for m in model.modules()]

    before = seen()
    yield
    assert seen() == before


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (SAMPLES["intower"], "'intower' lets patches leave inside the vision tower before.*'divprune'"),
        (SAMPLES["zero-tprune_then_divprune"], "inside the vision tower"),
        (SAMPLES["prumerge_adaptive"], "nothing bounds ahead how many 'prumerge' keeps.*'divprune'"),
        (vtc.VScan(keep=0.4, window=2, released=True), "nothing bounds ahead how many 'vscan' keeps"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value.name,
)
def test_what_cannot_be_decided_is_refused(method: vtc.Method, words: str, on: Set) -> None:
    on(SLOW)
    model = get_model("llava")
    with untouched(model), pytest.raises(ValueError, match=f"when='worthwhile'.*{words}"):
        vtc.patch(model, method, when="worthwhile")
    vtc.patch(model, method).unpatch()


@pytest.mark.parametrize("when", ["sometimes", "", 1, True])
def test_wrong_values_are_refused(when: Any) -> None:
    model = get_model("llava")
    for method in ("divprune", vtc.DivPrune(), vtc.CompressionConfig("divprune", when="worthwhile")):
        with untouched(model), pytest.raises(ValueError, match="neither 'always' nor 'worthwhile'"):
            vtc.patch(model, method, when=when)
    with pytest.raises(ValueError, match="neither 'always' nor 'worthwhile'"):
        vtc.CompressionConfig("divprune", when=when)


def test_compiled_models_are_refused(on: Set) -> None:
    on(SLOW)
    model, batch = prepared("llava", images_per_sample=(1,))
    plain = logits(model, batch)
    layer = model.get_decoder().layers[0]
    for module in (model, layer):
        module.compile(backend="eager")
        try:
            with untouched(model), pytest.raises(ValueError, match=r"compiled with torch\.compile"):
                vtc.patch(model, "divprune", when="worthwhile")
        finally:
            module._compiled_call_impl = None
    for module in (model.get_decoder(), layer):
        with vtc.patch(model, "divprune", keep=0.4, when="worthwhile"):
            module.compile(backend="eager")
            try:
                with pytest.raises(NotImplementedError, match=r"compiled with torch\.compile"):
                    logits(model, batch)
            finally:
                module._compiled_call_impl = None
            logits(model, batch)
    assert same(logits(model, batch), plain)


def test_what_runs_inside_of_something_compiled_is_known() -> None:
    aside = torch.compiler.disable(compilers.compiled_around)
    assert not compilers.compiled_around()
    assert not aside()
    assert torch.compile(lambda x: (x + 1, aside()), backend="eager")(torch.zeros(1))[1]


def test_models_on_no_device_are_refused() -> None:
    with torch.device("meta"):
        model = type(get_model("llava"))(get_model("llava").config)
    with pytest.raises(ValueError, match="its weights are on none"):
        vtc.patch(model, "divprune", when="worthwhile")


def test_shortened_prompts_verify_and_profile_say_no() -> None:
    config = vtc.CompressionConfig("divprune", {"keep": 0.5}, when="worthwhile")
    model, batch = prepared("llava", images_per_sample=(1,))
    # before 5.23, models take no features encoded ahead, which is said first
    with pytest.raises(NotImplementedError, match=r"when='worthwhile' decides while a patched|no mm_encoder_outputs"):
        compress_inputs(model, dict(batch), config)
    with pytest.raises(ValueError, match="when='worthwhile' leaves prompts alone"):
        vtc.verify(model, dict(batch), method=config)
    with pytest.raises(ValueError, match="when='worthwhile' leaves prompts alone"):
        profile(model, lambda size: dict(batch), config)


def test_vllm_says_no_and_lmms_eval_passes_it_on() -> None:
    adapter, parts = resolve(get_model("llava"))
    with pytest.raises(ValueError, match="when='worthwhile' decides for each batch of prompts, and vLLM"):
        settled(adapter, parts, read({"method": "divprune", "when": "worthwhile"}))
    asked = split({"base": "llava_hf", "method": "divprune", "when": "worthwhile"})
    assert asked.rest == {}
    assert asked.config == vtc.CompressionConfig.of(vtc.DivPrune(), when="worthwhile")
    with pytest.raises(ValueError, match="when='sometimes'"):
        split({"base": "llava_hf", "method": "divprune", "when": "sometimes"})


def test_tuning_asks_what_pruning_loses(on: Set, monkeypatch: pytest.MonkeyPatch) -> None:
    """All questions would be left alone on this device, and every keep would do."""
    on(FAST)
    seen = []

    class Exam:
        def take(self, config: Any = None, tick: Any = None) -> Any:
            seen.append(config)
            return Answers([1.0] * 2000, [], 36.0)

        def headline(self, scores: Any) -> Any:
            return scores

    found = tune(Exam(), vtc.CompressionConfig("divprune", when="worthwhile"), 0.05)  # type: ignore[arg-type]
    assert {config.when for config in seen if config} == {"always"}
    assert found.config is not None
    assert found.config.when == "worthwhile"


def test_classifiers_say_no() -> None:
    import transformers as tf

    shape = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
    model = tf.ViTForImageClassification(tf.ViTConfig(image_size=16, patch_size=4, **shape))
    with pytest.raises(ValueError, match=r"image classifier.*or when could act on"):
        vtc.patch(model, vtc.InTower(rule="cls"), when="worthwhile")


# --------------------------------------------------------------------------------------------------- config and command


def test_a_config_says_it(tmp_path: Path, on: Set) -> None:
    config = vtc.CompressionConfig("divprune", {"keep": 0.5}, when="worthwhile")
    assert json.loads(config.save_pretrained(tmp_path).read_text())["when"] == "worthwhile"
    again = vtc.CompressionConfig.from_pretrained(tmp_path)
    assert again == config
    assert again.with_method(vtc.Grid()).when == "worthwhile"
    assert "when" not in vtc.CompressionConfig("divprune").to_dict()  # releases before this one read it
    on(FAST)
    with vtc.patch(get_model("llava"), again) as handle:
        assert handle.stage.judge is not None
        assert "when='worthwhile'" in repr(handle)


def test_the_command_says_why(tmp_path: Path, on: Set) -> None:
    question = vtc_tinyvlm.evaluation_questions(1)[0]
    question.image.save(tmp_path / "a.png")
    arguments = ["run", TINY, str(tmp_path / "a.png"), "What colour is the circle?", "--when"]
    for device, words in ((FAST, "[left alone: 144 visual"), (SLOW, "[worthwhile: 144 visual")):
        on(device)
        result = CliRunner().invoke(app, [*arguments, "worthwhile"])
        assert result.exit_code == 0, result.output
        assert words in result.stderr
    result = CliRunner().invoke(app, [*arguments, "sometimes"])
    assert result.exit_code == 2
    assert "when='sometimes'" in result.stderr


# --------------------------------------------------------------------------------------------------------- measurements


def test_what_was_measured_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    first = pace_of(CPU, FLOAT)
    assert 1e8 < first.device.flops < 1e15
    assert 1e8 < first.device.bandwidth < 1e13
    assert 1e-8 < first.operation < 1e-3
    assert not first.queues
    assert [*json.loads(pace.file().read_text())] == [pace._surroundings(CPU, FLOAT)]
    monkeypatch.setattr(pace, "_measured", lambda *ignored: pytest.fail("measured again"))
    assert pace_of(CPU, FLOAT) == first
    for surroundings in (torch.bfloat16, FLOAT):
        monkeypatch.setattr(pace, "_measured", lambda *ignored: (1.0, 2.0, 3.0))
        if surroundings is FLOAT:
            torch.set_num_threads(2)
        try:
            assert pace_of(CPU, surroundings).device.flops == 1.0
        finally:
            torch.set_num_threads(1)
    assert pace_of(CPU, FLOAT) == first
    assert len(json.loads(pace.file().read_text())) == 3


@pytest.mark.parametrize("found", [None, [], [1.0, 2.0], [1.0, 2.0, "x"], [1.0, 2.0, -1.0], [1.0, 2.0, True], "abc"])
def test_what_is_no_measurement_is_measured_again(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write(pace.file(), {}, pace._surroundings(CPU, FLOAT), {"pace": found})
    monkeypatch.setattr(pace, "_measured", lambda *ignored: (1.0, 2.0, 3.0))
    assert pace_of(CPU, FLOAT).operation == 3.0
    assert json.loads(pace.file().read_text())[pace._surroundings(CPU, FLOAT)] == {"pace": [1.0, 2.0, 3.0]}


def test_the_engines_own_work_is_measured_and_leaves_the_zoo_alone() -> None:
    state = torch.get_rng_state()
    with untouched(get_model("llava")), vtc.patch(get_model("llava"), "grid"):
        found = overhead_of(CPU, FLOAT)
    assert torch.equal(torch.get_rng_state(), state)
    assert 1e-5 < found.once < 1.0
    assert overhead.LEAST <= found.each < 0.1
    assert 1e-5 < found.inside < 1.0


DECIDED = sorted(set(SAMPLES) - {"prumerge_adaptive"})


@pytest.mark.parametrize("name", DECIDED)
def test_every_method_that_can_be_decided_is_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the first family that takes it; sizes are small here."""
    monkeypatch.setattr(selection_time, "SIZES", (16, 64))
    for family in ("llava", "llava_mqt", "llava_next"):
        adapter, parts = resolve(get_model(family))
        try:
            method = bind(adapter, parts, SAMPLES[name], "original", None, "worthwhile")
            break
        except ValueError as error:
            refused = str(error)
    else:
        assert "when='worthwhile'" in refused or "pixels" in refused
        return
    state = torch.get_rng_state()
    steps = steps_of(method, adapter.facts(parts))
    found = selection_time_of(steps, 16, CPU, FLOAT)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.seconds(1, 16) > 1e-6
    monkeypatch.setattr(selection_time, "_measured", lambda *ignored: pytest.fail("measured again"))
    assert selection_time_of(steps, 16, CPU, FLOAT) == found


def test_time_to_choose_between_and_beyond_what_was_measured() -> None:
    time = SelectionTime((64, 256), (1.0, 4.0), (1.0, 4.0))
    assert [time.seconds(1, n) for n in (1, 64, 256, 512)] == [2.0, 2.0, 8.0, 32.0]
    assert time.seconds(1, 128) == pytest.approx(4.0)
    assert time.seconds(3, 64) == 4.0


def test_slow_methods_are_not_tried_on_large_images(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def took(run: Any, device: Any, repeats: int) -> float:
        run()
        seen.append(1)
        return 1.0

    monkeypatch.setattr(selection_time, "best", took)
    adapter, parts = resolve(get_model("llava"))
    steps = steps_of(bind(adapter, parts, vtc.Grid(keep=0.5), "original"), adapter.facts(parts))
    found = selection_time_of(steps, 8, CPU, FLOAT)
    assert len(seen) == 2
    assert found.seconds(1, SIZES[1]) == 16.0


class Operations(TorchDispatchMode):
    """Counts what is handed to a device: all but views."""

    VIEWS = ("view", "unsafe_view", "t", "transpose", "expand", "slice", "select", "unsqueeze", "alias", "detach")

    def __enter__(self) -> Any:
        self.count = 0
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.__name__.split(".")[0].lstrip("_") not in self.VIEWS
        return func(*args, **(kwargs or {}))


def test_operations_of_a_layer() -> None:
    decoder = get_model("llava").get_decoder()
    hidden = torch.zeros(1, 12, decoder.config.hidden_size)
    with torch.inference_mode(), Operations() as whole:
        decoder(inputs_embeds=hidden, use_cache=False)
    layers, decoder.layers = decoder.layers, decoder.layers[:1]
    try:
        with torch.inference_mode(), Operations() as short:
            decoder(inputs_embeds=hidden, use_cache=False)
    finally:
        decoder.layers = layers
    assert (whole.count - short.count) / (len(layers) - 1) == pytest.approx(judge.LAYER_OPERATIONS, abs=5)


def judged(method: vtc.Method, device: Pace, tokens: int = 144, samples: int = 1) -> Verdict:
    adapter, parts = resolve(get_model("llava"))
    bound = bind(adapter, parts, method, "original", None, "worthwhile")
    found = judge.Worth.of(adapter, parts, bound)
    assert found is not None
    layout = Layout.plain(tokens)
    images = [Located(row, torch.arange(tokens), layout, "image", (row,)) for row in range(samples)]
    return replace(found, pace=device)(images, [tokens + 16] * samples, tokens + 16)


def test_saved_seconds_are_those_of_estimate(on: Set) -> None:
    """The same floors, on a device with the same FLOP/s and bytes/s."""
    on(SLOW)
    model = get_model("llava")
    found = vtc.estimate(
        model, image=(8, 8), text=16, tokens=144, batch=3, method=vtc.DivPrune(keep=0.25), device=SLOW.device
    )
    expected = found.seconds(found.full.prefill) - found.seconds(found.pruned.prefill)
    flops = (found.full.prefill.flops - found.pruned.prefill.flops) / SLOW.device.flops
    assert expected == pytest.approx(flops)  # bound by arithmetic, so that two or four bytes make no difference
    assert judged(vtc.DivPrune(keep=0.25), SLOW, samples=3).saves == pytest.approx(expected, rel=1e-3)


def test_what_content_decides_counts_with_the_most_that_may_stay(on: Set) -> None:
    on(SLOW)
    adaptive = judged(vtc.Adaptive(vtc.DivPrune(keep=0.5)), SLOW)
    assert adaptive.saves == judged(vtc.DivPrune(keep=0.5), SLOW).saves > 0
    second = vtc.ToDRE(keep=0.5, pivot="random", stage2=True, layer=2, tau=0.45)  # all of them or none
    assert judged(second, SLOW).saves == judged(vtc.ToDRE(keep=0.5, pivot="random"), SLOW).saves


def test_what_nothing_bounds_counts_as_staying(on: Set, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a method can tell of a plain picture, and then cannot of this one."""
    on(SLOW)
    seen = judged(vtc.DivPrune(keep=0.5), SLOW)
    most = Step.most

    def but_here(step: Step, layouts: Any, *rest: Any) -> Any:
        return None if layouts[0].length == 144 else most(step, layouts, *rest)

    monkeypatch.setattr(Step, "most", but_here)
    assert seen.saves > 0
    assert judged(vtc.DivPrune(keep=0.5), SLOW).saves == 0


def test_stages_between_layers_cost_and_save_by_layer(on: Set) -> None:
    on(SLOW)
    entry, late = judged(vtc.DivPrune(keep=0.4), SLOW), judged(vtc.FastV(keep=0.4, layer=1), SLOW)
    assert 0 < late.saves < entry.saves
    costs = [judged(method, FAST).costs for method in (vtc.DivPrune(keep=0.4), SAMPLES["fastv"], SAMPLES["transprune"])]
    assert costs == sorted(costs)
    assert costs[1] - costs[0] == pytest.approx(2 * QUICK.inside, rel=1e-3)  # a stage and its signal
    assert judged(vtc.FastV(keep=0.4, layer=1), SLOW).costs > judged(vtc.FastV(keep=0.4, layer=1), FAST).costs
