"""vLLM in processes of its own: two that share a model, and the OpenAI server that `vtc serve` starts.

Beside test_vllm.py, so that pytest-xdist can run both at a time (`-n 2 --dist loadfile`).
"""

import asyncio
import base64
import contextlib
import importlib.util
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers as tf
from vllm_reference import QUESTIONS, SURROUNDINGS, agree, answer, reference

import vtc
import vtc_tinyvlm
from vtc_vllm import checkpoints

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: `nox -s vllm` runs these", allow_module_level=True)

from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def scenes():
    return vtc_tinyvlm.evaluation_questions(QUESTIONS)


# -------------------------------------------------------------------------------------------------------- two processes


def even_llava(path):
    """tinyvlm has three heads, which two processes cannot share: random weights with four, and its processor."""
    config = vtc_tinyvlm.model.build_config()
    config.text_config.num_attention_heads, config.text_config.num_key_value_heads = 4, 2
    torch.manual_seed(1)
    model = tf.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    _, processor = vtc_tinyvlm.load()
    model.generation_config = tf.GenerationConfig(eos_token_id=2, pad_token_id=0, do_sample=False)
    model.save_pretrained(path / "written")
    processor.save_pretrained(path / "written")
    checkpoints.to_hub_layout(path / "written", path / "even")
    return model, processor


def test_tensor_parallel(tmp_path, scenes):
    """Two processes, each with half of the heads; the pivot needs the CLS row, which is not among either's."""
    model, processor = even_llava(tmp_path)
    script = Path(__file__).parents[2] / ".ci" / "vllm" / "two_processes.py"
    run = [sys.executable, str(script), str(tmp_path / "even"), "24"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=600, env=os.environ | SURROUNDINGS)
    assert done.returncode == 0, done.stderr[-3000:]
    ours = [(ids, first) for ids, first in json.loads(done.stdout.splitlines()[-1])]
    theirs = []
    with vtc.patch(model, vtc.ToDRE(keep=0.25)):
        for q in scenes[:24]:
            theirs += answer(model, processor(images=q.image, text=q.prompt, return_tensors="pt"))
    agree(ours, theirs)


# --------------------------------------------------------------------------------------------------------------- server


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """`vtc serve tinyvlm`, as a user starts it: where it listens, and its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    vllms = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "16"]
    vllms += ["--num-gpu-blocks-override", "256", "--limit-mm-per-prompt", '{"image": 4}']
    run = [sys.executable, "-c", "from vtc.cli import main; main()", "serve", "tinyvlm", "--port", str(port), *vllms]
    folder = tmp_path_factory.mktemp("server")
    environment = os.environ | SURROUNDINGS | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "TMPDIR": str(folder)}
    environment["VLLM_LOGGING_LEVEL"] = "INFO"
    log = (folder / "log.txt").open("w+")
    process = subprocess.Popen(run, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            assert process.poll() is None, log.seek(0) or log.read()[-3000:]
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1", folder / "log.txt"
        process.terminate()
        assert process.wait(60) == 0
        assert not list(folder.glob("vtc-*"))
        assert ended(process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        log.close()


@pytest.fixture(scope="module")
def url(served):
    return served[0]


def ended(group):
    """Whether all of its processes are gone; Python's tracker of shared memory goes a moment after its parent."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def message(text, *images):
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def data_url(image):
    if isinstance(image, bytes):
        return "data:image/png;base64," + base64.b64encode(image).decode()
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return data_url(buffer.getvalue())


