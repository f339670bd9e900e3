"""What the tests of a check-up share."""

import pytest

from flux2_mlx.doctor import Finding, numerics, peaks, speed


def verdict(finding: Finding) -> str:
    """What a finding says, after a look that it gives advice just where that is needed."""
    assert bool(finding.advice) == (finding.verdict in ("warn", "fail"))
    return finding.verdict


def as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the checks that need a GPU take this CPU for one."""
    for module in (numerics, peaks, speed):
        monkeypatch.setattr(module, "on_gpu", lambda: True)
