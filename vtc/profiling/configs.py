"""A model's config and what its processor's files say, read without weights."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Any

from vtc import published
from vtc.models import UnsupportedModelError, list_models
from vtc.models.refused import REFUSED
from vtc.names import at_hand, folder_of
from vtc.published import Published
from vtc.values import shown


def config_of(model: Any) -> Any:
    """The config of a vision-language model.

    Args:
        model: a config object, a folder, a config.json, the name of a model that comes with vtc or that is known
            without a hub (:mod:`vtc.published`), or another name on the hub.

    Raises:
        TypeError: anything else.
        ValueError: a folder without a config, or a config of no model with visual tokens.
        UnsupportedModelError: the family cannot be pruned; with the reason.
        OSError: there is no such model, or the hub cannot be asked.
    """
    import transformers as tf

    if isinstance(model, tf.PreTrainedConfig):
        config = model
    elif isinstance(model, (str, os.PathLike)):
        config = known.config() if (known := published_as(model)) else _read(os.fspath(model))
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


def _read(model: str) -> Any:
    import transformers as tf

    name = folder_of(model)
    path = Path(name)
    if os.path.isdir(path) and not os.path.isfile(path / "config.json"):
        raise ValueError(f"the folder {shown(str(path))} has no config.json")
    if os.path.exists(path) and not os.path.isdir(path) and not os.path.isfile(path):
        raise ValueError(f"{shown(str(path))} is no regular file, and is not opened")
    with at_hand(name, also=_also(name)):
        return tf.AutoConfig.from_pretrained(name)


def published_as(model: str | os.PathLike[str]) -> Published | None:
    """What is known of a name without a hub; a folder or file of that name goes before."""
    return None if os.path.exists(model) else published.find(os.fspath(model))


def _also(name: str) -> str:
    """Names that are known without a hub, the nearest ones first."""
    known = list(published.models())
    short = {each.partition("/")[2].lower(): each for each in known}
    near = difflib.get_close_matches(name.rpartition("/")[2].lower(), short, n=3, cutoff=0.5)
    shown_first = [short[each] for each in near] or known[:: len(known) // 3]
    return f"a model that is known without a hub, such as {', '.join(shown_first)} (vtc estimate --table has all); "


def builds(config: Any) -> bool:
    """Whether transformers has a model for images and text of this very config: its mapping goes by names of classes,
    which other packages use, too.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as KNOWN

    kind = type(config)
    return kind in KNOWN and kind.__module__.split(".")[0] == KNOWN[kind].__module__.split(".")[0]


def settings_beside(name: str | os.PathLike[str], modality: str = "image") -> dict[str, Any]:
    """What the processor files of a checkpoint say, under the names that :func:`config_of` takes; empty without any.

    Of a model that is known without a hub, images only: what its files say of videos is not known.

    Raises:
        ValueError: a file is no JSON object.
        OSError: the hub cannot be asked.
    """
    if (known := published_as(name)) is not None:
        return dict(known.settings) if modality == "image" else {}
    name = folder_of(os.fspath(name))
    if os.path.isfile(name):  # a config.json
        name = Path(name).resolve().parent
    with at_hand(str(name)):
        return _files_beside(str(name), modality)


def _files_beside(name: str, modality: str) -> dict[str, Any]:
    from transformers.utils.hub import cached_file

    image = ("preprocessor_config.json", None)
    nested = ("processor_config.json", f"{modality}_processor")
    # checkpoints older than video processors have one file for both
    files = (image, nested) if modality == "image" else (("video_preprocessor_config.json", None), nested, image)
    for file, key in files:
        path = cached_file(
            name,
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
