"""`vtc serve --check` against a stand-in for a server, which answers with transformers; vLLM's own is asked in
test_vllm_processes.py.
"""

import base64
import dataclasses
import http.server
import io
import json
import threading

import pytest
from PIL import Image
from typer.testing import CliRunner

import vtc
from vtc.checkpoint import Checkpoint
from vtc.cli import app
from vtc.config import CompressionConfig
from vtc_vllm import checkpoints

INFO = 'vtc:info{{config="{}",keep="0.25",method="divprune",model_name="tinyvlm",positions="original"}} 1.0'


@dataclasses.dataclass
class Served:
    """What it prunes with, what it is asked, and how its answers are spoilt."""

    checkpoint: Checkpoint
    method: vtc.DivPrune = dataclasses.field(default_factory=vtc.DivPrune)
    info: str = INFO
    key: str | None = None
    words: str = ""
    more: int = 0
    status: int = 200
    asked: list = dataclasses.field(default_factory=list)

    def answer(self, body):
        self.asked.append(body)
        picture, text = body["messages"][0]["content"]
        image = Image.open(io.BytesIO(base64.b64decode(picture["image_url"]["url"].split(",")[1])))
        method = dataclasses.replace(self.method, keep=body["mm_processor_kwargs"]["vtc_keep"])
        said = self.checkpoint.ask(image, text["text"], CompressionConfig.of(method, "original"), max_new_tokens=8)
        length = self.checkpoint.encode(image, text["text"])["input_ids"].shape[1] - said.total + said.kept + self.more
        return {"choices": [{"message": {"content": f" {said.text}{self.words}"}}], "usage": {"prompt_tokens": length}}

    def metrics(self):
        config = json.dumps(CompressionConfig.of(self.method, "original").to_dict())
        return "# HELP vtc:info how\n" + self.info.format(config.replace('"', '\\"')) + "\n"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self._send(
            self.server.served.metrics() if self.path == "/metrics" else json.dumps({"data": [{"id": "tinyvlm"}]})
        )

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self._send(json.dumps(self.server.served.answer(body)))

    def _send(self, text):
        served = self.server.served
        allowed = served.key is None or self.headers["authorization"] == f"Bearer {served.key}"
        self.send_response(served.status if allowed else 401)
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    checkpoints.write(folder, "tinyvlm")
    return Checkpoint.load(str(folder), dtype="float32")


@pytest.fixture
def serving(checkpoint):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.served = Served(checkpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def check(serving, *more):
    given = ["serve", "tinyvlm", "--check", "--questions", "2", "--port", str(serving.server_port), *more]
    done = CliRunner().invoke(app, given)
    return done.exit_code, done.stdout, done.stderr


def test_a_server_that_is_right(serving):
    code, out, _ = check(serving, "--keep", "9", "--dtype", "float32", "--max-model-len", "512")
    assert (code, out.splitlines()) == (
        0,
        ["2 of 2 answers and prompt lengths as with transformers (divprune, keep 9, positions original)"],
    )
    assert [body["mm_processor_kwargs"] for body in serving.served.asked] == [{"vtc_keep": 9}] * 2


@pytest.mark.parametrize(("spoilt", "said"), [({"words": "s"}, "served '"), ({"more": 1}, "tokens, expected")])
def test_a_server_that_is_not(serving, spoilt, said):
    for name, value in spoilt.items():
        setattr(serving.served, name, value)
    code, out, error = check(serving)
    assert code == 1, error
    assert out.startswith("0 of 2 answers")
    assert out.count(said) == 2


@pytest.mark.parametrize(
    ("how", "more", "said"),
    [
        ({"method": vtc.DivPrune(newlines="keep")}, [], "the server prunes with"),
        ({}, ["--method", "idpruner"], "the server prunes with"),
        ({"info": ""}, [], "nothing is pruned there"),
        ({"status": 503}, [], "answered 503"),
        ({"key": "secret"}, ["--api-key", "other"], "answered 401"),
    ],
)
def test_what_cannot_be_compared_is_refused(serving, how, more, said):
    for name, value in how.items():
        setattr(serving.served, name, value)
    code, _, error = check(serving, *more)
    assert code == 2
    assert said in error


def test_a_key_is_sent(serving, monkeypatch):
    serving.served.key = "secret"
    assert check(serving, "--api-key=secret", "--questions", "1")[0] == 0
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert check(serving, "--questions", "1")[0] == 0


def test_without_a_server():
    done = CliRunner().invoke(app, ["serve", "tinyvlm", "--check", "--port", "9"])
    assert done.exit_code == 2
    assert "start it first" in done.stderr
