"""One published method a file. Every module in this folder is imported, and registers itself."""

import importlib
import pkgutil

from vtc.methods.base import Method, ModelFacts, Reduction, Scorer, Stage
from vtc.methods.registry import list_methods, make_method, method_class, register_method

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Method",
    "ModelFacts",
    "Reduction",
    "Scorer",
    "Stage",
    "list_methods",
    "make_method",
    "method_class",
    "register_method",
]
