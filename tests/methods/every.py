"""Every registered method as the zoo's small models can take it: they have four layers and a dozen tokens an image.

`SAMPLES` is what the matrices run; :func:`missing` says which registered method has none.
"""

from __future__ import annotations

from typing import Any

import vtc
from vtc.methods import list_methods

SCHEDULE: dict[str, Any] = {"layers": (1, 2), "ratios": (0.6, 0.3)}  # the zoo's models are too shallow for the default

SAMPLES: dict[str, vtc.Method] = {
    "divprune": vtc.DivPrune(keep=0.3),
    "todre": vtc.ToDRE(keep=0.5),
    "todre_random": vtc.ToDRE(keep=0.5, pivot="random"),
    "todre_both": vtc.ToDRE(keep=0.5, pivot="random", stage2=True, layer=2, tau=0.45),
    "idpruner": vtc.IDPruner(keep=0.4),
    "random": vtc.Random(keep=0.4, seed=3),
    "grid": vtc.Grid(keep=0.4),
    "fastervlm": vtc.FasterVLM(keep=0.4),
    "scope": vtc.SCOPE(keep=0.4),
    "visionzip": vtc.VisionZip(keep=5, contextual=2),
    "globalcom2": vtc.GlobalCom2(keep=0.4),
    "globalcom2_divprune": vtc.GlobalCom2(keep=0.4, selector=vtc.DivPrune()),
    "allocate": vtc.Allocate(keep=0.4),
    "transprune": vtc.TransPrune(**SCHEDULE),
    "fastv": vtc.FastV(keep=0.4, layer=1),
    "divprune_then_transprune": vtc.Chain(vtc.DivPrune(keep=0.5), vtc.TransPrune(**SCHEDULE)),
    "idpruner_then_todre2": vtc.Chain(
        vtc.IDPruner(keep=0.5), vtc.ToDRE(keep=1.0, pivot="random", stage2=True, layer=1, tau=0.4)
    ),
}


def missing() -> set[str]:
    """Registered methods that no sample is of."""
    return set(list_methods()) - {method.name for method in SAMPLES.values()}


def refusal(model: Any, method: vtc.Method) -> str | None:
    """Why a model does not take a method; ``None``: it does."""
    try:
        vtc.patch(model, method).unpatch()
    except ValueError as reason:
        return str(reason)
    return None
