"""Requests per second and time to first token of a vLLM server, pruned or not: `python benchmarks/serve_load.py`.

Loopback and bounded: one server for each keep, all started first, then asked in turns, round after round, so that a
busy machine disturbs all alike. The unpruned server is vLLM's own model without the plugin. Each request has an image
of its own, so that no cache helps. `random` is a LLaVA-1.5 with 576 visual tokens and random weights: large enough for
the language model to matter, small enough for a CPU. Fewer tokens that are not faster are a finding: a row has both.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from vtc.commands.serve import command
from vtc.profiling.provenance import provenance
from vtc_tinyvlm.evaluate import write_csv
from vtc_vllm import checkpoints, installed_version
from vtc_vllm.settings import read

OUT = Path(__file__).parent / "results" / "serve_load.csv"
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


def write_random(folder: Path) -> None:
    """A LLaVA-1.5 of 336-pixel images (576 tokens), 6 layers of width 512, and tinyvlm's words."""
    import torch
    import transformers as tf

    import vtc_tinyvlm
    from vtc_tinyvlm.model import build_config

    config = build_config()
    config.vision_config = tf.CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=336,
        patch_size=14,
    )
    config.image_seq_length = 576
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 512, 1536, 6
    text.num_attention_heads = text.num_key_value_heads = 8
    text.max_position_embeddings = 2048
    torch.manual_seed(0)
    model = tf.LlavaForConditionalGeneration(config)
    processor = vtc_tinyvlm.load()[1]
    processor.patch_size = 14
    processor.image_processor.size = {"shortest_edge": 336}
    processor.image_processor.crop_size = {"height": 336, "width": 336}
    written = folder / "written"
    model.save_pretrained(written)
    processor.save_pretrained(written)
    checkpoints.to_hub_layout(written, folder / "model")
    checkpoints.write_chat_template(folder / "model")


