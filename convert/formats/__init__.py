"""From the bytes of a format to plain weights: a file for each family of formats."""

from .packed import Packed, Unpacked

__all__ = ["Packed", "Unpacked"]
