"""Was a measurement disturbed? What its samples say, whatever load the system reports.

On a machine that others use, threads wait for each other's turn of the scheduler, and samples say
how long a turn is instead of how long a kernel takes. Three things show it; of some 8,000 measured
contenders on quiet machines the first two were never above 2.5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

TIMES = 3.0
"""Half the samples take so many times the quickest, or the upper quarter so many times the lower
one.
"""
ENOUGH = 4
"""Quartiles of fewer samples say nothing."""
TURN_US = 4000.0
"""A turn of the scheduler, or a whole number of them; Linux counts in ticks of 1, 4 or 10 ms, and
most distributions in 4.
"""
_BELOW, _ABOVE = 0.015, 0.005
"""How far from a whole number of turns a sample may end, as a share of a turn: the work itself is
done before the turn is over. Where several samples of different numbers of turns tell, twice as
far."""
MOSTLY = 0.9
"""This share of one contender's samples are of whole turns, and of different numbers of them."""
APART = 100.0
"""No kernel is so many times as fast as eager mode, or as slow; nor as fast as a copy of its input,
or as other knobs of the same work.
"""


def why(samples: Mapping[str, Sequence[float]], medians: Mapping[str, float]) -> str:
    """What shows that a measurement was disturbed, in words; empty when nothing does.

    `samples` are microseconds by contender, of all of one measurement, `medians` theirs (of more
    samples, where not all were kept).
    """
    for name, times in samples.items():
        if reason := _scattered(name, sorted(times), medians[name]):
            return reason
    # the default knobs may be the winner itself
    different = {tuple(times): medians[name] for name, times in samples.items()}
    ends = list(different.values())
    if (
        len(ends) > 1
        and all(map(_turns, ends))
        and max(ends) < (1 + 2 * (_BELOW + _ABOVE)) * min(ends)
    ):
        return (
            f"whoever was measured took {round(ends[0] / TURN_US)} turns of the scheduler,"
            f" {TURN_US / 1e3:g} ms each"
        )
    tuned = medians.get("tuned")
    for name, both_ways in (("eager", True), ("copy", False), ("default", False)):
        other_us = medians.get(name)
        if (
            tuned
            and other_us
            and (other_us > APART * tuned or (both_ways and tuned > APART * other_us))
        ):
            factor = max(other_us / tuned, tuned / other_us)
            return f"{name!r} and the kernel lie a factor of {factor:.0f} apart"
    return ""


def _scattered(name: str, ordered: Sequence[float], median: float) -> str:
    if len(ordered) < ENOUGH:
        return ""
    lower, upper = ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4]
    if median > TIMES * ordered[0]:
        return (
            f"half the calls of {name!r} took {median:.4g} us or more, the quickest"
            f" {ordered[0]:.4g} us"
        )
    if upper > TIMES * lower:
        return (
            f"a quarter of the calls of {name!r} took {upper:.4g} us or more, another {lower:.4g}"
            " us or less"
        )
    # most are, and a kernel is to be loaded in a millisecond
    if ordered[-1] < (1 - 2 * _BELOW) * TURN_US:
        return ""
    turns = [_turns(us, 2) for us in ordered]
    if len(set(filter(None, turns))) > 1 and sum(map(bool, turns)) >= MOSTLY * len(turns):
        return (
            f"calls of {name!r} took {turns[0] or turns[1]} to {turns[-1] or turns[-2]} turns of"
            f" the scheduler, {TURN_US / 1e3:g} ms each"
        )
    return ""


def _turns(us: float, times: int = 1) -> int:
    """The number of turns, one at least, if it is a whole one; else 0."""
    turns = us / TURN_US
    return next(
        (
            n
            for n in (int(turns), int(turns) + 1)
            if n >= 1 and n - times * _BELOW <= turns <= n + times * _ABOVE
        ),
        0,
    )
