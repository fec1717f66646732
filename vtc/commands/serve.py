"""`vtc serve`: vLLM's OpenAI server with a pruned model, a thin front to its own command."""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from vtc.children import Relay
from vtc.commands.shared import A_MODEL, KeepText, MethodName, Options, Positions, build_config, clear_errors
from vtc.names import SHIPPED, at_hand
from vtc.values import shown

if TYPE_CHECKING:
    from vtc.config import CompressionConfig

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help=f"A checkpoint: {A_MODEL}.")] = "tinyvlm",
    method: MethodName = "divprune",
    keep: KeepText = "0.25",
    option: Options = None,
    positions: Positions = None,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is everywhere.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where to listen.")] = 8000,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command instead of running it.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Ask the running server of these arguments, and compare with transformers.")
    ] = False,
    questions: Annotated[int, typer.Option(min=1, help="How many, with --check.")] = 24,
) -> None:
    """Serve a model with vLLM, pruned, as an OpenAI endpoint. Options unknown here go to vLLM.

    For example --tensor-parallel-size 2, --max-model-len 8192. A request may ask for a keep of its own with
    mm_processor_kwargs={"vtc_keep": 0.5}.
    """
    from vtc_vllm import check_version, checkpoints, upstream

    with clear_errors():
        config = build_config(method, keep, option, positions)
        extra = list(context.args)
        if check:
            _compare(model, config, f"http://{host}:{port}", questions, extra)
            return
        if model not in SHIPPED:
            built = command(model, config, host, port, extra)
            if dry_run:
                typer.echo(shlex.join(built))
                return
            check_version()
            upstream.check()
            _become(built)
        checkpoints.check(model)
        if dry_run:
            raise ValueError(f"--dry-run: {model} is written for vLLM first: python -m vtc_vllm.checkpoints FOLDER")
        check_version()
        upstream.check()
        with Relay() as relay, tempfile.TemporaryDirectory(prefix="vtc-serve-") as folder:
            checkpoints.write(Path(folder), model)
            named = [] if "--served-model-name" in extra else ["--served-model-name", model]
            status = relay.run(command(folder, config, host, port, [*named, *extra]))
    raise typer.Exit(status)


def command(model: str, config: CompressionConfig, host: str, port: int, extra: list[str]) -> list[str]:
    """What to run.

    Args:
        model: a folder or a name on the hub; its config is read.
        config: how to prune.
        host: where to listen.
        port: where to listen.
        extra: options for vLLM.

    Raises:
        ValueError: the model cannot be pruned in vLLM, or ``extra`` has overrides of its own.
        OSError: the model's config cannot be had.
    """
    from vtc_vllm import chat, launcher, pruning_architecture

    given = {each.split("=")[0].replace("_", "-") for each in extra}
    if "--hf-overrides" in given:
        raise ValueError("--hf-overrides is what vtc serve writes; for more overrides start vLLM by itself")
    if "--model" in given:
        raise ValueError("--model: the model is the first argument, vtc serve MODEL")
    overrides = {"architectures": [pruning_architecture(_architectures(model))], "vtc": config.to_dict()}
    fixed = ["--host", host, "--port", str(port), "--hf-overrides", json.dumps(overrides)]
    fixed += ["--middleware", "vtc_vllm.requests.Fields", "--middleware", "vtc_vllm.rehearsal.Rehearsal"]
    if not given & {"--chat-template", "--tokenizer", "--config"} and (template := chat.instead(model)):
        fixed += ["--chat-template", template]
    return [*launcher(model), *fixed, *extra]


def _compare(model: str, config: CompressionConfig, url: str, questions: int, extra: list[str]) -> None:
    from vtc_vllm import check

    dtype, key = (_option(extra, name) for name in ("--dtype", "--api-key"))
    result = check.compare(model, config, url, questions, dtype or "auto", key or os.environ.get("VLLM_API_KEY"))
    typer.echo(str(result))
    if result.different:
        raise typer.Exit(1)


def _option(extra: list[str], name: str) -> str | None:
    for at, each in enumerate(extra):
        if each == name:
            return next(iter(extra[at + 1 :]), None)
        if each.startswith(f"{name}="):
            return each.partition("=")[2]
    return None


def _architectures(model: str) -> list[str]:
    path = Path(model) / "config.json"
    if os.path.isdir(model) or model.startswith(("/", ".")):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no config.json in {shown(model)}")
        found = json.loads(path.read_text(encoding="utf-8"))
    else:
        from transformers import AutoConfig

        with at_hand(model):
            found = AutoConfig.from_pretrained(model).to_dict()
    return list(found.get("architectures") or [])


def _become(built: list[str]) -> NoReturn:
    """Let the server take this process's place: signals, exit status and memory are then its own.

    Raises:
        OSError: it cannot be run.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvp(built[0], built)
