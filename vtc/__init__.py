"""vtc: visual-token compression for vision-language models.

>>> import vtc
>>> vtc.patch(model, "divprune", keep=0.25)  # doctest: +SKIP
>>> model.generate(**inputs)                 # doctest: +SKIP
"""

from vtc import modules, ops
from vtc.checking.verify import verify
from vtc.compress import compress_inputs, generate
from vtc.config import CompressionConfig
from vtc.handle import Patch
from vtc.methods import Method, Reduction, Scorer, Stage, list_methods, register_method
from vtc.methods.adaptive import Adaptive
from vtc.methods.allocate import Allocate
from vtc.methods.cdpruner import CDPruner
from vtc.methods.chain import Chain
from vtc.methods.cliptext import ClipText
from vtc.methods.dart import DART
from vtc.methods.divprune import DivPrune
from vtc.methods.dycoke import DyCoke
from vtc.methods.evit import EViT
from vtc.methods.evs import EVS
from vtc.methods.fastervlm import FasterVLM
from vtc.methods.fastv import FastV
from vtc.methods.fastvid import FastVID
from vtc.methods.globalcom2 import GlobalCom2
from vtc.methods.grid import Grid
from vtc.methods.hiprune import HiPrune
from vtc.methods.holitom import HoliTom
from vtc.methods.holov import HoloV
from vtc.methods.idpruner import IDPruner
from vtc.methods.importance import ClsAttention, FeatureNorm, ReceivedAttention, SelectorWeights
from vtc.methods.intower import InTower
from vtc.methods.merge import Merge
from vtc.methods.mqt import MQT
from vtc.methods.pixelprune import PixelPrune
from vtc.methods.prumerge import PruMerge
from vtc.methods.prumerge_plus import PruMergePlus
from vtc.methods.pyramiddrop import PyramidDrop
from vtc.methods.random import Random
from vtc.methods.scope import SCOPE
from vtc.methods.sparsevlm import SparseVLM
from vtc.methods.todre import ToDRE
from vtc.methods.tome import ToMe
from vtc.methods.transprune import TransPrune
from vtc.methods.vcast import VCast
from vtc.methods.vidcom2 import VidCom2
from vtc.methods.visionzip import VisionZip
from vtc.methods.vispruner import VisPruner
from vtc.methods.vscan import VScan
from vtc.methods.zero_tprune import ZeroTPrune
from vtc.models import Adapter, UnsupportedModelError, list_models, register_model
from vtc.patching import patch, unpatch
from vtc.profiling.estimate import estimate
from vtc.selecting import select

__version__ = "0.2.0"

__all__ = [
    "DART",
    "EVS",
    "MQT",
    "SCOPE",
    "Adapter",
    "Adaptive",
    "Allocate",
    "CDPruner",
    "Chain",
    "ClipText",
    "ClsAttention",
    "CompressionConfig",
    "DivPrune",
    "DyCoke",
    "EViT",
    "FastV",
    "FastVID",
    "FasterVLM",
    "FeatureNorm",
    "GlobalCom2",
    "Grid",
    "HiPrune",
    "HoliTom",
    "HoloV",
    "IDPruner",
    "InTower",
    "Merge",
    "Method",
    "Patch",
    "PixelPrune",
    "PruMerge",
    "PruMergePlus",
    "PyramidDrop",
    "Random",
    "ReceivedAttention",
    "Reduction",
    "Scorer",
    "SelectorWeights",
    "SparseVLM",
    "Stage",
    "ToDRE",
    "ToMe",
    "TransPrune",
    "UnsupportedModelError",
    "VCast",
    "VScan",
    "VidCom2",
    "VisPruner",
    "VisionZip",
    "ZeroTPrune",
    "compress_inputs",
    "estimate",
    "generate",
    "list_methods",
    "list_models",
    "modules",
    "ops",
    "patch",
    "register_method",
    "register_model",
    "select",
    "unpatch",
    "verify",
]
