"""What is said before a tuning run begins: how many cases there are, how many of them fit the time,
and which come first.
"""

from __future__ import annotations

from collections.abc import Sequence

from lntune import backends, ops
from lntune.case import Case
from lntune.tune.settings import Settings
from lntune.tune.times import BYTE_SECONDS, SEARCHED
from lntune.words import counted, length

START = 5.0
"""Seconds until the processes that measure on a CPU are there."""
LEAST = 1.3
"""Seconds of a small case at least: its candidates listed, a trial of the default knobs and a short
final. Like BYTE_SECONDS measured on two cores of an EPYC (family 25 model 1).
"""
NAMED = 3
"""Cases that a sentence names."""


def least(case: Case) -> float:
    """About how many seconds a case of a CPU takes at least."""
    return LEAST + BYTE_SECONDS * ops.get(case.op).bytes(case)


def searched(case: Case) -> float:
    """About how many seconds a case of a CPU takes with dozens of trials."""
    return max(SEARCHED, 2 * least(case))


def fitting(cases: Sequence[Case], seconds: float) -> int:
    """About how many of the cases, the first ones, a run on a CPU has time for; one is always
    begun, and the last may have fewer trials.
    """
    left, count = seconds - START, 0
    for case in cases:
        if left < least(case):
            break
        left -= searched(case)
        count += 1
    return max(1, count)


def sentences(cases: Sequence[Case], settings: Settings) -> list[str]:
    """How many cases there are and which come first, how many of them fit the time, and what to do
    where that is little. What earlier runs have tried takes no time, which is not counted here.
    """
    first = ", ".join(map(str, cases[:NAMED]))
    more = f", then {len(cases) - NAMED} more" if len(cases) > NAMED else ""
    count, seconds = counted(len(cases), "case"), settings.seconds
    order = f": {first}{more}"
    if seconds is None or settings.trials is not None or backends.of(settings.target).builds_ahead:
        limit = "" if seconds is None else f" in {length(seconds)} at most"
        return [f"tuning {count}{limit}{order}"]
    begun = f"tuning {count} in {length(seconds)}, some {START:.0f} s of it to start{order}"
    if (fits := fitting(cases, seconds)) == len(cases):
        return [begun]
    enough = _rounded(sum(map(searched, cases)) + START)
    return [
        begun,
        f"about {fits} of them fit: the same command goes on with the others, and --budget"
        f" {enough} is time to search them all",
    ]


def _rounded(seconds: float) -> str:
    """A budget of so many seconds or a little more, as `--budget` takes it."""
    minute = 60
    if seconds <= minute:
        return f"{-(-int(seconds) // 10) * 10}s"
    return f"{-(-int(seconds) // minute)}m"
