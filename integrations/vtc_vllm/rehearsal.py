"""Before a server takes requests, one with a picture goes through it, so that the engine's self-check happens then.

For vLLM's option ``--middleware vtc_vllm.rehearsal.Rehearsal``, which `vtc serve` gives it. Asked is the endpoint that
clients ask, in this process, behind the same middleware: of all ways into an engine the one that stays. What is checked
is in :mod:`vtc_vllm.watch`. No vLLM in here.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import os
from typing import Any

from vtc_vllm.requests import App, Message, Receive, Send

logger = logging.getLogger("vllm.vtc")

PATH = "/v1/chat/completions"
SIZE = 448, 336
"""Width and height of the picture: not square, so that swapped sides show."""


class Rehearsal:
    """ASGI middleware: a server whose engine fails the self-check does not start."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass everything on; when the application has started, ask it."""

        async def asking(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                try:
                    await rehearse(self.app, scope.get("app"))
                except Exception as error:
                    message = {"type": "lifespan.startup.failed", "message": f"vtc: {error}"}
            await send(message)

        await self.app(scope, receive, asking if scope["type"] == "lifespan" else send)


async def rehearse(app: App, outer: Any = None) -> None:
    """Ask one question about a picture.

    Where the server cannot be asked so (no chat template, too short a context), that is told, and the check happens
    with the first picture that a client sends.

    Args:
        app: what answers.
        outer: the application that it belongs to, vLLM's, which knows its keys.

    Raises:
        RuntimeError: the engine has failed.
    """
    body = json.dumps(question()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    state = getattr(outer, "state", None)
    keys = getattr(getattr(state, "args", None), "api_key", None) or [os.environ.get("VLLM_API_KEY")]
    headers += [(b"authorization", f"Bearer {key}".encode()) for key in keys[:1] if key]
    root = getattr(outer, "root_path", None) or ""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": root + PATH, "raw_path": (root + PATH).encode(), "query_string": b"", "root_path": root,
        "headers": headers, "client": ("127.0.0.1", 0), "server": ("127.0.0.1", 0), "app": outer, "state": {},
    }  # fmt: skip
    answers: list[Message] = []
    asked = [{"type": "http.request", "body": body, "more_body": False}]

    answered = asyncio.Event()

    async def receive() -> Message:
        if asked:
            return asked.pop()
        await answered.wait()  # a client that goes before that is answered no more
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        answers.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            answered.set()

    await app(scope, receive, send)
    status = next((message["status"] for message in answers if message["type"] == "http.response.start"), 500)
    said = b"".join(message.get("body", b"") for message in answers).decode(errors="replace")
    if status >= 500 or (status == 200 and not _is_answer(said)):
        raise RuntimeError(f"the first question was answered with {status} {said}; the engine's log says why")
    if status != 200:
        logger.warning("no self-check at the start, but with the first picture: %s answered %d %s", PATH, status, said)


def _is_answer(said: str) -> bool:
    """Whether a model wrote it: what vLLM has cancelled, it answers with 200, and null."""
    try:
        return bool(json.loads(said)["choices"])
    except (ValueError, TypeError, KeyError):
        return False


def question() -> dict[str, Any]:
    """A chat with one picture in it; one token is enough of an answer."""
    from PIL import Image

    picture = Image.linear_gradient("L").resize(SIZE)
    colours = Image.merge("RGB", [picture, picture.rotate(180), Image.radial_gradient("L").resize(SIZE)])
    buffer = io.BytesIO()
    colours.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is it ?"}]
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 1, "temperature": 0}
