"""A model's config and what its processor's files say, read without weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vtc.models import UnsupportedModelError, list_models
from vtc.models.base import REFUSED
from vtc.values import shown


def config_of(model: Any) -> Any:
    """The config of a vision-language model.

    Args:
        model: a config object, a folder, a config.json, or a name on the hub.

    Raises:
        TypeError: anything else.
        ValueError: there is no such file, or the config is of no model with visual tokens.
        UnsupportedModelError: the family cannot be pruned; with the reason.
        OSError: there is no such model on the hub.
    """
    import transformers as tf

    if isinstance(model, tf.PreTrainedConfig):
        config = model
    elif isinstance(model, (str, os.PathLike)):
        path = Path(model)
        if os.path.isdir(path) and not os.path.isfile(path / "config.json"):
            raise ValueError(f"the folder {shown(str(path))} has no config.json")
        local = path.suffix == ".json" or len(path.parts) > 2 or str(model).startswith((".", "/", "~"))
        if os.path.exists(path) and not os.path.isdir(path) and not os.path.isfile(path):
            raise ValueError(f"{shown(str(path))} is no regular file, and is not opened")
        if local and not os.path.exists(path):
            raise ValueError(
                f"there is no {shown(str(path))}; a model is a folder, a config.json, or OWNER/NAME on the hub"
            )
        config = tf.AutoConfig.from_pretrained(str(model))
    else:
        raise TypeError(f"{type(model).__name__} is neither a config, a model, a folder nor a name on the hub")
    name = config.model_type
    if name in REFUSED and name not in list_models():
        raise UnsupportedModelError(f"a {shown(name)} model cannot be pruned: {REFUSED[name]}")
    if builds(config):
        return config
    if (package := type(config).__module__.split(".")[0]) != "transformers":
        raise UnsupportedModelError(
            f"a config of {package!r} ({type(config).__name__}, model_type {shown(name)}) says nothing that is known "
            "ahead of what its model makes of a picture. vtc.patch judges the loaded model"
        )
    tower = any(getattr(config, n, None) is not None for n in ("vision_config", "vision_tower", "visual"))
    reason = "is of no image-text-to-text model that transformers knows" if tower else "has no vision tower"
    raise ValueError(f"this config, of model_type {shown(name)}, {reason}: there are no visual tokens to prune")


def builds(config: Any) -> bool:
    """Whether transformers has a model for images and text of this very config: its mapping goes by names of classes,
    which other packages use, too.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as KNOWN

    kind = type(config)
    return kind in KNOWN and kind.__module__.split(".")[0] == KNOWN[kind].__module__.split(".")[0]


def settings_beside(name: str | os.PathLike[str], modality: str = "image") -> dict[str, Any]:
    """What the processor files of a checkpoint say, a local folder or a name on the hub; empty without any.

    Raises:
        ValueError: a file is no JSON object.
    """
    from transformers.utils.hub import cached_file

    if os.path.isfile(name):  # a config.json
        name = Path(name).resolve().parent
    image = ("preprocessor_config.json", None)
    nested = ("processor_config.json", f"{modality}_processor")
    # checkpoints older than video processors have one file for both
    files = (image, nested) if modality == "image" else (("video_preprocessor_config.json", None), nested, image)
    for file, key in files:
        path = cached_file(
            str(name),
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        if path is None:
            continue
        try:
            said = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        said = said.get(key) if key and isinstance(said, dict) else said
        if isinstance(said, dict):
            return said
    return {}
