"""Why a comparison is to be doubted, and what may be said all the same."""

from __future__ import annotations

from lntune.certainty import SAMPLES, Estimate, Verdict
from lntune.compare.comparison import LARGE
from lntune.compare.sides import Held
from lntune.words import counted

_WAYS = (
    ("bench-given-output", "outputs were given"),
    ("bench-strided", "rows lay apart"),
    ("bench-training", "whole steps of training were measured"),
)
"""Roles whose times are of another way to call than the others'."""


def obstacle(a: Held, b: Held) -> str:
    """Why no difference between two sides would say anything, or the empty string."""
    if a.record == b.record:
        return ""
    if a.record.threads != b.record.threads:
        return f"{counted(a.record.threads, 'thread')} in A, {b.record.threads} in B"
    for role, what in _WAYS:
        sides = [held.record.role == role for held in (a, b)]
        if sides[0] != sides[1]:
            return f"{what} in {'AB'[sides.index(True)]} only"
    return ""


def noise(a: Held, b: Held) -> str:
    """Why only a large difference between two sides would say something, or the empty string."""
    if a.record == b.record and a.record.disturbance:
        return "both were disturbed by other work on the machine"
    for side, held in (("A", a), ("B", b)):
        if held.record.disturbance:
            return f"{side} was disturbed by other work on the machine"
        if len(held.timing.samples_us) < SAMPLES:
            return f"{side} has fewer than {SAMPLES} samples"
    return ""


def beyond_noise(estimate: Estimate, eager: float | None) -> Verdict:
    """The verdict where measurements are to be doubted: UNSURE, unless the ratio of the times is
    beyond LARGE either way and eager's own, in the same two runs, does not explain it: so much is
    no noise. A loss counts as one also where eager was not measured.
    """
    low, high = estimate.interval()
    beyond_eager = None if eager is None else estimate.ratio / eager
    if high < 1 / LARGE and (beyond_eager is None or beyond_eager < 1 / LARGE):
        return "SLOWER"
    won = low > LARGE and beyond_eager is not None and beyond_eager > LARGE
    return "FASTER" if won else "UNSURE"
