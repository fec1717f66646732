"""Commands that start other processes: a signal reaches them, and nothing stays behind.

vLLM is played by a package of that name on PYTHONPATH, whose server says that it runs and what it hears.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vtc_tinyvlm
from vtc.children import ENDING, Relay
from vtc_lmms_eval import runs
from vtc_vllm import upstream

ROOT = Path(__file__).parents[1]
LIMIT = 60
"""Seconds until a process that should have done something is given up."""

SERVER = """\
import json, os, signal, sys, time
from pathlib import Path

folder = sys.argv[sys.argv.index("serve") + 1]
log = Path(os.environ["LOG"])


def say(text):
    with log.open("a") as file:
        file.write(text + "\\n")


def hear(number, frame):
    say(f"heard {number}")
    time.sleep(0.3)  # whoever waits for this server finds the last line
    say(f"folder {os.path.isdir(folder)}")
    sys.exit(int(os.environ["END"]))


for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, hear)
say(json.dumps({"pid": os.getpid(), "folder": folder}))
if (end := int(os.environ["END"])) < 0:
    os.kill(os.getpid(), -end)
time.sleep(60)
"""


def write_insides(root):
    """Sources in which all stands that vtc looks up before it starts vLLM, and nothing happens."""
    for module, needs in upstream.NEEDS.items():
        text, classes = [], {}
        for need in needs:
            name, _, parameters = need.partition("(")
            names = [each.strip() for each in parameters.rstrip(")").split(",") if each.strip()]
            if name.startswith("calls "):
                arguments = ", ".join(f"{each}=0" for each in names)
                text.append(f"def calling(ours): ours.{name.removeprefix('calls ')}({arguments})")
                continue
            owner, _, last = name.rpartition(".")
            inside = classes.setdefault(owner, []) if owner else text
            inside.append(f"def {last}({', '.join(names)}): ..." if "(" in need else f"{last}: int = 0")
        for owner, inside in classes.items():
            text += [f"class {owner}:", *(f"    {line}" for line in inside)]
        path = root.joinpath(*module.split(".")[1:]).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(text))


def test_the_insides_that_are_played_are_all_that_is_looked_for(tmp_path):
    write_insides(tmp_path)
    upstream.missing.cache_clear()
    assert upstream.missing(tmp_path) == ()


@pytest.fixture
def stage(tmp_path):
    """A folder with a package `vllm`, one for temporary files, a log, and the environment that leads there."""
    package = tmp_path / "path" / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    (package / "main.py").write_text(SERVER)
    write_insides(tmp_path / "path" / "vllm")
    for each in (package, package.parent, package.parents[1]):
        (each / "__init__.py").touch()
    about = tmp_path / "path" / "vllm-0.32.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    (tmp_path / "temporary").mkdir()
    return tmp_path


def hear_signals():
    """Undo what `nohup` or a script's `&` around these tests has children ignore."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def running(stage, *arguments, END="0"):
    """Python with these arguments, in a process group of its own, of which nothing is left in the end."""
    environment = os.environ | {
        "PYTHONPATH": str(stage / "path"),
        "TMPDIR": str(stage / "temporary"),
        "LOG": str(stage / "log"),
        "END": END,
    }
    with (stage / "errors").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=environment,
            start_new_session=True,
            preexec_fn=hear_signals,
            stdout=errors,
            stderr=errors,
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def serving(stage, model, before="pass", **end):
    """`vtc serve MODEL`."""
    return running(stage, "-c", f"from vtc.cli import main; import os, signal; {before}; main()", "serve", model, **end)


def said(stage):
    log = stage / "log"
    return log.read_text().splitlines() if log.exists() else []


def started(stage, process):
    """What the server said first."""
    end = time.monotonic() + LIMIT
    while not said(stage):
        assert process.poll() is None, errors(stage)
        assert time.monotonic() < end, f"no server within {LIMIT} s"
        time.sleep(0.05)
    return json.loads(said(stage)[0])


def errors(stage):
    return (stage / "errors").read_text()


