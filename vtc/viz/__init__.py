"""Pictures of what was kept. Importing this needs nothing; drawing needs Pillow, the extra ``viz``.

:func:`overlay` draws kept indices over a picture; :func:`show` and :func:`animate` draw a whole prompt from a patched
model's handle and its inputs, with what the model really saw, and in the order of the picks if asked.
"""

from vtc.viz.animation import save_animation
from vtc.viz.picture import overlay
from vtc.viz.prompt import animate, show

__all__ = ["animate", "overlay", "save_animation", "show"]
