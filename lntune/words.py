"""Counts with their nouns, for sentences: "1 case", "2 cases"."""

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
