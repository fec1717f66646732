"""Is a server right? The same questions to it and to transformers with `vtc.patch`: answers, and lengths of prompts.

What `vtc serve MODEL ... --check` runs, against a server that was started with the same arguments. No vLLM in here.
"""

from __future__ import annotations

import base64
import io
import json
import re
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtc.commands.shared import SHIPPED
from vtc.config import CompressionConfig
from vtc.values import shortened, shown
from vtc_vllm import checkpoints
from vtc_vllm.selection import settle
from vtc_vllm.settings import ARGUMENTS, REQUEST_KEEP, read

if TYPE_CHECKING:
    from PIL.Image import Image

    from vtc.checkpoint import Checkpoint

TOKENS = 8
"""An answer is cut there."""
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Result:
    """What was found.

    Attributes:
        asked: how many questions.
        how: method, keep and positions.
        different: a line for each question with another answer or another length of the prompt.
    """

    asked: int
    how: str
    different: tuple[str, ...]

    def __str__(self) -> str:
        same = self.asked - len(self.different)
        lines = [f"{same} of {self.asked} answers and prompt lengths as with transformers ({self.how})"]
        lines += self.different[:5]
        if self.different:
            lines.append(
                "Both sides have to compute in one dtype: start the server with --dtype, and check with the same."
            )
        return "\n".join(lines)


def compare(
    model: str, config: CompressionConfig, url: str, questions: int, dtype: str = "auto", key: str | None = None
) -> Result:
    """Ask both.

    Args:
        model: a folder, a name on the hub, or a shipped model's.
        config: how the server was asked to prune.
        url: of the server, without ``/v1``.
        questions: how many, of those about the shipped scenes.
        dtype: that transformers computes in.
        key: of the server.

    Raises:
        OSError: no server, or no checkpoint.
        ValueError: the server prunes otherwise, nothing, or refuses a question.
    """
    from transformers.utils import logging

    import vtc_tinyvlm
    from vtc.checkpoint import Checkpoint

    logging.disable_progress_bar()
    name = _get(f"{url}/v1/models", key)["data"][0]["id"]
    told = _pruning(f"{url}/metrics", name, key)
    with tempfile.TemporaryDirectory(prefix="vtc-check-") as folder:
        if model in SHIPPED:
            checkpoints.write(Path(folder), model)
        checkpoint = Checkpoint.load(folder if model in SHIPPED else model, dtype=dtype)
        config = settle(checkpoint.model.config, config)
        if _without_keep(told) != _without_keep(config.to_dict()):
            raise ValueError(f"the server prunes with {shown(told)}, and asked for is {shown(config.to_dict())}")
        method, different = config.build(), []
        for q in vtc_tinyvlm.evaluation_questions(questions):
            text = q.prompt.removeprefix("<image> ")
            ours = _served(url, name, q.image, text, method.keep, key)
            theirs = _expected(checkpoint, q.image, text, config)
            if ours != theirs:
                different.append(
                    f"{text!r}: served {ours[0]!r} of {ours[1]} tokens, expected {theirs[0]!r} of {theirs[1]}"
                )
    return Result(questions, f"{method.name}, keep {method.keep}, positions {config.positions}", tuple(different))


def _served(url: str, name: str, image: Image, text: str, keep: Any, key: str | None) -> tuple[str, int]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    picture = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": text}]
    body = {"model": name, "max_tokens": TOKENS, "temperature": 0, ARGUMENTS: {REQUEST_KEEP: keep}}
    answer = _get(f"{url}/v1/chat/completions", key, body | {"messages": [{"role": "user", "content": parts}]})
    return str(answer["choices"][0]["message"]["content"]).strip(), int(answer["usage"]["prompt_tokens"])


def _expected(checkpoint: Checkpoint, image: Image, text: str, config: CompressionConfig) -> tuple[str, int]:
    answer = checkpoint.ask(image, text, config, max_new_tokens=TOKENS)
    length = checkpoint.encode(image, text)["input_ids"].shape[1]
    return answer.text, int(length) - answer.total + answer.kept


def _pruning(url: str, name: str, key: str | None) -> dict[str, Any]:
    for line in _text(url, key).splitlines():
        if line.startswith("vtc:info{"):
            labels = {found[1]: json.loads(f'"{found[2]}"') for found in _LABEL.finditer(line)}
            if labels["model_name"] == name:
                return read(json.loads(labels["config"])).to_dict()
    raise ValueError(f"{url} has no vtc:info of {shown(name)}: nothing is pruned there")


def _without_keep(config: dict[str, Any]) -> dict[str, Any]:
    """Each request says its own."""
    return {**config, "options": {name: value for name, value in config["options"].items() if name != "keep"}}


def _get(url: str, key: str | None, body: dict[str, Any] | None = None) -> Any:
    return json.loads(_text(url, key, body))


def _text(url: str, key: str | None, body: dict[str, Any] | None = None) -> str:
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url} answered {error.code}: {shortened(error.read().decode(errors='replace'))}") from None
    except urllib.error.URLError as error:
        raise OSError(
            f"no server at {url} ({error.reason}); start it first, with the same command without --check"
        ) from None
