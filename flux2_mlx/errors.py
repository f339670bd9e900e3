"""Exceptions of the library. Each message is one line: what was wrong, its value, what to do."""


class Flux2Error(Exception):
    """Base of every error that this library raises on purpose."""


class InputError(Flux2Error):
    """A setting, prompt, image or path given by the caller can't be used."""


class RangeError(Flux2Error):
    """A computation left the range of its numbers."""


class DeviceError(Flux2Error):
    """The GPU failed or was stopped, or has no memory left; the pipeline can be used again."""


class CheckpointError(Flux2Error):
    """Model files are missing, damaged, or of another model."""


class DownloadError(Flux2Error):
    """Model files could not be fetched."""
