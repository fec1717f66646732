"""Pictures of what was kept. Importing this needs nothing; drawing needs Pillow, the extra ``viz``.

:func:`overlay` draws kept indices over a picture; :func:`show` and :func:`animate` draw a whole prompt from a patched
model's handle and its inputs, with what the model really saw; :func:`recording_picks` lets them colour the pick order.
"""

from vtc.viz.picks import Picks, recording_picks
from vtc.viz.picture import overlay
from vtc.viz.prompt import animate, save_animation, show

__all__ = ["Picks", "animate", "overlay", "recording_picks", "save_animation", "show"]
