"""The Hugging Face Hub: which files of a repo are needed, their download, and the cache that they go to."""

from .cache import (
    PARTIAL,
    Download,
    Folders,
    is_weight,
    noted_listing,
    remove_empty,
    remove_files,
    snapshot_files,
    storage_of,
)
from .errors import UnindexedError
from .repo import Choose, cache_folder, fetch, header, is_repo_id
from .selection import Selection, names_of, select

__all__ = [
    "PARTIAL",
    "Choose",
    "Download",
    "Folders",
    "Selection",
    "UnindexedError",
    "cache_folder",
    "fetch",
    "header",
    "is_repo_id",
    "is_weight",
    "names_of",
    "noted_listing",
    "remove_empty",
    "remove_files",
    "select",
    "snapshot_files",
    "storage_of",
]
