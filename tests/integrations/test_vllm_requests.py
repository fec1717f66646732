"""Fields of ours in HTTP requests, without vLLM: the middleware before an ASGI application of a few lines."""

import asyncio
import json
import sys
import types

import pytest

from vtc_vllm import gate, requests
from vtc_vllm.settings import places, refuse_unknown

CHAT = "/v1/chat/completions"
JSON = [(b"content-type", b"application/json; charset=utf-8")]
KEEP = {"mm_processor_kwargs": {"vtc_keep": 0.25}}


def sent(value):
    return value if isinstance(value, bytes) else json.dumps(value).encode()


class Client:
    """One request: what it sends in which pieces, and what it gets."""

    def __init__(self, body, path=CHAT, headers=JSON, size=7, leaves=False, kind="http"):
        self.scope = {"type": kind, "path": path, "headers": headers}
        body = sent(body)
        pieces = [body[at : at + size] for at in range(0, len(body), size)] or [b""]
        last = len(pieces) - 1
        self.messages = [{"type": "http.request", "body": p, "more_body": i < last} for i, p in enumerate(pieces)]
        self.messages[last:] = [] if leaves else self.messages[last:]
        self.got = []

    async def receive(self):
        return self.messages.pop(0) if self.messages else {"type": "http.disconnect"}

    async def send(self, message):
        self.got.append(message)

    @property
    def status(self):
        return self.got[0]["status"]

    @property
    def answer(self):
        return b"".join(message.get("body", b"") for message in self.got)

    @property
    def error(self):
        return json.loads(self.answer)["error"]


class Server:
    """Reads a body, and answers with it in two pieces, if the client is still there."""

    def __init__(self, reads=True):
        self.reads, self.heard = reads, []

    async def __call__(self, scope, receive, send):
        status = 200
        while self.reads:
            self.heard.append(await receive())
            if self.heard[-1]["type"] == "http.disconnect":
                status = 500
            if not self.heard[-1].get("more_body"):
                break
        body = b"".join(message.get("body", b"") for message in self.heard)
        await send({"type": "http.response.start", "status": status, "headers": []})
        for piece in (body[:5], body[5:]):
            await send({"type": "http.response.body", "body": piece, "more_body": piece == body[:5]})
        if self.reads:
            self.heard.append(await receive())


def ask(*given, server=None, **more):
    client, server = Client(*given, **more), server or Server()
    asyncio.run(requests.Fields(server)(client.scope, client.receive, client.send))
    return client, server


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "what is vtc_keep ?"}], "model": "vtc-llava"},
        KEEP,
        {"mm_processor_kwargs": {"vtc_keep": 64, "size": {"height": 8}}},
        {"mm_processor_kwargs": {"vtc_keep": None}},
        {"mm_processor_kwargs": None},
        {"metadata": {"vtc_run": "7"}, "tools": [{"function": {"parameters": {"properties": {"vtc_x": {}}}}}]},
        {"text": "vtc", "response_format": {"json_schema": {"schema": {"properties": {"vtc_x": {}}}}}},
        [{"vtc_keep": 1}],
        "vtc_keep",
        {},
    ],
    ids=str,
)
def test_good_requests_arrive_as_they_are(body):
    client, server = ask(body)
    assert (client.status, client.answer) == (200, sent(body))
    assert len(client.got) == 3
    assert [message["type"] for message in server.heard] == ["http.request", "http.disconnect"]


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"vtc_keep": 0.5}, "vtc_keep"),
        ({"vtc_kep": 0.5, **KEEP}, "vtc_kep"),
        ({"VTC-Keep": 0.5}, "VTC-Keep"),
        ({"vtc": {"keep": 0.5}}, "vtc"),
        ({"mm_processor_kwargs": {"vtc_kep": 0.5}}, "mm_processor_kwargs.vtc_kep"),
        ({"mm_processor_kwargs": {"images_kwargs": {"vtc_keep": 0.5}}}, "mm_processor_kwargs.images_kwargs.vtc_keep"),
        ({"extra_body": KEEP}, "extra_body.mm_processor_kwargs.vtc_keep"),
        ({"vllm_xargs": {"vtc_keep": 0.5}}, "vllm_xargs.vtc_keep"),
        (
            {"messages": [{"content": [{}, {"image_url": {"vtc_keep": 1}}]}]},
            "messages[0].content[1].image_url.vtc_keep",
        ),
        ({"messages": [[{"vtc_keep": 1}]]}, "messages[0][0].vtc_keep"),
    ],
    ids=str,
)
def test_a_field_that_nothing_reads_is_refused(body, place):
    client, server = ask(body)
    assert client.status == 400
    assert client.error["message"].startswith(f"{place}: no such field")
    assert "mm_processor_kwargs.vtc_keep" in client.error["message"]
    assert (client.error["type"], client.error["code"]) == ("BadRequestError", 400)
    assert dict(client.got[0]["headers"])[b"content-length"] == b"%d" % len(client.answer)
    assert len(client.got) == 2  # nothing of the server's own answer
    assert {message["type"] for message in server.heard} == {"http.disconnect"}


