"""Model families. Every module in this folder is imported, and registers itself."""

import importlib
import pkgutil

from vtc.models.base import (
    Adapter,
    ModelFamily,
    Parts,
    UnsupportedModelError,
    families,
    list_models,
    register_model,
    resolve,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Adapter",
    "ModelFamily",
    "Parts",
    "UnsupportedModelError",
    "families",
    "list_models",
    "register_model",
    "resolve",
]