@contextlib.contextmanager
def server(path: Path, method: str, keep: float, threads: int, extra: list[str]) -> Iterator[str]:
    """A running server; yields its URL.

    Raises:
        RuntimeError: it ended, or did not answer within ten minutes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = command(str(path), read({"method": method, "keep": keep}), "127.0.0.1", port, extra)
    if keep == 1.0:
        for option in ("--hf-overrides", "--middleware"):
            at = run.index(option)
            del run[at : at + 2]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            run, env=os.environ | SETTINGS | {"OMP_NUM_THREADS": str(threads)}, stdout=log, stderr=log
        )
        try:
            _wait(process, f"http://127.0.0.1:{port}/health", log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(process: subprocess.Popen[bytes], url: str, log: Any, limit: float = 600.0) -> None:
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if process.poll() is not None:
            log.seek(0)
            raise RuntimeError(
                f"the server ended with {process.returncode}:\n{log.read()[-3000:].decode(errors='replace')}"
            )
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(1)
    raise RuntimeError(f"the server at {url} did not answer within {limit:.0f} s")


def pictures(count: int, side: int, seed: int) -> list[str]:
    """Different scenes, as data URLs."""
    import vtc_tinyvlm

    found = []
    for question in vtc_tinyvlm.split_questions(count, seed=seed):
        buffer = io.BytesIO()
        question.image.resize((side, side)).save(buffer, "PNG")
        found.append("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
    return found


async def load(url: str, images: list[str], concurrency: int, tokens: int) -> dict[str, Any]:
    """Ask about each image once, ``concurrency`` at a time."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=url, api_key="EMPTY", timeout=600, max_retries=0)
    model = (await client.models.list()).data[0].id
    turn = asyncio.Semaphore(concurrency)
    first: list[float] = []
    lengths: list[int] = []

    async def one(image: str) -> None:
        async with turn:
            start = time.perf_counter()
            parts: list[Any] = [{"type": "image_url", "image_url": {"url": image}}]
            stream = await client.chat.completions.create(
                model=model,
                messages=[
                    {"role": "user", "content": [*parts, {"type": "text", "text": "what color is the circle ?"}]}
                ],
                max_tokens=tokens,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            heard = False
            async for chunk in stream:
                if not heard and chunk.choices and (chunk.choices[0].delta.content or "") != "":
                    first.append(time.perf_counter() - start)
                    heard = True
                if chunk.usage is not None:
                    lengths.append(chunk.usage.prompt_tokens)
            if not heard:
                first.append(time.perf_counter() - start)

    begin = time.perf_counter()
    await asyncio.gather(*(one(image) for image in images))
    seconds = time.perf_counter() - begin
    await client.close()
    return {"seconds": seconds, "ttft": first, "prompt_tokens": statistics.mean(lengths)}


def quantile(values: list[float], share: float) -> float:
    """The value at that share of the sorted ones."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main(
    model: Annotated[str, typer.Option(help="Some of random, tinyvlm, tinyvlm-next, with commas.")] = "random,tinyvlm",
    method: Annotated[str, typer.Option(help="One of `vtc methods` that work before the language model.")] = "divprune",
    keep: Annotated[str, typer.Option(help="Keeps besides 1.0, with commas.")] = "0.5,0.25",
    requests: Annotated[int, typer.Option(min=4, help="Requests per round and server.")] = 16,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at a time.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds, after one that warms up.")] = 3,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens generated per request.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each server.")] = 1,
    out: Annotated[Path, typer.Option(help="CSV file, written anew.")] = OUT,
) -> None:
    """Start servers, load them in turns, write one row for each model and keep."""
    import torch

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the servers end too
    torch.set_num_threads(threads)  # as the servers have; provenance tells
    keeps = [1.0, *(float(each) for each in keep.split(","))]
    rows = []
    for name in model.split(","):
        for each, own, base in measured(name, method, keeps, requests, concurrency, rounds, tokens, threads):
            ttft = [seconds for one in own for seconds in one["ttft"]]
            rate, whole = ([requests / one["seconds"] for one in some] for some in (own, base))
            rows.append(
                {
                    "model": name,
                    "method": "none" if each == 1.0 else method,
                    "keep": each,
                    "prompt_tokens": own[0]["prompt_tokens"],
                    "requests": requests * rounds,
                    "concurrency": concurrency,
                    "new_tokens": tokens,
                    "requests_per_s": statistics.median(rate),
                    "against_unpruned": statistics.median(a / b for a, b in zip(rate, whole, strict=True)),
                    "ttft_p50_ms": 1000 * quantile(ttft, 0.5),
                    "ttft_p90_ms": 1000 * quantile(ttft, 0.9),
                    "ttft_p99_ms": 1000 * quantile(ttft, 0.99),
                    "server_threads": threads,
                    "vllm": installed_version() or "none",
                    **provenance(),
                }
            )
            typer.echo(" ".join(f"{key}={value}" for key, value in list(rows[-1].items())[:12]))
    write_csv(rows, out)
    typer.echo(f"written: {out}")


def measured(
    model: str,
    method: str,
    keeps: list[float],
    requests: int,
    concurrency: int,
    rounds: int,
    tokens: int,
    threads: int,
) -> list[tuple[float, list[dict[str, Any]], list[dict[str, Any]]]]:
    """For each keep, its rounds and those of the unpruned server."""
    extra = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", str(concurrency)]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        path = Path(folder) / "model"
        if model == "random":
            write_random(Path(folder))
        else:
            checkpoints.write(path, model)
        side = json.loads((path / "config.json").read_text())["vision_config"]["image_size"]
        side *= 2 if model == "tinyvlm-next" else 1  # so that it is cut
        urls = [running.enter_context(server(path, method, each, threads, extra)) for each in keeps]
        found: list[list[dict[str, Any]]] = [[] for _ in keeps]
        for turn in range(rounds + 1):
            images = pictures(requests, side, seed=1000 + turn)
            for at, url in enumerate(urls):
                done = asyncio.run(load(url, images, concurrency, tokens))
                typer.echo(f"{model}, round {turn}, keep {keeps[at]:g}: {requests / done['seconds']:.2f}/s", err=True)
                if turn:
                    found[at].append(done)
    return [(each, own, found[0]) for each, own in zip(keeps, found, strict=True)]


if __name__ == "__main__":
    typer.run(main)
