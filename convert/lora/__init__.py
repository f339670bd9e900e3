"""Adapters as trainers save them: which of our layers they change, and how."""

from .adapter_file import AdapterFile, read_adapter

__all__ = ["AdapterFile", "read_adapter"]
