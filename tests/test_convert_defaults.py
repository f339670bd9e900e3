"""In how many bits parts are stored where nobody says it: by what each is stored in, and told."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from flux2_mlx.convert import Source

from flux2_mlx.config import VARIANTS

FEW = "t holds the transformer in few bits, which becomes"
TEXT = "e holds the text encoder in few bits, which becomes"


def source(transformer: str, encoder: str) -> Source:
    """One whose parts keep their precision in these quantizations."""
    parts = {
        "transformer": SimpleNamespace(usual_quant=transformer, place=Path("t")),
        "text_encoder": SimpleNamespace(usual_quant=encoder, place=Path("e")),
    }
    return Source(Path("m"), VARIANTS["klein-4b"], {}, parts, Path("x"), Path("y"))


@pytest.mark.parametrize(
    ("stored", "expected", "notices"),
    [
        (("bf16", "bf16"), ("bf16", "qint8"), []),
        (("bf16", "qint8"), ("bf16", "qint8"), []),
        (("bf16", "qint4"), ("bf16", "qint4"), [f"{TEXT} qint4"]),
        (("qint8", "bf16"), ("qint8", "qint8"), [f"{FEW} qint8"]),
        (("qint8", "qint8"), ("qint8", "qint8"), [f"{FEW} qint8"]),
        (("qint8", "qint4"), ("qint8", "qint4"), [f"{FEW} qint8", f"{TEXT} qint4"]),
        (("qint4", "bf16"), ("qint4", "qint4"), [f"{FEW} qint4", "the text encoder becomes qint4 as well"]),
        (("qint4", "qint8"), ("qint4", "qint8"), [f"{FEW} qint4", f"{TEXT} qint8"]),
        (("qint4", "qint4"), ("qint4", "qint4"), [f"{FEW} qint4", f"{TEXT} qint4"]),
    ],
)
def test_each_part_keeps_its_own_precision(stored, expected, notices):
    assert source(*stored).quants(None, None) == expected
    assert source(*stored).notices(None, None) == notices


@pytest.mark.parametrize(
    ("stored", "asked", "expected", "notices"),
    [
        (("qint4", "qint8"), ("qint4", None), ("qint4", "qint4"), []),
        (("qint4", "bf16"), ("bf16", None), ("bf16", "qint8"), []),
        (("bf16", "qint4"), ("qint8", None), ("qint8", "qint4"), [f"{TEXT} qint4"]),
        (("qint4", "qint4"), (None, "bf16"), ("qint4", "bf16"), [f"{FEW} qint4"]),
    ],
)
def test_what_is_asked_for_comes_first(stored, asked, expected, notices):
    assert source(*stored).quants(*asked) == expected
    assert source(*stored).notices(*asked) == notices
