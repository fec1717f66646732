"""What requests to the server ask of vtc: vLLM ignores fields that it does not know, and here they are refused.

For vLLM's option ``--middleware vtc_vllm.requests.Fields``, which `vtc serve` gives it. No vLLM in here.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from vtc.values import shortened
from vtc_vllm.settings import ARGUMENTS, KNOWN, REQUEST_KEEP, places, request_keep

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_DEAF = ("/v1/messages", "/cohere/")
"""Endpoints of vLLM that take images, and drop ``mm_processor_kwargs`` without a word."""

_THEIRS = frozenset(
    {"metadata", "tools", "functions", "documents", "response_format", "structured_outputs", "text", "text_format"}
)
"""Fields of a request within which the client makes up names."""


class Fields:
    """ASGI middleware: the answer to a field of ours that nothing would read, or that has a bad value, is 400 and why.

    A body is looked at when the server reads it, thus behind its authentication. It is held as a whole, as the server
    holds it too, and parsed only where a name of ours may be in it. What is no JSON passes in its pieces.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "http" and _is_json(scope):
            exchange = _Exchange(scope["path"], receive, send)
            receive, send = exchange.receive, exchange.send
        await self.app(scope, receive, send)


class _Exchange:
    """A request and its response, as the server sees them."""

    def __init__(self, path: str, receive: Receive, send: Send) -> None:
        self._path, self._receive, self._send = path, receive, send
        self._pieces: list[bytes] = []
        self._more, self._refused = True, False

    async def receive(self) -> Message:
        """The body in one piece, then what follows. Where it is refused, the server hears that the client has gone."""
        if not self._more:
            return await self._receive()
        while self._more:
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            self._pieces.append(message.get("body", b""))
            self._more = message.get("more_body", False)
        body = b"".join(self._pieces)
        self._pieces.clear()
        try:
            check(body, self._path)
        except ValueError as error:
            await self._refuse(str(error))
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": body, "more_body": False}

    async def _refuse(self, reason: str) -> None:
        self._refused = True
        error = {"message": reason, "type": "BadRequestError", "param": None, "code": 400}  # as vLLM's own
        body = json.dumps({"error": error}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await self._send({"type": "http.response.start", "status": 400, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def send(self, message: Message) -> None:
        """Pass on what the server answers, unless it was answered."""
        if not self._refused:
            await self._send(message)


def _is_json(scope: Message) -> bool:
    """Whether the server would read the body as JSON; it does so without a type, too."""
    types = [value for name, value in scope["headers"] if name == b"content-type"]
    return not types or b"json" in types[0].lower()


def check(body: bytes, path: str) -> None:
    """Look at the fields of ours in a request.

    Args:
        body: all of it. What is no JSON is left to the server to refuse.
        path: which endpoint is asked.

    Raises:
        ValueError: one that nothing reads, a bad value, or an endpoint that takes none; the message says what works.
    """
    if b'"vtc' not in body.lower():  # a name begins with a quote, which pictures in base64 do not have
        return
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return
    if not isinstance(request, dict):
        return
    for place in places({name: value for name, value in request.items() if name not in _THEIRS}):
        if place != KNOWN:
            raise ValueError(
                f"{shortened(place)}: no such field. What vtc knows is {KNOWN}: the share of an image's tokens that "
                "stay, such as 0.25, or their number, such as 64"
            )
        if any(part in path for part in _DEAF):
            raise ValueError(f"vLLM ignores {KNOWN} at {path}; /v1/chat/completions is an endpoint that takes it")
        if (keep := request[ARGUMENTS][REQUEST_KEEP]) is not None:
            request_keep(keep)
