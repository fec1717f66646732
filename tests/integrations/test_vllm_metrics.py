"""What is told at /metrics, as far as it goes without an engine; test_vllm_processes.py scrapes a server."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: `nox -s vllm` runs these", allow_module_level=True)

from prometheus_client import CollectorRegistry, generate_latest

from vtc_vllm import metrics

pytestmark = pytest.mark.vllm


@pytest.fixture
def folder(monkeypatch):
    made = tempfile.TemporaryDirectory()
    monkeypatch.setenv(metrics.FOLDER, made.name)
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    return made


def told(folder):
    registry = CollectorRegistry()
    registry.register(metrics.Engines(folder))
    return generate_latest(registry).decode()


def test_engines_stand_side_by_side(folder, monkeypatch):
    """Each in a process of its own, here by number."""
    for engine in range(2):
        monkeypatch.setattr(metrics.os, "getpid", lambda engine=engine: 100 + engine)
        meter = metrics.Meter("some", engine)
        for _ in range(engine + 1):
            meter.end(meter.begin(torch.device("cpu")), 3)
    text = told(folder)
    assert 'vtc:selected_media_total{engine="0",model_name="some"} 3.0' in text
    assert 'vtc:selected_media_total{engine="1",model_name="some"} 6.0' in text
    assert text.count("# TYPE vtc:selected_media_total counter") == 1
    assert 'vtc:selection_seconds_bucket{engine="1",le="+Inf",model_name="some"} 2.0' in text


def test_where_nothing_was_dropped_nothing_is_told(folder):
    meter = metrics.Meter("some", 0)
    meter.end(meter.begin(torch.device("cpu")), 0)
    assert told(folder).strip() == ""


def test_a_folder_that_has_gone_stops_no_engine(folder):
    meter = metrics.Meter("some", 0)
    folder.cleanup()
    meter.end(meter.begin(torch.device("cpu")), 1)


class Event:
    """Of a device that is two calls behind."""

    calls = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.calls += 1
        self.at = Event.calls

    def query(self):
        return Event.calls - self.at >= 2

    def elapsed_time(self, end):
        assert end.query(), "read before it has passed: that waits"
        return 1000.0 * (end.at - self.at)


def test_a_device_is_never_waited_for(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    meter = metrics.Meter("some", 0)
    for _ in range(3):
        meter.end(meter.begin(torch.device("cuda")), 1)
    text = told(folder)
    assert 'vtc:selection_seconds_count{engine="0",model_name="some"} 2.0' in text
    assert 'vtc:selection_seconds_sum{engine="0",model_name="some"} 2.0' in text
    assert 'vtc:selected_media_total{engine="0",model_name="some"} 3.0' in text


SHARED = """
import sys, torch
from vtc_vllm import metrics
from vtc.config import CompressionConfig
import vtc
if sys.argv[1] == "server":
    metrics.announce("some", CompressionConfig.of(vtc.DivPrune(keep=9)), "{}")
    metrics.prepared("some", "image", 144, 36)
    with metrics.rehearsing():
        metrics.prepared("some", "image", 144, 144)
else:
    meter = metrics.Meter("some", 0)
    meter.end(meter.begin(torch.device("cpu")), 2)
"""


def test_processes_that_share_everything(tmp_path):
    """As vLLM has it with several API servers: prometheus_client merges, and we write no files."""
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), metrics.FOLDER: str(tmp_path)}
    for who in ("server", "server", "engine"):
        subprocess.run([sys.executable, "-c", SHARED, who], env=environment, check=True)
        time.sleep(0.01)
    code = "import sys, prometheus_client.multiprocess as m, prometheus_client as p; r = p.CollectorRegistry();"
    code += "m.MultiProcessCollector(r); print(p.generate_latest(r).decode())"
    text = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    lines = text.stdout.splitlines()
    assert 'vtc:visual_tokens_before_total{model_name="some"} 288.0' in lines
    assert 'vtc:visual_tokens_after_total{model_name="some"} 72.0' in lines
    assert 'vtc:selected_media_total{engine="0",model_name="some"} 2.0' in lines
    assert sum(line.startswith("vtc:info{") for line in lines) == 1
    assert not list(tmp_path.glob("*.prom"))
    assert json.dumps(lines).count("# TYPE vtc:selection_seconds histogram") == 1
