"""Exceptions of the library. Each message is one line: what was wrong, its value, what to do."""

# Escapes for whatever `str.splitlines` takes for the end of a line.
_ENDS = {ord(end): ascii(end)[1:-1] for end in "\n\x0b\x0c\r\x1c\x1d\x1e\x85\u2028\u2029"}


def one_line(text: str) -> str:
    """`text` with escapes such as \\n in place of what ends a line: names and paths that it quotes may hold any."""
    return text.translate(_ENDS)


class Flux2Error(Exception):
    """Base of every error that this library raises on purpose."""

    def __str__(self) -> str:
        return one_line(super().__str__())

    def __reduce__(self) -> "tuple[object, ...]":
        """Another process is given the message; what some errors hold besides, such as open files, stays here."""
        return _again, (type(self), self.args)


def _again(kind: "type[Flux2Error]", args: "tuple[object, ...]") -> Flux2Error:
    """An error as it is read from a pickle, without what else its class would be made from."""
    return kind.__new__(kind, *args)


class InputError(Flux2Error):
    """A setting, prompt, image or path given by the caller can't be used."""


class SettingError(InputError):
    """A setting, whose name the message begins with, has a value that it can't have."""


class RangeError(Flux2Error):
    """A computation left the range of its numbers."""


class DeviceError(Flux2Error):
    """The GPU failed or was stopped, or has no memory left; the pipeline can be used again."""


class RequirementError(Flux2Error):
    """Python, the system or MLX is not one that this program can run with."""


class CheckpointError(Flux2Error):
    """Model files are missing, damaged, or of another model."""


class DownloadError(Flux2Error):
    """Model files could not be fetched."""
