"""Kernels prove themselves at their first use; here the interpreter on the CPU stands in for a GPU."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))  # before triton is imported
pytest.importorskip("triton", reason="Triton is made for Linux")
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from vtc import cache, ops
from vtc.checking import kernels as proofs
from vtc.ops import backend, gather, greedy, proof, recursion, remembered, scores
from vtc.ops.kernels import gather as gather_kernel
from vtc.ops.kernels import greedy as greedy_kernel
from vtc.ops.kernels import layout, rows, transition
from vtc.ops.kernels import recursion as greedy_code

CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.skipif(not isinstance(tl.zeros, InterpretedFunction), reason="needs the interpreter"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),  # numpy's, on NaN in the interpreter
    pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


USES: dict[str, Callable[[], Any]] = {
    "greedy picks": lambda: ops.farthest_first(normal(0, 6, 3), 4, 0),
    "attention rows": lambda: scores.row_attention(normal(0, 1, 1, 2, 8), normal(1, 1, 1, 9, 8), 0.5),
    "transition scores": lambda: ops.transition_variation(normal(0, 1, 5, 8), normal(1, 1, 5, 8)),
    "gathers": lambda: gather.gather_columns([normal(0, 1, 5, 8)], torch.tensor([[1, 3]])),
}
WRAPPERS = {
    "greedy picks": (greedy_kernel, "picks"),
    "attention rows": (rows, "row_attention"),
    "transition scores": (transition, "transition_variation"),
    "gathers": (gather_kernel, "gather_columns"),
}
FACTS = {
    "greedy picks": "width <= 4,",
    "attention rows": "width 8,",
    "transition scores": "width 8,",
    "gathers": "1 x 8",
}


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_proofs: None) -> None:
    """The CPU counts as a device whose kernels are Triton's by default, and nothing is known of them."""
    monkeypatch.delenv("VTC_BACKEND", raising=False)
    monkeypatch.setenv("VTC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(proof, "_on_trial", lambda device: True)
    monkeypatch.setattr(remembered, "interpreted", lambda: False)
    monkeypatch.setattr(remembered, "_driver", lambda: "one")
    for module in (greedy, gather, scores):
        monkeypatch.setattr(module, "backend", lambda device: "triton")
    forget()


def forget() -> None:
    """As in a new process."""
    proof._VERDICTS.clear()
    remembered._surroundings.cache_clear()


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cases that were tried."""
    seen: list[str] = []
    real = proof._try
    monkeypatch.setattr(proof, "_try", lambda case, *rest: seen.append(case.name) or real(case, *rest))
    return seen


def in_torch(name: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for module in (greedy, gather, scores):
            patch.setattr(module, "backend", lambda device: "torch")
        return USES[name]()


def same(got: Any, expected: Any, exact: bool = False) -> None:
    limits = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 3e-5, "atol": 1e-7}
    torch.testing.assert_close(got, expected, **limits)


def spoil(name: str, monkeypatch: pytest.MonkeyPatch, how: str) -> list[int]:
    """A kernel that computes something else, or cannot run; how often it was asked."""
    module, function = WRAPPERS[name]
    real, calls = getattr(module, function), []

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if how == "raises":
            raise ValueError("ptxas fatal: no such instruction")
        result = real(*args, **kwargs)
        some = result[0] if isinstance(result, tuple) else result
        some[..., -1:] += 1
        return result

    monkeypatch.setattr(module, function, broken)
    return calls


# -------------------------------------------------------------------------------------------------------- the first use


@pytest.mark.parametrize("name", USES)
def test_a_right_kernel_is_tried_once_and_used(name: str, trials: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module, function = WRAPPERS[name]
    real, calls = getattr(module, function), []
    monkeypatch.setattr(module, function, lambda *a, **k: calls.append(1) or real(*a, **k))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="vtc")
        for _ in range(3):
            same(USES[name](), in_torch(name), exact=name in ("greedy picks", "gathers"))
    assert len(trials) == 1
    assert trials[0].startswith(name)
    assert len(calls) == 4  # the trial and three uses


@pytest.mark.parametrize("how", ["is wrong", "raises"])
@pytest.mark.parametrize("name", USES)
def test_a_broken_kernel_is_replaced_and_told_once(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spoil(name, monkeypatch, how)
    with pytest.warns(RuntimeWarning, match="vtc: ") as told:
        got = USES[name]()
    same(got, in_torch(name), exact=True)
    (said,) = (str(w.message) for w in told if str(w.message).startswith("vtc: "))
    reason = "ptxas fatal" if how == "raises" else "differ from torch's"
    for words in (name, "float32", FACTS[name], " on cpu: ", reason, "in torch", "vtc doctor", "VTC_BACKEND=torch"):
        assert words in said, words
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="vtc")
        same(USES[name](), in_torch(name), exact=True)
    assert len(calls) == 1
    assert not remembered.cache_file().exists()  # only successes are kept
    forget()
    with pytest.warns(RuntimeWarning, match="vtc: "):
        USES[name]()


@pytest.mark.parametrize(("constant", "value"), [("_LONE", 2.0), ("_PADDING", 0.5), ("_INFINITY", 0.5)])
def test_a_wrong_number_in_the_code_of_a_kernel_is_caught(
    constant: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(greedy_code, constant, tl.constexpr(value))
    with pytest.warns(RuntimeWarning, match="vtc: the Triton kernel for greedy picks"):
        got = ops.farthest_first(normal(0, 6, 3), 4)
    assert torch.equal(got, recursion.picks(greedy_job(6, 3, 4)[0])[0])


@pytest.mark.parametrize("how", ["is wrong", "raises"])
def test_forced_kernels_raise(how: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setenv("VTC_BACKEND", "triton")
    calls = spoil("gathers", monkeypatch, how)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"VTC_BACKEND=triton, but .* gathers.* on cpu: .*unset VTC_BACKEND"):
            USES["gathers"]()
    assert len(calls) == 1
    assert not [w for w in recwarn if "vtc" in str(w.message)]


def test_other_widths_dtypes_and_options_are_other_cases(trials: list[str]) -> None:
    for x in (normal(0, 1, 5, 8), normal(0, 1, 5, 16), normal(0, 1, 5, 8).bfloat16(), normal(0, 3, 9, 8)):
        ops.transition_variation(x, x)
    assert len(trials) == 3  # batch and length make no difference
    ops.transition_variation(x, x, absolute=True)
    ops.transition_variation(x, x, mask=torch.ones(3, 9, dtype=torch.bool))
    assert len(set(trials)) == len(trials) == 5


def test_nothing_to_launch_is_nothing_to_try(trials: list[str]) -> None:
    ops.farthest_first(torch.zeros(0, 5, 3), 2, 0)
    ops.transition_variation(torch.zeros(2, 0, 3), torch.zeros(2, 0, 3))
    scores.row_attention(torch.zeros(0, 2, 1, 4), torch.zeros(0, 2, 5, 4), 1.0)
    gather.gather_columns([torch.zeros(2, 4)], torch.zeros(2, 0, dtype=torch.long))
    assert trials == []


def test_a_full_device_says_nothing_about_a_kernel(monkeypatch: pytest.MonkeyPatch, trials: list[str]) -> None:
    def full(*args: Any) -> None:
        raise torch.cuda.OutOfMemoryError("of 139 GiB")

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("error", message="vtc")
        patch.setattr(*WRAPPERS["gathers"], full)
        same(USES["gathers"](), in_torch("gathers"))
        patch.setenv("VTC_BACKEND", "triton")
        with pytest.raises(RuntimeError, match="OutOfMemoryError: of 139 GiB"):
            USES["gathers"]()
    USES["gathers"]()
    assert len(trials) == 3
    assert list(proof._VERDICTS.values()) == [""]


# -------------------------------------------------------------------------------------------- what a trial stays out of


def test_a_trial_draws_no_number_of_the_callers() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    for use in USES.values():
        use()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", USES)
def test_a_trial_is_the_same_whatever_the_caller_set(name: str, trials: list[str]) -> None:
    try:
        torch.set_default_dtype(torch.bfloat16)
        torch.set_float32_matmul_precision("medium")
        with (
            torch.inference_mode(),
            torch.autocast("cpu", torch.bfloat16),
            torch.device("meta"),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("error", message="vtc")
            case = describe(name)
            assert proof.proved(CPU, lambda: case, REFERENCES[name])
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
    assert len(trials) == 1
    assert list(proof._VERDICTS.values()) == [""]


def test_a_trial_sees_no_mode_of_the_callers() -> None:
    def seen(x: Tensor) -> Tensor:
        modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        return torch.tensor([*modes, x.is_inference(), torch.zeros(1).device.type != "cpu"])

    case = proof.Case("modes", (), lambda device: (torch.zeros(1),), seen)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        outcome = proof.examine(case, lambda x: torch.zeros(5, dtype=torch.bool), CPU)
    assert outcome.reason == ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_picks_do_not_depend_on_the_default_dtype(dtype: torch.dtype) -> None:
    job = greedy_job(40, 8, 40)[0]
    expected = recursion._picks(job)
    try:
        torch.set_default_dtype(dtype)
        assert torch.equal(recursion._picks(job), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def in_threads(use: Callable[[], Tensor]) -> list[Tensor]:
    """What four threads get that begin at once."""
    start, results = threading.Barrier(4), []

    def run() -> None:
        start.wait()
        results.append(use())

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_try_once(trials: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    turns, (module, function) = threading.Lock(), WRAPPERS["gathers"]
    real, tried = getattr(module, function), proof._try

    def alone(*args: Any) -> Any:  # the interpreter knows no threads
        with turns:
            return real(*args)

    monkeypatch.setattr(module, function, alone)
    monkeypatch.setattr(proof, "_try", lambda *args: time.sleep(0.1) or tried(*args))
    results = in_threads(lambda: USES["gathers"]()[0])
    assert len(trials) == 1
    assert len(results) == 4
    assert all(torch.equal(result, in_torch("gathers")[0]) for result in results)


def test_threads_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil("gathers", monkeypatch, "is wrong")
    results: list[Tensor] = []
    with pytest.warns(RuntimeWarning, match="vtc") as told:
        results += in_threads(lambda: USES["gathers"]()[0])
    assert sum("vtc" in str(w.message) for w in told) == 1
    assert len(results) == 4
    assert all(torch.equal(result, in_torch("gathers")[0]) for result in results)


@pytest.mark.parametrize("kept", [False, True])
def test_while_a_graph_is_captured_what_is_known_decides(
    kept: bool, trials: list[str], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    module, function = WRAPPERS["gathers"]
    real, calls = getattr(module, function), []
    monkeypatch.setattr(module, function, lambda *a, **k: calls.append(1) or real(*a, **k))
    capturing = [True]
    monkeypatch.setattr(proof, "_capturing", lambda device: capturing[0])
    same(USES["gathers"](), in_torch("gathers"))
    monkeypatch.setenv("VTC_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="captured; call it once before"):
        USES["gathers"]()
    monkeypatch.delenv("VTC_BACKEND")
    assert not trials
    assert not calls
    assert not [w for w in recwarn if "vtc" in str(w.message)]
    capturing[0] = False
    USES["gathers"]()  # not held against the kernel
    assert (len(trials), len(calls)) == (1, 2)
    if kept:
        forget()
    capturing[0] = True
    same(USES["gathers"](), in_torch("gathers"))
    assert (len(trials), len(calls)) == (1, 3)


def test_under_torch_compile_nothing_is_asked(trials: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the CPU is a CPU again
    monkeypatch.delenv("VTC_BACKEND", raising=False)
    monkeypatch.setattr(backend, "_missing", lambda: "")
    assert backend.backend(torch.device("cuda")) == "triton"
    x = normal(0, 6, 3)

    def call(x: Tensor) -> Tensor:
        return ops.farthest_first(x, 4) if backend.backend(torch.device("cuda")) == "torch" else x

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), ops.farthest_first(x, 4))
    assert proof.proved(CPU, lambda: None, recursion.picks)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(proof, "_on_trial", lambda device: True)
    assert proof.proved(CPU, lambda: pytest.fail("asked"), recursion.picks)
    assert not trials


# ------------------------------------------------------------------------------------------------------------ the cache


def test_a_second_process_tries_nothing(trials: list[str]) -> None:
    for use in USES.values():
        use()
    assert len(trials) == 4
    (around,) = json.loads(remembered.cache_file().read_text()).items()
    assert all(
        words in around[0] for words in ("cpu", "driver one", f"torch {torch.__version__}", "triton ", "source ")
    )
    assert sorted(around[1]) == sorted(trials)
    assert [path.name for path in remembered.cache_file().parent.iterdir()] == ["kernels.json"]
    forget()
    for name in USES:
        same(USES[name](), in_torch(name))
    assert len(trials) == 4


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("_driver", lambda: "two"),
        ("_source", lambda: "0123"),
        ("device_name", lambda device: "another"),
        ("_version", lambda package: "9.9"),
    ],
)
def test_other_surroundings_try_again(
    what: str, value: Any, trials: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    USES["gathers"]()
    forget()
    monkeypatch.setattr(remembered, what, value)
    USES["gathers"]()
    assert len(trials) == 2
    assert len(json.loads(remembered.cache_file().read_text())) == 2


@pytest.mark.parametrize(("what", "value"), [("_driver", lambda: ""), ("interpreted", lambda: True)])
def test_where_surroundings_cannot_be_told_nothing_is_kept(
    what: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, what, value)
    USES["gathers"]()
    assert not remembered.cache_file().exists()


def test_the_source_is_that_of_the_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert remembered._source() == remembered._source() != ""
    before = remembered._source()
    copy = tmp_path / "ops"
    (copy / "kernels").mkdir(parents=True)
    for path in Path(remembered.__file__).parent.rglob("*.py"):
        (copy / path.relative_to(Path(remembered.__file__).parent)).write_bytes(path.read_bytes())
    monkeypatch.setattr(remembered, "__file__", str(copy / "remembered.py"))
    assert remembered._source() == before
    with (copy / "kernels" / "rows.py").open("a") as file:
        file.write("\n")
    assert remembered._source() != before


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"a": 1}', '{"a": [1]}', "\x00", "[" * 100_000, "9" * 5000], ids=lambda t: t[:9]
)
def test_a_file_that_is_no_cache_is_ignored(text: str, trials: list[str]) -> None:
    remembered.cache_file().parent.mkdir(parents=True)
    remembered.cache_file().write_text(text)
    USES["gathers"]()
    forget()
    USES["gathers"]()
    assert len(trials) == 1  # and replaced


@pytest.mark.parametrize("where", ["a file", "a folder in the file's place", "a name that cannot be"])
def test_a_cache_that_cannot_be_written_is_ignored(
    where: str, trials: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "a file":
        (tmp_path / "cache").write_text("")
    elif where == "a folder in the file's place":
        (tmp_path / "cache" / "kernels.json").mkdir(parents=True)
        (tmp_path / "cache" / "kernels.json" / "more").touch()
    else:
        monkeypatch.setenv("VTC_CACHE", "/proc/nowhere")
    for _ in range(2):
        forget()
        same(USES["gathers"](), in_torch("gathers"))
    assert len(trials) == 2


def test_a_card_and_its_driver_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert remembered.device_name(torch.device("cuda", 1)) == "card 1 (9.0)"
    assert remembered.device_name(CPU) == "cpu"
    real, files = Path, {"/proc/driver/nvidia/version": tmp_path / "driver"}
    monkeypatch.setattr(remembered, "Path", lambda path: real(files.get(path, tmp_path / "none")))
    assert remembered._driver() == ""
    (tmp_path / "driver").write_text("NVRM version: 580.82\nGCC version: 12\n")
    assert remembered._driver() == "NVRM version: 580.82"
    files = {"/sys/module/amdgpu": tmp_path}
    monkeypatch.setattr(remembered, "Path", lambda path: real(files.get(path, tmp_path / "none")))
    assert remembered._driver().startswith("amdgpu of ")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert remembered.cache_file() == tmp_path / "cache" / "kernels.json"
    monkeypatch.delenv("VTC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert remembered.cache_file() == tmp_path / "xdg" / "vtc" / "kernels.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the standard tells to ignore
    monkeypatch.setenv("HOME", str(tmp_path))
    assert remembered.cache_file() == tmp_path / ".cache" / "vtc" / "kernels.json"


def test_old_surroundings_are_forgotten_some_day(monkeypatch: pytest.MonkeyPatch) -> None:
    for driver in range(cache.PLACES + 3):
        monkeypatch.setattr(remembered, "_driver", lambda driver=driver: f"no. {driver},")
        remembered._surroundings.cache_clear()
        remembered.add(CPU, "a case")
    kept = list(json.loads(remembered.cache_file().read_text()))
    assert len(kept) == cache.PLACES
    assert f"no. {driver}," in kept[-1]


# ------------------------------------------------------------------------------------------------------------ the cases


def greedy_job(n: int, d: int, k: int, mode: str = "", dtype: torch.dtype = torch.float32) -> tuple[recursion.Job]:
    start = torch.zeros(1, dtype=torch.long) if mode in ("start", "sum") else None
    each = [torch.ones(1, n) if mode == name else None for name in ("importance", "weights")]
    mask = torch.ones(1, n, dtype=torch.bool)
    x = normal(0, 1, n, d).to(dtype)
    return (recursion.Job(x, k, mask, start, each[0], 0.5, mode == "sum", each[1]),)


REFERENCES = {
    "greedy picks": recursion.picks,
    "attention rows": scores.attention_in_torch,
    "transition scores": scores.variation_in_torch,
    "gathers": gather.gathered,
}


def describe(name: str) -> proof.Case:
    """The case of the use above."""
    found: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (greedy, gather, scores):
            patch.setattr(module, "proved", lambda device, describe, reference: found.append(describe()) or False)
        with torch.device("cpu"), torch.autocast("cpu", enabled=False), torch.inference_mode(False):
            USES[name]()
    return found[0]


def usual() -> Iterator[proof.Case]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VTC_BACKEND", raising=False)
        for case, _ in proofs.cases(CPU):
            yield case


def test_a_trial_runs_what_its_call_is_compiled_for() -> None:
    """Its arguments make the same case, but for the number of tokens, which it replaces."""
    kinds = set()
    for case in usual():
        arguments = case.arguments(CPU)
        if case.kernel == "greedy picks":
            again = greedy_kernel.case(*arguments)
            chosen = {"block", "rows", "blocks", "tile", "by"}
            assert [f for f in again.facts if f[0] not in chosen] == [f for f in case.facts if f[0] not in chosen]
        elif case.kernel == "attention rows":
            assert rows.case(*arguments[:2], *arguments[3:]).facts == case.facts
        elif case.kernel == "transition scores":
            assert transition.case(*arguments).facts == case.facts
        else:
            tensors, index, dims = arguments
            (launch,) = gather_kernel.launches(tensors, dims)
            assert gather_kernel.case(launch, index).facts == case.facts
        kinds.add(case.kernel)
    assert kinds == set(USES)


KERNELS = {
    greedy_kernel: ("begin", "digits", "gram", "loop", "isolated", "step"),
    rows: ("normalisers", "weights", "mean"),
    transition: ("change", "share"),
    gather_kernel: ("gather",),
}


def launched(call: Callable[[], Any]) -> set[Any]:
    """The variants that a call has Triton compile: kernel, constants, and of each argument what the compiler knows."""
    found = set()

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return self.launch

        def launch(self, *arguments: Any, **constants: Any) -> None:
            known = [
                (str(a.dtype), a.data_ptr() % 16 == 0)
                if isinstance(a, Tensor)
                else a
                if isinstance(a, tuple)
                else type(a)
                for a in arguments
            ]
            found.add((self.name, tuple(known), tuple(sorted(constants.items()))))

    with pytest.MonkeyPatch.context() as patch:
        for module, names in KERNELS.items():
            for name in names:
                patch.setattr(module, name, Recorder(name))
        call()
    return found


def wide(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


LAUNCHES: dict[str, Callable[[], Any]] = {
    "577": lambda: ops.farthest_first(wide(577, 896), 64),
    "2880, mmr": lambda: ops.max_marginal_relevance(wide(2880, 1024), wide(2880, dtype=torch.float32), 320),
    "8 x 577, sum": lambda: ops.max_sum(wide(8, 577, 64), 300, 0),
    "16384": lambda: ops.farthest_first(wide(16384, 64), 3),
    "9000 odd": lambda: ops.farthest_first(wide(9000, 17)[:, :16], 3, 0, weights=wide(9000, dtype=torch.float32)),
    "few picks": lambda: ops.farthest_first(wide(640, 20, dtype=torch.float64), 2, 0),
    "small": lambda: ops.farthest_first(wide(2, 4, dtype=torch.float16), 2, 0),
    "7 heads a key": lambda: scores.row_attention(wide(1, 28, 64, 128), wide(1, 4, 900, 128), 0.1, cap=5.0),
    "one row": lambda: scores.row_attention(
        wide(2, 8, 1, 96), wide(2, 8, 50, 96), 0.1, mask=torch.ones(2, 50, dtype=torch.bool), window=9
    ),
    "cut heads": lambda: scores.row_attention(wide(2, 8, 3, 97)[..., 1:], wide(2, 8, 50, 96), 0.1),
    "mixed": lambda: ops.transition_variation(wide(1, 8, 3584), wide(1, 8, 3584, dtype=torch.float32)),
    "cut in the middle": lambda: ops.transition_variation(wide(1, 9, 17)[..., 1:], wide(1, 9, 17)[..., :16]),
    "odd scores": lambda: ops.transition_variation(wide(1, 9, 5), wide(1, 9, 5), absolute=True),
    "stage": lambda: gather.gather_columns([wide(1, 50, 896), wide(1, 50, dtype=torch.long)], INDEX),
    "keys": lambda: gather.gather_columns([wide(1, 2, 50, 128)] * 5, INDEX, 2),
    "cut": lambda: gather.gather_columns([wide(1, 50, 9)[..., 1:]], INDEX),
}
INDEX = torch.zeros(1, 7, dtype=torch.long)


@pytest.mark.parametrize("call", LAUNCHES.values(), ids=LAUNCHES)
def test_a_trial_launches_the_variants_of_its_call(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[proof.Case] = []
    for module in (greedy, gather, scores):
        monkeypatch.setattr(module, "proved", lambda device, describe, reference: found.append(describe()) or True)
    wanted = launched(call)
    assert wanted
    tried = set().union(*(launched(lambda case=case: case.run(*case.arguments(CPU))) for case in found))
    assert tried >= wanted


@pytest.mark.parametrize(("aligned", "even"), list(itertools.product((True, False), repeat=2)))
@pytest.mark.parametrize("width", [1, 8, 15, 16, 31, 896])
def test_layouts(width: int, aligned: bool, even: bool) -> None:
    x = layout.noise(0, 2, 3, width, dtype=torch.float32, device=CPU, aligned=aligned, even=even)
    assert x.shape == (2, 3, width)
    assert x.stride(-1) == 1
    assert (x.stride(1) % 16 == 0) == aligned
    assert layout.is_even(x) == even
    assert torch.equal(x, layout.noise(0, 2, 3, width, dtype=torch.float32, device=CPU))


@pytest.mark.parametrize("mode", ["", "start", "sum", "importance", "weights"])
@pytest.mark.parametrize(("tokens", "picks"), [(9, 9), (300, 2)])
def test_a_small_job_has_ties_padding_and_rows_without_direction(mode: str, tokens: int, picks: int) -> None:
    (job,) = greedy_kernel.case(*greedy_job(tokens, 20, picks, mode)).arguments(CPU)
    assert torch.equal(job.x[:, 7], job.x[:, 2])
    assert job.x[:, 9].eq(0).all()
    assert job.x[:, 11].isnan().all()
    assert (~job.mask).any(1).all()
    assert job.k == job.x.shape[1]


def test_pick_by_pick_with_the_blocks_of_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy_kernel, "GRAM_TOKENS", 0)
    case = greedy_kernel.case(*greedy_job(20, 3, 5))
    assert ("by", "rows") in case.facts
    assert proof.examine(case, recursion.picks, CPU).reason == ""


# ----------------------------------------------------------------------------------------------------------- the doctor


def test_the_doctor_tries_everything_again_and_tells(trials: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    few = [(describe(name), REFERENCES[name]) for name in ("gathers", "transition scores")]
    monkeypatch.setattr(proofs, "cases", lambda device: iter(few))
    monkeypatch.setattr(proofs, "backend", lambda device: "triton")
    for _ in range(2):
        assert [found.reason for found in proofs.prove("cpu")] == ["", ""]
    assert len(trials) == 4
    USES["gathers"]()
    assert len(trials) == 4  # what the doctor found counts
    spoil("gathers", monkeypatch, "is wrong")
    few[0] = describe("gathers"), REFERENCES["gathers"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="vtc")
        found = list(proofs.prove("cpu"))
    assert [bool(outcome.reason) for outcome in found] == [True, False]
    same(USES["gathers"](), in_torch("gathers"))


def test_the_doctors_cases_are_all_kernels_in_usual_dtypes_and_widths() -> None:
    names = [case.name for case in usual()]
    assert len(set(names)) == len(names)
    for kernel, dtype in itertools.product(USES, ("bfloat16", "float16", "float32")):
        assert any(name.startswith(kernel) and dtype in name for name in names), (kernel, dtype)


def test_where_torch_computes_there_is_nothing_to_prove(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proofs, "cases", lambda device: pytest.fail("asked"))
    assert list(proofs.prove("cpu")) == []
