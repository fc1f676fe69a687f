"""Figures in sentences: counts with their nouns ("1 case", "2 cases"), and durations."""

from __future__ import annotations


def counted(count: int, noun: str, many: str = "") -> str:
    """A number with its noun: "1 kernel", "2 kernels", "no kernels" never; `many` is a plural that
    is not the noun and an s.
    """
    return f"{count} {noun if count == 1 else many or noun + 's'}"


def trials(made: int, earlier: int) -> str:
    """How many trials a run has made, and how many earlier runs have spared it: "3 trials", "3
    trials and 12 of earlier runs".
    """
    return counted(made, "trial") + (f" and {earlier} of earlier runs" if earlier else "")


def length(seconds: float) -> str:
    """A duration as a person says it: "40 s", "3 min", "1.5 h"."""
    minute, hour = 60, 3600
    if seconds < 2 * minute:
        return f"{seconds:.0f} s"
    return f"{seconds / minute:.0f} min" if seconds < 2 * hour else f"{seconds / hour:.1f} h"
