"""Every registered method as the zoo's small models can take it: they have four layers and a dozen tokens an image.

`SAMPLES` is what the matrices run; :func:`missing` says which registered method has none.
"""

from __future__ import annotations

from typing import Any

import vtc
from vtc.methods.registry import list_methods, method_class

SCHEDULE: dict[str, Any] = {"layers": (1, 2), "ratios": (0.6, 0.3)}  # the zoo's models are too shallow for the default

SAMPLES: dict[str, vtc.Method] = {
    # before the language model
    "divprune": vtc.DivPrune(keep=0.3),
    "divprune_centred": vtc.DivPrune(keep=0.3, centered=True),
    "todre": vtc.ToDRE(keep=0.5),
    "todre_random": vtc.ToDRE(keep=0.5, pivot="random"),
    "idpruner": vtc.IDPruner(keep=0.4),
    "random": vtc.Random(keep=0.4, seed=3),
    "grid": vtc.Grid(keep=0.4),
    "cdpruner": vtc.CDPruner(keep=0.4),
    "fastervlm": vtc.FasterVLM(keep=0.4),
    "scope": vtc.SCOPE(keep=0.4),
    "vispruner": vtc.VisPruner(keep=0.4),
    "hiprune": vtc.HiPrune(keep=0.4),
    "holov": vtc.HoloV(keep=0.4),
    "vscan": vtc.VScan(keep=0.4, window=2),
    "visionzip": vtc.VisionZip(keep=5, contextual=2),
    "mqt": vtc.MQT(keep=0.4),
    "prumerge": vtc.PruMerge(keep=0.4),
    "prumerge_adaptive": vtc.PruMerge(adaptive=True),
    "prumerge_plus": vtc.PruMergePlus(keep=0.4),
    "globalcom2": vtc.GlobalCom2(keep=0.4),
    "globalcom2_divprune": vtc.GlobalCom2(keep=0.4, selector=vtc.DivPrune()),
    "allocate": vtc.Allocate(keep=0.4),
    "merge": vtc.Merge(vtc.DivPrune(keep=0.4)),
    "adaptive": vtc.Adaptive(vtc.DivPrune(keep=0.6), radius=0.7),
    # inside the vision tower
    "intower": vtc.InTower(keep=0.5, after=1),
    "intower_then": vtc.InTower(rule="diverse", keep=0.6, after=1, then=vtc.DivPrune(keep=0.3)),
    "tome": vtc.ToMe(keep=0.4),
    "tome_plain": vtc.ToMe(keep=0.6, blocks=(1,), proportional=False),
    "evit": vtc.EViT(keep=0.5, blocks=(1,)),
    "pixelprune": vtc.PixelPrune(tau=3.7),
    "zero-tprune": vtc.ZeroTPrune(keep=0.4, after=1),
    "zero-tprune_then_divprune": vtc.Chain(vtc.ZeroTPrune(keep=0.6, after=1), vtc.DivPrune(keep=0.5)),
    "tome_then_merge": vtc.Chain(vtc.ToMe(keep=0.6), vtc.Merge(vtc.DivPrune(keep=0.5))),
    "evit_then_fastervlm": vtc.Chain(vtc.EViT(keep=0.6, blocks=(1,)), vtc.FasterVLM(keep=0.5)),
    "pixelprune_then_divprune": vtc.Chain(vtc.PixelPrune(tau=3.7), vtc.DivPrune(keep=0.5)),
    # inside the language model
    "todre_both": vtc.ToDRE(keep=0.5, pivot="random", stage2=True, layer=2, tau=0.45),
    "transprune": vtc.TransPrune(**SCHEDULE),
    "pyramiddrop": vtc.PyramidDrop(**SCHEDULE),
    "sparsevlm": vtc.SparseVLM(**SCHEDULE),
    "fastv": vtc.FastV(keep=0.4, layer=1),
    "dart": vtc.DART(keep=0.7, layer=1),
    "divprune_then_transprune": vtc.Chain(vtc.DivPrune(keep=0.5), vtc.TransPrune(**SCHEDULE)),
    "idpruner_then_todre2": vtc.Chain(
        vtc.IDPruner(keep=0.5), vtc.ToDRE(keep=1.0, pivot="random", stage2=True, layer=1, tau=0.4)
    ),
    # of videos
    "evs": vtc.EVS(keep=0.6),
    "vidcom2": vtc.VidCom2(keep=0.6),
    "vcast": vtc.VCast(keep=0.6),
    "dycoke": vtc.DyCoke(keep=0.7),
    "fastvid": vtc.FastVID(keep=0.6),
    "holitom": vtc.HoliTom(keep=0.6),
}


def missing() -> set[str]:
    """The library's own methods, not those that other tests registered, that no sample is of."""
    own = {name for name in list_methods() if method_class(name).__module__.startswith("vtc.")}
    return own - {method.name for method in SAMPLES.values()}


def refusal(model: Any, method: vtc.Method) -> str | None:
    """Why a model does not take a method; ``None``: it does."""
    try:
        vtc.patch(model, method).unpatch()
    except ValueError as reason:
        return str(reason)
    return None