def nobody_of(group):
    """Whether no process of this group is alive."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("number", ENDING)
def test_a_temporary_model_ends_with_its_server(stage, number):
    with serving(stage, "tinyvlm", END="3") as process:
        server = started(stage, process)
        assert server["pid"] != process.pid
        assert os.path.isfile(os.path.join(server["folder"], "config.json"))
        process.send_signal(number)
        assert process.wait(LIMIT) == 3, errors(stage)
        assert said(stage)[1:] == [f"heard {ENDING[number]}", "folder True"]
        assert os.listdir(stage / "temporary") == []
        assert nobody_of(process.pid)


def test_a_server_that_is_killed(stage):
    with serving(stage, "tinyvlm", END="-9") as process:
        assert process.wait(LIMIT) == 128 + signal.SIGKILL
        assert os.listdir(stage / "temporary") == []


def test_a_signal_before_there_is_a_server(stage):
    """While the checkpoint is being written: the folder goes, and no server comes."""
    before = (
        "import vtc_vllm.checkpoints as c; real = c.to_hub_layout; "
        "c.to_hub_layout = lambda *paths: (real(*paths), os.kill(os.getpid(), signal.SIGTERM))"
    )
    with serving(stage, "tinyvlm", before=before) as process:
        assert process.wait(LIMIT) == 128 + signal.SIGTERM
        assert said(stage) == []
        assert os.listdir(stage / "temporary") == []


def test_an_ordinary_model_is_served_by_the_same_process(stage):
    """There is nothing to clean up, so nobody stands between a signal and the server."""
    model = str(shutil.copytree(vtc_tinyvlm.CHECKPOINT, stage / "model"))
    with serving(stage, model, END="3") as process:
        assert started(stage, process) == {"pid": process.pid, "folder": model}
        process.terminate()
        assert process.wait(LIMIT) == 3
        assert nobody_of(process.pid)


def test_without_vllm_nothing_is_written(stage):
    shutil.rmtree(stage / "path")
    if any(Path(entry, "vllm").is_dir() for entry in sys.path):
        pytest.skip("vLLM is installed")
    with serving(stage, "tinyvlm", before="import tempfile; tempfile.TemporaryDirectory = None") as process:
        assert process.wait(LIMIT) == 2
        assert "vllm is not installed" in errors(stage)


def test_the_servers_of_the_benchmark_end_with_it(stage):
    script = str(ROOT / "benchmarks" / "serve_load.py")
    with running(stage, script, "--model", "tinyvlm", "--out", str(stage / "out.csv")) as process:
        started(stage, process)
        process.terminate()
        assert process.wait(LIMIT) == 128 + signal.SIGTERM
        assert os.listdir(stage / "temporary") == []
        assert nobody_of(process.pid)


# ------------------------------------------------------------------------------------------------------------ by itself


@pytest.fixture
def alive():
    """A signal that nobody takes from this process is a failure, not its end."""

    def fail(number, frame):
        raise AssertionError(f"nobody takes signal {number}")

    before = {each: signal.signal(each, fail) for each in ENDING}
    yield fail
    for each, handler in before.items():
        signal.signal(each, handler)


def child(code):
    return [sys.executable, "-c", f"import os, signal, sys, time; {code}"]


def test_signals_mean_before_and_after_what_they_meant(alive):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    with Relay() as relay:
        assert [signal.getsignal(each) == relay._hear for each in ENDING] == [True, True, False]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert [signal.getsignal(each) for each in ENDING] == [alive, alive, signal.SIG_IGN]
    assert relay.heard == 0


@pytest.mark.parametrize("number", ENDING)
def test_a_child_dies_of_the_signal(alive, number):
    with Relay() as relay:
        code = f"signal.signal({ENDING[number]}, signal.SIG_DFL); os.kill(os.getppid(), {number}); time.sleep(60)"
        assert relay.run(child(code)) == 128 + ENDING[number]
        assert relay.heard == number


def test_a_signal_while_the_child_is_being_started(alive, monkeypatch):
    """It is there, and nobody knows it yet."""
    real = subprocess.Popen

    def slow(*given, **settings):
        started = real(*given, **settings)
        os.kill(os.getpid(), signal.SIGTERM)
        return started

    monkeypatch.setattr(subprocess, "Popen", slow)
    with Relay() as relay:
        assert relay.run(child("time.sleep(60)")) == 128 + signal.SIGTERM


def test_a_child_that_ends_by_itself(alive):
    with Relay() as relay:
        assert relay.run(child("sys.exit(5)")) == 5
        os.kill(os.getpid(), signal.SIGTERM)  # nobody is there any more
        assert relay.run(["/no/such/command"]) == 128 + signal.SIGTERM
    with pytest.raises(FileNotFoundError), Relay() as relay:
        relay.run(["/no/such/command"])


# --------------------------------------------------------------------------------------------------------- `vtc eval`


def test_a_signal_ends_a_run_of_lmms_eval_and_the_runs_behind_it(alive, monkeypatch, tmp_path):
    monkeypatch.setattr(runs.Run, "folder", lambda self, settings, out: out / "run")
    code = f"print('here', flush=True); os.kill(os.getppid(), {signal.SIGTERM}); time.sleep(60)"
    monkeypatch.setattr(runs.Run, "command", lambda self, settings, folder: child(code))
    with pytest.raises(SystemExit) as told:
        runs.execute(runs.plan(["none"], [], [], ["t"])[0], runs.Settings("base", "model", "cpu"), tmp_path)
    assert told.value.code == 128 + signal.SIGTERM
    assert (tmp_path / "run" / "log.txt").read_text() == "here\n"
