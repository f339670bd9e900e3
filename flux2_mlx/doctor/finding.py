"""What a check has found."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["pass", "warn", "fail", "skip"]


class UnmeasurableError(Exception):
    """Why a check can't be made here, and what to do so that it can."""


@dataclass(frozen=True)
class Finding:
    """One line of a check-up: what was measured, against which bound, and what to do if that is not kept.

    `fail` is a wrong result, `warn` one that is right but slow or near a limit, `skip` what can't be measured here.
    """

    name: str
    verdict: Verdict
    figure: str
    bound: str = ""
    advice: str = ""


def judged(name: str, figure: str, bound: str, good: bool, advice: str, otherwise: Verdict = "fail") -> Finding:
    """A finding that passes if it is `good`; advice is given only where it does not."""
    return Finding(name, "pass" if good else otherwise, figure, bound, "" if good else advice)


def skipped(name: str, reason: str) -> Finding:
    return Finding(name, "skip", reason)
