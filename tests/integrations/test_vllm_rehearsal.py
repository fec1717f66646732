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

    def __init__(self, status=200, keys=None, root=None, said=b'{"choices": [{}]}'):
        self.status, self.said, self.heard = status, said, []
        state = types.SimpleNamespace(args=types.SimpleNamespace(api_key=keys))
        self.vllm = types.SimpleNamespace(state=state, root_path=root)

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            assert (await receive())["type"] == "lifespan.startup"
            await send({"type": "lifespan.startup.complete"})
            return
        message = await receive()
        self.heard.append((scope, json.loads(message["body"])))
        listening = asyncio.ensure_future(receive())
        await asyncio.sleep(0.01)
        assert not listening.done(), "the client has gone, and vLLM cancels what it asked for"
        if self.status is None:
            listening.cancel()
            raise OSError("broken")
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": self.said[:2], "more_body": True})
        await send({"type": "http.response.body", "body": self.said[2:], "more_body": False})
        assert (await listening)["type"] == "http.disconnect"


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


@pytest.mark.parametrize("body", [b"because", b"null", b"{}", b"[]", b'{"choices": []}'])
@pytest.mark.parametrize("status", [500, 503, 200])
def test_a_server_whose_engine_fails_does_not_start(status, body):
    """What vLLM has cancelled, it answers with 200 and null."""
    answer = start(Server(status, said=body))
    assert answer["type"] == "lifespan.startup.failed"
    assert f"{status} {body.decode()}" in answer["message"]


def test_a_server_that_breaks_does_not_start():
    answer = start(Server(None))
    assert answer["type"] == "lifespan.startup.failed"
    assert "broken" in answer["message"]


def test_a_server_that_takes_no_such_question_starts_and_says_so(caplog):
    assert start(Server(400, said=b"because"))["type"] == "lifespan.startup.complete"
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
    heard = []

    async def server(*given):
        heard.append(given)

    given = ({"type": "http", "path": "/health"}, "receive", "send")
    asyncio.run(Rehearsal(server)(*given))
    assert heard == [given]
