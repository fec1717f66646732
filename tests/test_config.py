"""CompressionConfig: round trips, and everything it refuses to read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtc.config import CompressionConfig
from vtc.methods import Method, list_methods, method_class, register_method
from vtc.methods.divprune import DivPrune
from vtc.methods.random import Random
from vtc.methods.registry import _REGISTRY
from vtc.methods.todre import ToDRE

GOOD = {"version": 1, "method": "todre", "options": {"keep": 64, "pivot": "random"}, "positions": "compact"}
OURS = [name for name in list_methods() if method_class(name).__module__.startswith("vtc.")]  # tests register others


@pytest.fixture
def chain(monkeypatch):
    """A method made of methods."""
    monkeypatch.setattr("vtc.methods.registry._REGISTRY", dict(_REGISTRY))

    @register_method
    @dataclass(frozen=True, kw_only=True)
    class Chain(Method):
        first: Method | None = None
        others: tuple[Method | int, ...] = ()
        name: ClassVar[str] = "links"

        def reduce(self, stage, tokens, budget):
            raise NotImplementedError

    return Chain


@pytest.mark.parametrize("name", OURS)
def test_every_method_survives_json_with_its_defaults(name):
    method = method_class(name)()
    config = CompressionConfig.of(method)
    again = CompressionConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.build() == method
    assert config.options["keep"] == method.keep  # written down, so that a new default does not change an old file
    assert method.keep is not None


@settings(deadline=None, max_examples=50)
@given(
    keep=st.floats(0, 1, exclude_min=True) | st.integers(1, 10**6),
    seed=st.integers(),
    positions=st.sampled_from(["original", "compact"]),
    newlines=st.sampled_from(["candidates", "keep"]),
)
def test_any_options_survive_json(keep, seed, positions, newlines):
    config = CompressionConfig.of(ToDRE(keep=keep, seed=seed, newlines=newlines, pivot="random"), positions)
    again = CompressionConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.build() == config.build()
    assert type(again.build().keep) is type(keep)  # 1 and 1.0 mean different things


def test_save_and_load(tmp_path):
    config = CompressionConfig("divprune", {"keep": 64}, "compact")
    path = config.save_pretrained(tmp_path / "new" / "folder")
    assert path.name == "vtc_config.json"
    assert json.loads(path.read_text()) == {
        "version": 1,
        "method": "divprune",
        "options": {"keep": 64},
        "positions": "compact",
    }
    assert CompressionConfig.from_pretrained(str(tmp_path / "new" / "folder")) == config
    assert CompressionConfig.from_pretrained(path.parent).build() == DivPrune(keep=64)


def test_what_is_left_out_has_its_default():
    assert CompressionConfig.from_dict({"version": 1, "method": "random"}).build() == Random()
    assert CompressionConfig("random").positions == "original"


def test_methods_inside_methods(chain):
    method = chain(keep=3, first=ToDRE(keep=0.5), others=(DivPrune(keep=9), 4, chain(first=Random(seed=2))))
    config = CompressionConfig.of(method)
    again = CompressionConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.build() == method
    assert again == config
    bad = config.to_dict()
    bad["options"]["first"]["options"]["evil"] = 1
    with pytest.raises(ValueError, match=r"'todre'.*'evil'"):
        CompressionConfig.from_dict(bad)
    bad["options"]["first"] = {"method": "os.system", "options": {}}
    with pytest.raises(ValueError, match=r"os\.system"):
        CompressionConfig.from_dict(bad)
    bad["options"]["first"] = {"__class__": "builtins.eval"}
    with pytest.raises(ValueError, match="__class__"):
        CompressionConfig.from_dict(bad)


def test_a_method_that_could_not_be_built_again_is_refused():
    class Mine(DivPrune):
        pass

    with pytest.raises(ValueError, match=r"Mine.*'divprune'.*@register_method"):
        CompressionConfig.of(Mine())
    with pytest.raises(ValueError, match="Mine"):
        CompressionConfig("chain", {"first": Mine()}).to_dict()


def with_(**changes):
    return {**GOOD, **changes}


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (with_(method="os.system"), "os.system"),
        (with_(method="Divprune"), "'divprune'"),
        (with_(method=None), "None"),
        (with_(method={"method": "random"}), "random"),
        (with_(options={"keep": 0.5, "shell": "rm"}), "'shell'"),
        (with_(options={"name": "x"}), "'name'"),
        (with_(options={"keep": 2.5}), "2.5"),
        (with_(options={"pivot": "north"}), "'north'"),
        (with_(options=[1]), "[1]"),
        (with_(positions="packed"), "'packed'"),
        (with_(version=2), "version 2"),
        (with_(version=2, extra=1), "version 2"),
        (with_(version=0), "version=0"),
        (with_(version="1"), "version='1'"),
        (with_(version=True), "version=True"),
        (with_(VERSION=9), "'VERSION'"),
        (with_(extra=1), "'extra'"),
        ({k: v for k, v in GOOD.items() if k != "version"}, "'version'"),
        ({k: v for k, v in GOOD.items() if k != "method"}, "'method'"),
        ([GOOD], "mapping"),
    ],
)
def test_what_is_refused_is_named(data, word, tmp_path):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        CompressionConfig.from_dict(data)
    assert word in str(caught.value)
    (tmp_path / "vtc_config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        CompressionConfig.from_pretrained(tmp_path)
    assert word in str(caught.value)
    assert "vtc_config.json" in str(caught.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vtc_config\.json"):
        CompressionConfig.from_pretrained(tmp_path)
    for text in ("", "{", "[" * 100_000, '{"version": 1, "method": "random", "options": {"keep": NaN}}'):
        (tmp_path / "vtc_config.json").write_text(text)
        with pytest.raises(ValueError, match=r"vtc_config\.json"):
            CompressionConfig.from_pretrained(tmp_path)


def test_values_with_no_place_in_json_are_refused_before_anything_is_written(chain, tmp_path):
    config = CompressionConfig.of(chain(others=(object(),)))
    with pytest.raises(ValueError, match="others"):
        config.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_config_is_a_value():
    options = {"keep": 64}
    config = CompressionConfig("divprune", options)
    options["keep"] = 3
    assert config.build().keep == 64
    assert hash(config) == hash(CompressionConfig("divprune", {"keep": 64}))
    assert config != CompressionConfig("divprune", {"keep": 65})
