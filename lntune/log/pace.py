"""What a trial took, without how fast the machine was just then.

Cores that are shared with others, by a cloud's machines above all, become faster and slower by a
third within seconds, and the trials of a case lie minutes apart. So a CPU's trial times the default
knobs in the same rounds: of a candidate counts how many times as long it takes as they do.
"""

from __future__ import annotations

from collections.abc import Mapping

from lntune.log.records import Timing

TRIED, BESIDE = "tuned", "default"
"""The names of a trial's contenders: what is tried, and the default knobs where they are timed
beside it.
"""


def at(unit_us: float | None, timings: Mapping[str, Timing]) -> float:
    """The microseconds of what was tried on a machine on which the default knobs take `unit_us`;
    those that it took where these are not known, or were not timed beside it.
    """
    took, beside = timings[TRIED].median_us, timings.get(BESIDE)
    if unit_us is None or beside is None or not beside.median_us:
        return took
    return took / beside.median_us * unit_us
