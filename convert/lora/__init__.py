"""Adapters as trainers save them: which of our layers they change, and how."""

from .adapter_file import AdapterFile, read_adapter
from .saving import save_adapter, saving_notes

__all__ = ["AdapterFile", "read_adapter", "save_adapter", "saving_notes"]
