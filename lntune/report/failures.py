"""Why candidates failed: the commonest reasons, each in the words of its first candidate."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import msgspec

from lntune.log.records import Status

SHOWN = 3
"""Reasons that are shown; the log has all."""
LENGTH = 160
_NUMBER = re.compile(r"0x[0-9a-f]+|\d+(?:\.\d+)?(?:e[+-]?\d+)?", re.IGNORECASE)


class Reason(msgspec.Struct, frozen=True):
    """Candidates that failed alike: their status, how many, and the message of the first."""

    status: Status
    count: int
    message: str


class Failures:
    """The failures of a run. Messages that differ only in their numbers are one reason."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[Status, str]] = Counter()
        self._first: dict[tuple[Status, str], str] = {}

    def add(self, status: Status, message: str) -> None:
        """A candidate failed."""
        key = status, _NUMBER.sub("#", message)
        self._counts[key] += 1
        self._first.setdefault(key, message)

    def include(self, others: Failures) -> None:
        """Add those of another run."""
        self._counts.update(others._counts)
        for key, message in others._first.items():
            self._first.setdefault(key, message)

    def reasons(self) -> list[Reason]:
        """The reasons, the commonest first."""
        return [
            Reason(key[0], count, self._first[key]) for key, count in self._counts.most_common()
        ]


def sentence(reason: Reason) -> str:
    """A reason in a line: "12 wrong: y: 3.1 times the tolerance"."""
    text = " ".join(reason.message.split())
    text = text if len(text) <= LENGTH else f"{text[: LENGTH - 4]} ..."
    return f"{reason.count} {reason.status}{f': {text}' if text else ''}"


def lines(reasons: list[Reason]) -> list[str]:
    """The commonest reasons, a line each, and how many candidates failed for others."""
    sentences = [sentence(reason) for reason in reasons[:SHOWN]]
    others = sum(reason.count for reason in reasons[SHOWN:])
    return [*sentences, f"{others} for other reasons, see the log"] if others else sentences


def by_kind(counts: Mapping[Status, int]) -> str:
    """How many trials ended how: "9 ok, 3 compile"."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
