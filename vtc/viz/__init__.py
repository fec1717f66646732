"""Pictures of what was kept. Importing this needs nothing; drawing needs Pillow, the extra ``viz``."""

from vtc.viz.picture import overlay

__all__ = ["overlay"]
