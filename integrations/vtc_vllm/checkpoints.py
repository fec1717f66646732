"""The shipped model as vLLM wants it: `python -m vtc_vllm.checkpoints FOLDER [--model tinyvlm-next]`.

transformers 5 writes the keys of a CLIP tower without ``vision_model``; vLLM 0.32 asks for the hub's older layout,
which transformers reads too. A chat template comes along, for the OpenAI endpoint.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

from vtc.names import SHIPPED, folder_of
from vtc.values import shown
from vtc_vllm import chat

_TOWER = "vision_tower."
_NOT_SERVED = {
    "tinyvlm-mqt": "vLLM's LLaVA knows no Matryoshka Query Transformer",
    "photovlm": "vLLM's LLaVA knows no DINOv2 tower",
}
"""Shipped models that vLLM cannot run, and why."""


def hub_name(key: str) -> str:
    """A weight's name in the hub's layout."""
    head, found, rest = key.partition(_TOWER)
    if not found or rest.startswith("vision_model."):
        return key
    return f"{head}{_TOWER}vision_model.{rest}"


def to_hub_layout(source: Path, target: Path) -> None:
    """Copy a checkpoint with one .safetensors file, with the weights' names in the hub's layout.

    Raises:
        FileNotFoundError: no such folder, or no model.safetensors in it.
    """
    from safetensors.torch import load_file, save_file

    if not (source / "model.safetensors").is_file():
        raise FileNotFoundError(f"no model.safetensors in {source}")
    shutil.copytree(source, target, dirs_exist_ok=True)
    weights = {hub_name(key): weight for key, weight in load_file(source / "model.safetensors").items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def check(model: str) -> None:
    """Refuse a name that :func:`write` cannot write.

    Raises:
        ValueError: it is of no shipped model, or vLLM cannot run it.
    """
    if model not in SHIPPED:
        raise ValueError(f"model={shown(model)} is none of the shipped ones: {', '.join(SHIPPED)}")
    if model in _NOT_SERVED:
        served = ", ".join(name for name in SHIPPED if name not in _NOT_SERVED)
        raise ValueError(f"{model} is not served: {_NOT_SERVED[model]}. What would work: {served}")


def write(folder: Path, model: str = "tinyvlm") -> None:
    """Write the shipped model of that name.

    Raises:
        ValueError: there is none, or vLLM cannot run it.
    """
    check(model)
    to_hub_layout(Path(folder_of(model)), folder)
    write_chat_template(folder)


def write_chat_template(folder: Path) -> None:
    """Write that of the shipped models beside a model with their words."""
    from transformers import AutoTokenizer

    template = chat.begun(chat.SHIPPED, AutoTokenizer.from_pretrained(folder))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


if __name__ == "__main__":
    import typer

    def main(folder: Path, model: Annotated[str, typer.Option(help="tinyvlm or tinyvlm-next.")] = "tinyvlm") -> None:
        """Write a shipped model in the layout that vLLM reads."""
        write(folder, model)
        typer.echo(str(folder))

    typer.run(main)
