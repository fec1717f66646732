"""vtc: visual-token compression for vision-language models.

>>> import vtc
>>> vtc.patch(model, "divprune", keep=0.25)  # doctest: +SKIP
>>> model.generate(**inputs)                 # doctest: +SKIP
"""

from vtc import ops
from vtc.checking.verify import verify
from vtc.compress import compress_inputs, generate
from vtc.config import CompressionConfig
from vtc.handle import Patch
from vtc.methods import Method, Reduction, Scorer, Stage, list_methods, register_method
from vtc.methods.allocate import Allocate
from vtc.methods.chain import Chain
from vtc.methods.divprune import DivPrune
from vtc.methods.fastervlm import FasterVLM
from vtc.methods.fastv import FastV
from vtc.methods.globalcom2 import GlobalCom2
from vtc.methods.grid import Grid
from vtc.methods.idpruner import IDPruner
from vtc.methods.importance import ClsAttention, FeatureNorm, SelectorWeights
from vtc.methods.random import Random
from vtc.methods.scope import SCOPE
from vtc.methods.todre import ToDRE
from vtc.methods.transprune import TransPrune
from vtc.methods.visionzip import VisionZip
from vtc.models import Adapter, UnsupportedModelError, list_models, register_model
from vtc.patching import patch, unpatch
from vtc.profiling.estimate import estimate
from vtc.selecting import select

__version__ = "0.1.0"

__all__ = [
    "SCOPE",
    "Adapter",
    "Allocate",
    "Chain",
    "ClsAttention",
    "CompressionConfig",
    "DivPrune",
    "FastV",
    "FasterVLM",
    "FeatureNorm",
    "GlobalCom2",
    "Grid",
    "IDPruner",
    "Method",
    "Patch",
    "Random",
    "Reduction",
    "Scorer",
    "SelectorWeights",
    "Stage",
    "ToDRE",
    "TransPrune",
    "UnsupportedModelError",
    "VisionZip",
    "compress_inputs",
    "estimate",
    "generate",
    "list_methods",
    "list_models",
    "ops",
    "patch",
    "register_method",
    "register_model",
    "select",
    "unpatch",
    "verify",
]
