"""Errors that users catch by name."""


class UnsupportedModelError(ValueError):
    """The model cannot be pruned; the message says why and what would work."""
