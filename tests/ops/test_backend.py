"""Which backend runs is one rule, and a backend that was forced and cannot run says so."""

from __future__ import annotations

import pytest
import torch

from vtc import ops
from vtc.ops import backend as module
from vtc.ops.backend import backend

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch):
    monkeypatch.delenv("VTC_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(module, "_missing", lambda: "")


def test_the_device_decides():
    assert backend(CPU) == "torch"
    assert backend(META) == "torch"
    assert backend(CUDA) == "triton"


def test_a_gpu_without_triton_runs_torch(monkeypatch):
    monkeypatch.setattr(module, "_missing", lambda: "Triton cannot be imported (No module named 'triton')")
    assert backend(CUDA) == "torch"


@pytest.mark.parametrize("device", [CPU, CUDA, META])
def test_torch_can_be_forced(device, monkeypatch):
    monkeypatch.setenv("VTC_BACKEND", "torch")
    assert backend(device) == "torch"


def test_triton_can_be_forced_where_it_runs(monkeypatch):
    monkeypatch.setenv("VTC_BACKEND", "triton")
    assert backend(CUDA) == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend(CPU) == "triton"


@pytest.mark.parametrize("device", [CPU, META])
def test_triton_forced_where_it_cannot_run(device, monkeypatch):
    monkeypatch.setenv("VTC_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=rf"no {device.type} backend.*TRITON_INTERPRET=1.*unset VTC_BACKEND"):
        backend(device)


def test_the_interpreter_is_for_the_cpu(monkeypatch):
    monkeypatch.setenv("VTC_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="no meta backend"):
        backend(META)


def test_triton_forced_and_not_installed(monkeypatch):
    monkeypatch.setenv("VTC_BACKEND", "triton")
    monkeypatch.setattr(module, "_missing", lambda: "Triton cannot be imported (No module named 'triton')")
    with pytest.raises(RuntimeError, match=r"No module named 'triton'.*visual-token-compression\[kernels\]"):
        backend(CUDA)


@pytest.mark.parametrize("value", ["cuda", "Triton", "1"])
def test_an_unknown_value(value, monkeypatch):
    monkeypatch.setenv("VTC_BACKEND", value)
    with pytest.raises(ValueError, match=f"VTC_BACKEND='{value}'"):
        backend(CPU)


@pytest.mark.parametrize(("value", "error"), [("triton", RuntimeError), ("gpu", ValueError)])
def test_an_op_says_it_too(value, error, monkeypatch):
    monkeypatch.setenv("VTC_BACKEND", value)
    with pytest.raises(error, match="VTC_BACKEND"):
        ops.farthest_first(torch.randn(4, 3), 2)
