"""What a method may ask of a model beside the features: one signal, one small class, one file.

A signal is a value: which quantity, of which layer, under which name a method finds it in ``tokens.signals``. It knows
the module it reads and what it makes of that; attention maps are never asked for.
"""

from vtc.signals.base import DecoderSignal, PromptSignal, Signal, TowerSignal
from vtc.signals.cls import Cls, ClsLogits
from vtc.signals.columns import Columns
from vtc.signals.heads import SpecialHeads, TowerHeads
from vtc.signals.keys import LayerKeys, TowerKeys
from vtc.signals.pixels import Pixels
from vtc.signals.rating import Rating
from vtc.signals.received import Received
from vtc.signals.rows import Rows, TextRows
from vtc.signals.share import Share
from vtc.signals.states import LEFT, SIZE, ProjectorInput, TowerFeatures
from vtc.signals.text import LayerText, Text
from vtc.signals.transitions import Transitions
from vtc.signals.wide import ClsWide, KeysWide

TOWER_SIGNALS: tuple[type[TowerSignal], ...] = (
    Cls,
    ClsLogits,
    ClsWide,
    Received,
    TowerKeys,
    KeysWide,
    TowerHeads,
    SpecialHeads,
    TowerFeatures,
    ProjectorInput,
)
"""What a vision tower may give."""

__all__ = [
    "LEFT",
    "SIZE",
    "TOWER_SIGNALS",
    "Cls",
    "ClsLogits",
    "ClsWide",
    "Columns",
    "DecoderSignal",
    "KeysWide",
    "LayerKeys",
    "LayerText",
    "Pixels",
    "ProjectorInput",
    "PromptSignal",
    "Rating",
    "Received",
    "Rows",
    "Share",
    "Signal",
    "SpecialHeads",
    "Text",
    "TextRows",
    "TowerFeatures",
    "TowerHeads",
    "TowerKeys",
    "TowerSignal",
    "Transitions",
]
