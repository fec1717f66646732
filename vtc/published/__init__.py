"""What popular models published: their configs and the sizes their processors keep to, one JSON file a family.

For estimates where there is no hub. An entry has the fields that decide shapes and token counts, under the names of
transformers' configs, and of ``preprocessor_config.json``; all others are transformers' own defaults. ``sources`` says
where each was read and ``read`` when. What all entries of a file share is its ``common``. Values are facts about
checkpoints; nothing else of these is here.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class Published:
    """One model.

    Attributes:
        name: on the hub.
        sources: addresses where the values were read.
        read: the day, as YYYY-MM-DD.
        values: of the config, ``model_type`` among them.
        settings: entries of ``preprocessor_config.json`` that decide how many tokens a picture makes.
    """

    name: str
    sources: tuple[str, ...]
    read: str
    values: Mapping[str, Any]
    settings: Mapping[str, Any]

    def config(self) -> Any:
        """A new config of transformers."""
        from transformers import CONFIG_MAPPING

        values = copy.deepcopy(dict(self.values))
        return CONFIG_MAPPING[values.pop("model_type")](**values)


@functools.cache
def models() -> dict[str, Published]:
    """All entries by name: families in alphabetical order, within a family as in its file."""
    found = {}
    for file in sorted(resources.files(__name__).iterdir(), key=lambda each: each.name):
        if file.name.endswith(".json"):
            said = json.loads(file.read_text(encoding="utf-8"))
            for name, entry in said["models"].items():
                whole = _merged(said["common"], entry)
                found[name] = Published(
                    name, tuple(whole["sources"]), whole["read"], whole["config"], whole.get("processor", {})
                )
    return found


def find(name: str) -> Published | None:
    """The entry of a name on the hub, in any case, with or without its owner; ``None``: there is none."""
    wanted = str(name).lower()
    for known, entry in models().items():
        if wanted in (known.lower(), known.lower().partition("/")[2]):
            return entry
    return None


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Both, deeply; where both have a value it is that of ``over``."""
    both = dict(under)
    for key, value in over.items():
        below = both.get(key)
        both[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return both