@pytest.mark.parametrize(
    "keep", ["half", "0.5", True, [0.5], {"image": 0.5}, 0, -1, 0.0, 1.5, float("nan"), float("inf")], ids=str
)
def test_a_bad_keep_is_refused(keep):
    client, _ = ask({"mm_processor_kwargs": {"vtc_keep": keep}})
    assert client.status == 400
    assert client.error["message"].startswith("vtc_keep of this request: keep=")


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens", "/cohere/v2/chat"])
def test_where_vllm_drops_the_keep_it_is_refused(path):
    client, _ = ask(KEEP, path=path)
    assert client.status == 400
    assert f"ignores mm_processor_kwargs.vtc_keep at {path}" in client.error["message"]
    assert ask({"messages": []}, path=path)[0].status == 200


@pytest.mark.parametrize("body", [b'{"vtc_keep": ', b"[" * 10**6 + b'"vtc"', b"", b'\xff\xfe"vtc'])
def test_what_is_no_json_is_left_to_the_server(body):
    client, _ = ask(body, size=10**5)
    assert (client.status, client.answer) == (200, body)


@pytest.mark.parametrize("headers", [[(b"content-type", b"multipart/form-data; boundary=x")], [(b"content-type", b"")]])
def test_other_types_pass_in_their_pieces(headers):
    body = b'--x\r\nContent-Disposition: form-data; name="vtc_keep"\r\n\r\n1\r\n--x--'
    client, server = ask(body, headers=headers)
    assert (client.status, client.answer) == (200, body)
    assert len(server.heard) > 5


def test_json_without_a_type_is_json():
    """To the server, too."""
    assert ask({"vtc_keep": 1}, headers=[])[0].status == 400


def test_a_client_that_leaves_in_the_middle():
    client, server = ask({"vtc_keep": 1}, leaves=True)
    assert [message["type"] for message in server.heard][:1] == ["http.disconnect"]
    assert client.status == 500


def test_nothing_is_read_that_the_server_does_not_read():
    """It may refuse a stranger before the body."""
    client, _ = ask({"vtc_keep": 1}, server=Server(reads=False))
    assert client.status == 200
    assert len(client.messages) > 1


def test_nothing_is_parsed_where_no_name_of_ours_can_be(monkeypatch):
    parsed = []
    monkeypatch.setattr(requests.json, "loads", parsed.append)
    ask({"image": "a" + "vtc" * 10**5}, size=10**4)
    assert parsed == []


def test_other_protocols_pass():
    client = Client(b"", kind="websocket")
    heard = []

    async def server(*given):
        heard.append(given)

    asyncio.run(requests.Fields(server)(client.scope, client.receive, client.send))
    assert heard == [(client.scope, client.receive, client.send)]


def test_names_in_python():
    """`LLM.generate`, where no middleware is."""
    refuse_unknown({"vtc_keep": 0.5, "size": {"height": 8}, 3: 4})
    for kwargs in ({"vtc_kep": 0.5}, {"images_kwargs": {"vtc_keep": 0.5}}):
        with pytest.raises(ValueError, match="all that vtc knows there is vtc_keep"):
            refuse_unknown(kwargs)
    assert list(places(None)) == []


# ---------------------------------------------------------------------------------------------------------- vLLM's gate


class Refused(Exception):
    """vLLM's own is no ValueError."""


def theirs(*, mm_processor_kwargs, media_io_kwargs, trust_request_mm_kwargs):
    """As vLLM's."""
    if not trust_request_mm_kwargs and (mm_processor_kwargs or media_io_kwargs):
        raise Refused("disabled by default")


def gated(**given):
    usual = {"mm_processor_kwargs": None, "media_io_kwargs": None, "trust_request_mm_kwargs": False}
    gate.without_ours(theirs)(**usual | given)


def test_the_gate_lets_the_keep_pass_and_nothing_else():
    for kwargs in (None, {}, {"vtc_keep": 0.5}):
        gated(mm_processor_kwargs=kwargs)
    for kwargs in ({"size": 3}, {"vtc_keep": 0.5, "size": 3}, {"vtc_kep": 0.5}):
        gated(mm_processor_kwargs=kwargs, trust_request_mm_kwargs=True)
        with pytest.raises(Refused, match=r"may give mm_processor_kwargs.vtc_keep only. disabled by default"):
            gated(mm_processor_kwargs=kwargs)
    with pytest.raises(Refused, match=r"^disabled by default"):
        gated(mm_processor_kwargs={"vtc_keep": 0.5}, media_io_kwargs={"image": {}})


def test_the_gate_is_put_in_once_and_only_where_it_fits(monkeypatch, caplog):
    gate.admit()  # no server here, nothing to do
    for there, fits in ((theirs, True), (print, False), (None, False)):
        module = types.SimpleNamespace(**{gate.NAME: there})
        monkeypatch.setitem(sys.modules, gate.MODULE, module)
        caplog.clear()
        gate.admit()
        put = getattr(module, gate.NAME)
        gate.admit()
        assert getattr(module, gate.NAME) is put
        assert (put is not there) == fits
        assert ("needs --trust-request-mm-kwargs" in caplog.text) != fits