def test_a_check_of_the_running_server(url):
    run = [
        sys.executable,
        "-c",
        "from vtc.cli import main; main()",
        "serve",
        "tinyvlm",
        "--check",
        "--dtype",
        "float32",
    ]
    run += ["--port", url.split(":")[2].removesuffix("/v1"), "--questions", "12"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("12 of 12 answers and prompt lengths as with transformers (divprune, keep 0.25")


def test_a_server_with_good_and_bad_requests(url, scenes):
    """200 at a time, every other one bad: a bad keep, a broken picture, a placeholder too many, too long."""
    import openai

    client = openai.AsyncOpenAI(base_url=url, api_key="EMPTY", max_retries=0, timeout=300)

    def kwargs(**values):
        return {"extra_body": {"mm_processor_kwargs": values}}

    def bad(q, which):
        plain = {"messages": message(q.prompt[8:], q.image)}
        return [
            plain | kwargs(vtc_keep=1.5),
            plain | kwargs(vtc_keep="half"),
            {"messages": message(q.prompt[8:], b"no picture")},
            {"messages": message("<image> " + q.prompt[8:], q.image)},
            {"messages": message("what " * 600, q.image)},
        ][which % 5]

    async def one(i, q):
        asked = bad(q, i // 2) if i % 2 else {"messages": message(q.prompt[8:], q.image)} | kwargs(vtc_keep=0.5)
        try:
            done = await client.chat.completions.create(model="tinyvlm", max_tokens=3, temperature=0, **asked)
        except openai.APIStatusError as error:
            return error.status_code
        return done.choices[0].message.content.strip(), done.usage.prompt_tokens

    async def every():
        return await asyncio.gather(*(one(i, q) for i, q in enumerate(scenes[:200])))

    found = asyncio.run(every())
    assert found[1::2] == [400] * 100
    theirs, _ = reference(vtc_tinyvlm, scenes[0:200:2], vtc.DivPrune(keep=0.5))
    processor = vtc_tinyvlm.load()[1]
    answers = [processor.decode(ids, skip_special_tokens=True).strip() for ids, _ in theirs]
    assert [text for text, _ in found[0::2]] == answers
    assert max(tokens for _, tokens in found[0::2]) < 90  # of 144 visual tokens, 72
    # an image whose prompt was refused is asked about again; not that of a prompt too long, which vLLM refuses later
    for i in (1, 3, 7, 17):
        asked = {"model": "tinyvlm", "max_tokens": 3, "messages": message(scenes[i].prompt[8:], scenes[i].image)}
        assert post(url, "/v1/chat/completions", asked)[0] == 200


def post(url, path, body):
    """Status and answer."""
    request = urllib.request.Request(url.removesuffix("/v1") + path, json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.parametrize(
    ("path", "more", "said"),
    [
        ("/v1/chat/completions", {"vtc_keep": 0.5}, "vtc_keep: no such field"),
        ("/v1/chat/completions", {"vtc_keep": 0.5, "stream": True}, "vtc_keep: no such field"),
        ("/v1/chat/completions", {"mm_processor_kwargs": {"vtc_kep": 0.5}}, "mm_processor_kwargs.vtc_kep: no such"),
        ("/v1/chat/completions", {"mm_processor_kwargs": {"vtc_keep": [0.5]}}, "keep=[0.5] is not a number"),
        ("/v1/chat/completions", {"mm_processor_kwargs": "vtc_keep"}, "valid dictionary"),
        (
            "/v1/chat/completions",
            {"mm_processor_kwargs": {"vtc_keep": 0.5, "do_resize": False}},
            "mm_processor_kwargs.do_resize: a request to this server may give mm_processor_kwargs.vtc_keep only",
        ),
        ("/v1/chat/completions", {"media_io_kwargs": {"image": {"x": 1}}}, "media_io_kwargs are disabled"),
        ("/v1/completions", {"prompt": "what ?", "vtc_keep": 0.5}, "vtc_keep: no such field"),
        ("/v1/responses", {"input": "what ?", "vtc_keep": 0.5}, "vtc_keep: no such field"),
        ("/v1/messages", {"mm_processor_kwargs": {"vtc_keep": 0.5}}, "vLLM ignores mm_processor_kwargs.vtc_keep"),
        ("/invocations", {"vtc_keep": 0.5}, "vtc_keep: no such field"),
    ],
)
def test_fields_that_nothing_reads_are_refused(url, scenes, path, more, said):
    asked = {"model": "tinyvlm", "max_tokens": 3, "messages": message(scenes[0].prompt[8:], scenes[0].image)}
    status, answer = post(url, path, asked | more)
    assert status == 400
    assert said in answer["error"]["message"]


def test_one_line_says_what_is_pruned(served):
    log = served[1].read_text()
    assert log.count("prunes the visual tokens of tinyvlm (LlavaForConditionalGeneration): DivPrune(keep=0.25") == 1


def test_the_engine_was_checked_before_it_served(served):
    log = served[1].read_text()
    assert log.count("self-check passed: 144 -> 36 visual tokens") == 1
    assert "no self-check" not in log
    assert log.index("self-check passed") < log.index("Application startup complete")


def series(url):
    """At /metrics, those of ours: values by name and labels."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics", timeout=60) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    assert any(family.name.startswith("vllm:") for family in families)
    ours = [sample for family in families if family.name.startswith("vtc:") for sample in family.samples]
    return {(s.name, *(v for k, v in sorted(s.labels.items()) if k != "model_name")): s.value for s in ours}


def test_metrics(url, scenes):
    """An image at two keeps, and once more from the caches: prompts count it three times, the engine twice."""
    q, before = scenes[203], series(url)
    for keep in (0.5, 36, 0.5):
        asked = {"model": "tinyvlm", "max_tokens": 1, "messages": message(q.prompt[8:], q.image)}
        assert post(url, "/v1/chat/completions", asked | {"mm_processor_kwargs": {"vtc_keep": keep}})[0] == 200
    after = series(url)
    added = {name: value - before.get(name, 0) for name, value in after.items()}
    assert added["vtc:visual_tokens_before_total",] == 3 * 144
    assert added["vtc:visual_tokens_after_total",] == 72 + 36 + 72
    assert added["vtc:media_total", "image"] == 3
    assert [added["vtc:keep_bucket", le] for le in ("0.2", "0.25", "0.4", "0.5", "1.0")] == [0, 1, 1, 3, 3]
    assert added["vtc:selected_media_total", "0"] == added["vtc:selection_seconds_count", "0"] == 2
    assert 0 < added["vtc:selection_seconds_sum", "0"] < 5
    (told,) = [name for name in after if name[0] == "vtc:info"]
    assert told[2:] == ("0.25", "divprune", "original", version("visual-token-compression"))
    assert json.loads(told[1])["options"]["keep"] == 0.25


def test_prompts_are_the_same_wherever_one_asks(url, scenes):
    """With the keep that was asked for, and one BOS: /v1/responses has the tokenizer write it, others the template."""
    text, image = scenes[0].prompt[8:], scenes[0].image
    common = {"model": "tinyvlm", "temperature": 0}
    kept = {"mm_processor_kwargs": {"vtc_keep": 8}}
    chat = {"messages": message(text, image), "max_tokens": 3, "return_token_ids": True}
    parts = [{"type": "input_image", "image_url": data_url(image), "detail": "auto"}]
    parts.append({"type": "input_text", "text": text})
    source = {"type": "base64", "media_type": "image/png", "data": data_url(image).split(",")[1]}
    block = [{"type": "image", "source": source}, {"type": "text", "text": text}]

    def asked(path, body):
        status, answer = post(url, path, common | body)
        assert status == 200, answer
        return answer

    prompt = asked("/v1/chat/completions", chat | kept)["prompt_token_ids"]
    words = vtc_tinyvlm.load()[1].tokenizer(text, add_special_tokens=False).input_ids
    assert prompt == [1, *[4] * 8, *words]
    assert asked("/v1/chat/completions", chat | kept | {"add_special_tokens": True})["prompt_token_ids"] == prompt
    assert asked("/tokenize", {"messages": chat["messages"]} | kept)["tokens"] == prompt
    answer = asked("/v1/responses", {"input": [{"role": "user", "content": parts}], "max_output_tokens": 3} | kept)
    assert answer["usage"]["input_tokens"] == len(prompt)
    answer = asked("/v1/messages", {"messages": [{"role": "user", "content": block}], "max_tokens": 3})
    assert answer["usage"]["input_tokens"] == len(prompt) - 8 + 36


def test_the_example_client(url, scenes, tmp_path):
    """Streams; two images in one question."""
    script = Path(__file__).parents[2] / "integrations" / "vtc_vllm" / "examples" / "openai_client.py"
    files = []
    for i in range(2):
        files += ["--image", str(tmp_path / f"{i}.png")]
        scenes[i].image.save(files[-1])
    run = [sys.executable, str(script), "--url", url]
    done = subprocess.run([*run, *files, "what color is the circle ?"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "[2 images, " in done.stderr
    whole = subprocess.run([*run, *files, "--keep", "1.0", "what ?"], capture_output=True, text=True, timeout=120)
    few = subprocess.run([*run, *files, "--keep", "8", "what ?"], capture_output=True, text=True, timeout=120)
    lengths = [int(re.search(r"(\d+) tokens in the prompt", run.stderr)[1]) for run in (whole, few)]
    assert lengths[0] - lengths[1] == 2 * (144 - 8)
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert vtc_tinyvlm.is_correct(done.stdout, scenes[0].answer)
