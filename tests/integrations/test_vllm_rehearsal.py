"""The question that a server is asked before it takes requests, without vLLM: an ASGI application of a few lines."""

import asyncio
import base64
import io
import json
import types

import pytest
from PIL import Image

from vtc_vllm.rehearsal import PATH, SIZE, Rehearsal


class Server:
    """Starts, answers, ends; `vllm` is what vLLM's application looks like from outside."""

    def __init__(self, status=200, keys=None, root=""):
        self.status, self.heard = status, []
        state = types.SimpleNamespace(args=types.SimpleNamespace(api_key=keys))
        self.vllm = types.SimpleNamespace(state=state, root_path=root)

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            assert (await receive())["type"] == "lifespan.startup"
            await send({"type": "lifespan.startup.complete"})
            return
        message = await receive()
        self.heard.append((scope, json.loads(message["body"])))
        assert (await receive())["type"] == "http.disconnect"
        if self.status is None:
            raise OSError("broken")
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b"because", "more_body": False})


def start(server):
    got = []

    async def receive():
        return {"type": "lifespan.startup"}

    async def send(message):
        got.append(message)

    asyncio.run(Rehearsal(server)({"type": "lifespan", "app": server.vllm}, receive, send))
    (answer,) = got
    return answer


def test_a_server_starts_behind_one_question(caplog, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    server = Server()
    assert start(server) == {"type": "lifespan.startup.complete"}
    ((scope, asked),) = server.heard
    assert (scope["method"], scope["path"], scope["app"]) == ("POST", PATH, server.vllm)
    assert b"authorization" not in dict(scope["headers"])
    url = asked["messages"][0]["content"][0]["image_url"]["url"]
    assert Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).size == SIZE
    assert not caplog.text


@pytest.mark.parametrize(("status", "said"), [(500, "500 because"), (503, "503 because"), (None, "broken")])
def test_a_server_whose_engine_fails_does_not_start(status, said):
    answer = start(Server(status))
    assert answer["type"] == "lifespan.startup.failed"
    assert said in answer["message"]


def test_a_server_that_takes_no_such_question_starts_and_says_so(caplog):
    assert start(Server(400))["type"] == "lifespan.startup.complete"
    assert "no self-check at the start" in caplog.text
    assert "400 because" in caplog.text


@pytest.mark.parametrize(("keys", "environment"), [(["first", "second"], None), (None, "first"), (["first"], "other")])
def test_it_knows_the_key(monkeypatch, keys, environment):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    if environment:
        monkeypatch.setenv("VLLM_API_KEY", environment)
    server = Server(keys=keys, root="/behind")
    start(server)
    assert dict(server.heard[0][0]["headers"])[b"authorization"] == b"Bearer first"
    assert server.heard[0][0]["path"] == "/behind" + PATH


def test_requests_pass():
    server, sent = Server(), []

    async def receive():
        return {"type": "http.disconnect"} if sent else sent.append(1) or {"type": "http.request", "body": b"{}"}

    async def send(message):
        sent.append(message)

    asyncio.run(Rehearsal(server)({"type": "http", "path": "/health"}, receive, send))
    assert [message["type"] for message in sent[1:]] == ["http.response.start", "http.response.body"]
    assert len(server.heard) == 1
