"""Values that users give: odd numbers, texts for flags, things 5,000 characters long, files that are no files."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner
from zoo import get_model, make_batch

import vtc
from vtc.budget import check_keep, count, share
from vtc.cli import app
from vtc.config import CompressionConfig
from vtc.methods import list_methods, make_method
from vtc.values import LONGEST, shown

LONG = "x" * 5000

# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("keep", "error", "words"),
    [
        (Decimal("NaN"), TypeError, "keep=Decimal('NaN') is not a number"),
        (Decimal("sNaN"), TypeError, "keep=Decimal('sNaN') is not a number"),
        (Decimal("0.5"), TypeError, "keep=Decimal('0.5') is not a number"),
        (Fraction(1, 10**400), ValueError, r"must lie in \(0, 1\]"),
        (Fraction(10**400), ValueError, r"must lie in \(0, 1\]"),
        (np.longdouble("1e-4000"), ValueError, r"must lie in \(0, 1\]"),
        (np.float32("nan"), ValueError, r"must lie in \(0, 1\]"),
        (np.bool_(True), TypeError, "is not a number"),
        (torch.tensor(0.5), TypeError, "is not a number"),
        (np.array([0.5]), TypeError, "is not a number"),
        (0.5 + 0j, TypeError, "is not a number"),
        (-(10**5000), ValueError, "must be at least 1"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_odd_numbers_are_no_keep(keep: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words if words.startswith("must") else re.escape(words)):
        check_keep(keep)


@pytest.mark.parametrize(("keep", "same"), [(Fraction(1, 4), 0.25), (np.float32(0.5), 0.5), (np.int64(3), 3)])
def test_numbers_of_other_kinds_become_plain_ones(keep: Any, same: float | int) -> None:
    assert check_keep(keep) == same
    assert type(check_keep(keep)) is type(same)


def test_more_tokens_than_can_be_divided() -> None:
    assert share(10**400, 576) == 1.0
    assert share(288, 576) == 0.5
    with pytest.warns(UserWarning, match="is more than the 576") as told:
        assert count(10**5000, 576) == 576
    assert len(str(told[0].message)) < 300


SHARES = [("todre", "tau"), ("transprune", "alpha"), ("idpruner", "balance"), ("globalcom2", "tau")]


@pytest.mark.parametrize(("name", "option"), SHARES)
@pytest.mark.parametrize(
    "value", [Decimal("NaN"), "0.5", None, [0.5], True, float("nan"), -(10**400)], ids=lambda v: type(v).__name__
)
def test_a_share_is_a_number(name: str, option: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{option}=") as caught:
        make_method(name, **{option: value})
    assert len(str(caught.value)) < 400


WHOLE = [("todre", "layer"), ("todre", "seed"), ("random", "seed")]


@pytest.mark.parametrize(("name", "option"), WHOLE)
@pytest.mark.parametrize("value", [Decimal("3"), "3", [3], True, 2.5, float("nan")], ids=lambda v: type(v).__name__)
def test_a_seed_and_a_layer_are_whole_numbers(name: str, option: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{option}=.* is not a whole number"):
        make_method(name, **{option: value})


@pytest.mark.parametrize("value", ["no", "false", 0, 1, None, Decimal("NaN")])
def test_a_switch_is_true_or_false(value: Any) -> None:
    """Python takes "no" for True."""
    with pytest.raises(TypeError, match=r"^stage2=.* is neither True nor False"):
        vtc.ToDRE(stage2=value)


@pytest.mark.parametrize(
    "options", [{"layers": 3}, {"ratios": 0.5}, {"layers": "357"}, {"layers": (1, 2.5, 3)}, {"ratios": (0.5, "x", 0.1)}]
)
def test_a_schedule_is_a_tuple_of_numbers(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"^{next(iter(options))}="):
        vtc.TransPrune(**options)


# ---------------------------------------------------------------------------------------------------------- long values


def test_shown() -> None:
    assert shown("abc") == "'abc'"
    assert shown({"method": "divprune"}) == "{'method': 'divprune'}"
    assert shown(LONG).endswith("' (5002 characters)")
    assert len(shown(LONG)) < LONGEST + 30
    assert shown(10**5000) == "<a int that cannot be printed>"


LONG_WAYS: dict[str, Callable[[], Any]] = {
    "keep": lambda: vtc.DivPrune(keep=LONG),
    "a list": lambda: vtc.DivPrune(keep=[0.5] * 5000),
    "newlines": lambda: vtc.DivPrune(newlines=LONG),
    "variant": lambda: vtc.ToDRE(variant=LONG),
    "importance": lambda: vtc.IDPruner(importance=LONG),
    "selector": lambda: vtc.Allocate(selector=LONG),
    "first": lambda: vtc.Chain(LONG, vtc.TransPrune()),
    "layers": lambda: vtc.TransPrune(layers=tuple(range(1, 5000))),
    "method": lambda: vtc.patch(get_model("llava"), LONG),
    "no method": lambda: vtc.patch(get_model("llava"), [LONG]),
    "option": lambda: make_method("divprune", **{LONG: 1}),
    "positions": lambda: CompressionConfig("divprune", positions=LONG),
    "options": lambda: CompressionConfig("divprune", {LONG: 1}),
    "config": lambda: CompressionConfig.from_dict({"version": 1, LONG: 2}),
    "a folder": lambda: CompressionConfig.from_pretrained(LONG),
    "weights": lambda: vtc.patch(get_model("llava"), vtc.IDPruner(importance=vtc.SelectorWeights(LONG))),
    "a picture": lambda: __import__("vtc.viz.pixels").viz.pixels.open_image(Path(LONG)),
    "a size": lambda: vtc.estimate(get_model("llava"), LONG),
    "a device": lambda: vtc.estimate(get_model("llava"), (64, 64), device=LONG),
}


@pytest.mark.parametrize("way", LONG_WAYS.values(), ids=LONG_WAYS)
def test_long_values_are_not_echoed_whole(way: Callable[[], Any]) -> None:
    with pytest.raises((TypeError, ValueError, OSError)) as caught:
        way()
    told = str(caught.value).replace(", ".join(list_methods()), "")  # tests register methods of their own
    assert len(told) < 700, told[:100]


@pytest.mark.parametrize(
    "arguments",
    [
        ("show", LONG, "--out", "x.png"),
        ("show", "x.png", "--out", LONG),
        ("show", "x.png", "--method", LONG),
        ("run", LONG, "x.png", "why?"),
        ("run", "tinyvlm", LONG, "why?"),
        ("estimate", LONG),
        ("estimate", "tinyvlm", "--image", LONG),
        ("estimate", "tinyvlm", "--device", LONG),
        ("profile", "tinyvlm", "--keep", LONG),
        ("profile", "tinyvlm", "--dtype", LONG),
        ("profile", "--random-weights", LONG),
        ("sweep", "tinyvlm", "--task", LONG),
        ("serve", LONG, "--dry-run"),
        ("methods", LONG),
        ("tune", "tinyvlm", "--max-drop", LONG),
    ],
    ids=lambda a: " ".join("LONG" if x is LONG else x for x in a),
)
def test_the_commands_neither(arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*arguments])
    assert result.exit_code == 2, result.output[:300]
    assert result.stderr.startswith("vtc: ")
    assert len(result.stderr) < 1000, result.stderr[:200]


# ---------------------------------------------------------------------------------------------- files that are no files


def within_seconds(run: Callable[[], Any]) -> Any:
    """The error of a call that must not wait for anybody."""
    found: list[Any] = []

    def call() -> None:
        try:
            found.append(run())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(20)
    assert found, "it waits"
    return found[0]


@pytest.mark.parametrize("whole", [False, True], ids=["alone", "beside a real one"])
def test_a_pipe_among_weights_is_not_opened(tmp_path: Path, whole: bool) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    if whole:
        save_file({"q_proj.weight": torch.zeros(2, 4)}, tmp_path / "a.safetensors")
    model = get_model("llava")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        method = vtc.IDPruner(importance=vtc.SelectorWeights(str(path)))
        error = within_seconds(lambda method=method: vtc.patch(model, method))
        assert isinstance(error, ValueError), error
        assert "model.safetensors" in str(error)
        assert "regular file" in str(error) or "neither a .safetensors file nor a folder" in str(error)
    with torch.inference_mode():
        model(**make_batch("llava"))  # nothing was touched


def test_pipes_elsewhere_are_not_opened(tmp_path: Path) -> None:
    for name in ("config.json", "vtc_config.json", "photo.png", "sweep.csv"):
        os.mkfifo(tmp_path / name)
    from vtc.profiling.ledger import Ledger
    from vtc.profiling.workload import random_model
    from vtc.viz.pixels import open_image

    ways: list[Callable[[], Any]] = [
        lambda: CompressionConfig.from_pretrained(tmp_path),
        lambda: open_image(tmp_path / "photo.png"),
        lambda: random_model(tmp_path),
        lambda: vtc.estimate(str(tmp_path), (64, 64)),
        lambda: vtc.estimate(str(tmp_path / "config.json"), (64, 64)),
        lambda: Ledger(tmp_path / "sweep.csv", ["a"], print),
    ]
    for way in ways:
        assert isinstance(within_seconds(way), (ValueError, OSError))
