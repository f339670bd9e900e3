"""What `info` shows of weights that are no whole model."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..config import QUANTIZATIONS, VARIANTS
from ..wording import told
from .terminal import in_flags, print_result, printable

if TYPE_CHECKING:
    from ..store.identification import Found

_LABEL = 11


def found_values(found: "Found") -> dict[str, Any]:
    """What is found, for JSON."""
    values = asdict(found.identity)
    conversion = found.conversion
    return {
        "file": found.name,
        **{"bytes" if name == "nbytes" else name: value for name, value in values.items()},
        "parts": {part.pop("name"): part | {"bytes": part.pop("nbytes")} for part in values["parts"]},
        "conversion": conversion
        and asdict(conversion) | {"places": {name: str(x) for name, x in conversion.places.items()}},
    }


def print_found(found: "Found") -> None:
    """Show what is found."""
    identity = found.identity
    _line(f"{found.name}: {identity.name}")
    _labelled("stored", f"{_gb(identity.nbytes)}; {_formats(found)}")
    if identity.variant is None and identity.variants:
        _labelled("for", " or ".join(identity.variants))
    if identity.parts:
        _print_parts(found)
    if identity.missing:
        _labelled("missing", _names(identity.missing))
    if identity.kind == "adapter":
        _labelled("more", f"flux2-mlx lora inspect {found.name}")
    if identity.advice:
        _labelled("note", identity.advice)
    if identity.quant:
        _labelled("convert", _converting(found))


def _print_parts(found: "Found") -> None:
    identity = found.identity
    quants = "".join(f"{quant:>9}" for quant in QUANTIZATIONS)
    _line(f"{'GB':15}{'tensors':>8}{'stored':>9}{quants}  names as of")
    for part in identity.parts:
        sizes = "".join(f"{nbytes / 1e9:9.3f}" for nbytes in part.converted.values())
        sizes = sizes or "".join(f"{'?':>9}" for _ in QUANTIZATIONS)
        naming = f"{part.naming}{f', after {part.prefix}' if part.prefix else ''}"
        _line(f"{told([part.name]):15}{part.tensors:8}{part.nbytes / 1e9:9.3f}{sizes}  {naming}")
    for part in identity.parts:
        for group, formats in part.precision.items():
            counts = ", ".join(f"{count} {kind}" for kind, count in formats.items())
            _line(f"{told([part.name]):15}{group}: {counts}")


def _converting(found: "Found") -> str:
    identity, conversion = found.identity, found.conversion
    if identity.lacks_main_part:
        options = " ".join(f"--{part.name.replace('_', '-')} FILE" for part in identity.parts)
        return f"give it beside a transformer: flux2-mlx convert MODEL TARGET {options}"
    if conversion is None:
        return f"fetch it first; its weights become {identity.quant}"
    if conversion.refusal:
        return f"can't yet: {in_flags(conversion.refusal)}"
    others: dict[str, list[str]] = {}
    for part in identity.missing:
        others.setdefault(str(conversion.places[part]), []).append(part)
    taken = [f"{_names(parts)} from {place}{_terms(place)}" for place, parts in others.items()]
    stored = f"stored as {conversion.quant}, the text encoder as {conversion.text_quant}"
    return "; ".join([*taken, stored])


def _terms(place: str) -> str:
    """The licence of an official repo and whether it is gated; nothing of another place."""
    row = next((row for row in VARIANTS.values() if row.repo == place), None)
    return f" ({row.licence} licence{', gated' if row.gated else ''})" if row else ""


def _formats(found: "Found") -> str:
    """The formats of all numbers but for the odd ones."""
    shares = {kind: f"{share:.0%}" for kind, share in found.identity.formats.items()}
    shown = {kind: share for kind, share in shares.items() if share != "0%"}
    return ", ".join(f"{share} {kind}" for kind, share in shown.items()) if len(shown) > 1 else "".join(shown)


def _labelled(label: str, text: str) -> None:
    _line(f"{label:{_LABEL}}{text}")


def _line(text: str) -> None:
    print_result(printable(text))


def _names(parts: Any) -> str:
    return ", ".join(told([part]) for part in parts)


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3f} GB"
