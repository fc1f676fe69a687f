"""Which finalist wins a final, by a fixed rule, so that two runs agree; and how certain that is.

The fastest wins, by the medians of `timings`: on CPUs with a warm cache, since the input of a layer
has just been written by the layer before and its output is read by the next. Those are tied with
it that are not certainly slower by more than 1 %, on the ratios within rounds, and did not
measure slower by more than AT_MOST, however uncertain. Of those that are tied

1. who is certainly slower than another of them by more than COLD_SMALLEST with a cold cache is out;
2. the default knobs win, those that serve the case where nothing is tuned;
3. else the fewest knobs that differ from the default ones of their schedule;
4. else the schedule that is declared first, and then the knobs whose values are.

So what wins is slower than the default knobs, where those work, by less than a tie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from lntune import certainty, knobs, schedule
from lntune.case import Case
from lntune.certainty import Estimate
from lntune.device import Device
from lntune.errors import LntuneError
from lntune.log.decision import Advantage, Decision
from lntune.log.records import Rival, Timing
from lntune.measure.jobs import Candidate, Outcome

AT_MOST = 0.02
"""By how much a finalist may have measured slower than the fastest to be tied with it."""
COLD_SMALLEST = 0.03
"""What difference with a cold cache decides a tie; those samples are few."""

LEAST_BATCHES = 5
"""Of samples that are few."""
FARTHEST = 1e3
"""A ratio that may lie so high, or so low as its inverse, is not known at all."""


class Choice(NamedTuple):
    """The place of a winner among finalists, what decided, and the places of all that are tied with
    the fastest, it among them.
    """

    winner: int
    by: str
    tied: tuple[int, ...]


def choose(
    case: Case,
    device: Device,
    finalists: Sequence[Candidate],
    timings: Sequence[Timing],
    cold: Sequence[Timing | None],
    default: Candidate | None,
) -> Choice:
    """The winner among finalists that were measured in the same rounds; `default` serves the case
    where nothing is tuned.
    """
    places = range(len(finalists))
    fastest = min(places, key=lambda i: timings[i].median_us)
    others = [i for i in places if i != fastest]
    estimates = [_paired(timings[i], timings[fastest]) for i in others]
    certain = certainty.verdicts(estimates) if estimates else []
    tied = [fastest] + [
        i
        for i, estimate, verdict in zip(others, estimates, certain, strict=True)
        if verdict != "FASTER" and estimate.ratio <= 1 + AT_MOST
    ]
    sturdy = _sturdy(tied, cold)

    def simplicity(place: int) -> tuple[Any, ...]:
        return simple(case, device, finalists[place], default)

    winner = min(sturdy, key=simplicity)
    by = "time"
    if len(tied) > 1:
        by = "simplicity" if winner == min(tied, key=simplicity) else "cold"
    return Choice(winner, by, tuple(sorted(tied)))


def _sturdy(tied: Sequence[int], cold: Sequence[Timing | None]) -> list[int]:
    """Those of tied finalists that no other is certainly faster than with a cold cache."""
    measured = {i: one for i in tied if (one := cold[i]) is not None and one.samples_us}
    if len(measured) < len(tied):
        return list(tied)
    fastest = min(measured, key=lambda i: measured[i].median_us)
    others = [i for i in tied if i != fastest]
    estimates = [_paired(measured[i], measured[fastest]) for i in others]
    certain = certainty.verdicts(estimates, COLD_SMALLEST) if others else []
    slower = {i for i, verdict in zip(others, certain, strict=True) if verdict == "FASTER"}
    return [i for i in tied if i not in slower]


def simple(
    case: Case, device: Device, candidate: Candidate, default: Candidate | None
) -> tuple[Any, ...]:
    """What candidates are ordered by where their times are tied, the simplest first."""
    declared = list(schedule.for_op(case.op, device.kind))
    name = candidate.schedule
    place = declared.index(name) if name in declared else len(declared)
    try:
        chosen, setting = candidate.resolved(case.op)
        own = knobs.to_dict(chosen.untuned(case, device))
    except LntuneError:  # a user's, which has failed since it was built
        return candidate != default, math.inf, place, name, []
    changed = sum(own[name] != value for name, value in candidate.knobs.items())
    listed = knobs.values_of(type(setting))
    values = [listed[name].index(value) for name, value in candidate.knobs.items()]
    return candidate != default, changed, place, name, values


def settle(
    case: Case,
    device: Device,
    finalists: Sequence[Candidate],
    outcome: Outcome,
    default: Candidate | None,
) -> tuple[Outcome, Decision]:
    """What came of a final, with the winner that the rule above chooses in the place of the
    fastest, and how certain it is.
    """
    rows = _finalists(finalists, outcome)
    chosen = choose(
        case, device, finalists, [r.timing for r in rows], [r.cold for r in rows], default
    )
    winner = rows[chosen.winner]
    rivals = tuple(r for i, r in enumerate(rows) if i != chosen.winner)
    outcome = msgspec.structs.replace(
        outcome,
        winner=chosen.winner,
        rivals=rivals,
        timings=outcome.timings | {"tuned": winner.timing},
        cold=outcome.cold | ({"tuned": winner.cold} if winner.cold else {}),
        warm=outcome.warm | ({"tuned": winner.warm} if winner.warm else {}),
        errors=winner.errors,
        versus_eager=winner.versus_eager,
    )
    # as the record has them: without the winner
    tied = tuple(i - (i > chosen.winner) for i in chosen.tied if i != chosen.winner)
    return outcome, _decision(outcome, chosen.by, tied)


def _finalists(finalists: Sequence[Candidate], outcome: Outcome) -> list[Rival]:
    """All finalists in their order, as rivals are kept."""
    assert outcome.winner is not None
    winner = finalists[outcome.winner]
    first = Rival(
        winner.schedule,
        winner.knobs,
        outcome.timings["tuned"],
        schedule.code_of(winner.schedule),
        outcome.errors,
        outcome.versus_eager,
        cold=outcome.cold.get("tuned"),
        warm=outcome.warm.get("tuned"),
    )
    rivals = list(outcome.rivals)
    return [*rivals[: outcome.winner], first, *rivals[outcome.winner :]]


def _decision(outcome: Outcome, by: str, tied: tuple[int, ...]) -> Decision:
    """How certain an outcome's winner is."""
    tuned, rivals = outcome.timings["tuned"], outcome.rivals
    over = {name: advantage(t, tuned) for name, t in outcome.timings.items() if name != "tuned"}
    runner_up = min(range(len(rivals)), key=lambda i: rivals[i].timing.median_us, default=None)
    over_runner_up = None if runner_up is None else advantage(rivals[runner_up].timing, tuned)
    verdict = "likely"
    if over_runner_up is None:
        verdict = "alone"
    elif runner_up in tied:
        verdict = "tied"
    elif over_runner_up.verdict == "FASTER":
        verdict = "better"
    return msgspec.convert(
        {
            "verdict": verdict,
            "by": by,
            "over_runner_up": over_runner_up,
            "runner_up": runner_up,
            "tied": tied,
            "over_eager": over.get("eager"),
            "over_default": over.get("default"),
        },
        Decision,
    )


def with_training(outcome: Outcome, decision: Decision, steps: Outcome) -> tuple[Outcome, Decision]:
    """The same with what came of timing steps of training by the winner, and how certain it is that
    they are faster than eager mode's.
    """
    over = advantage(steps.training["eager"], steps.training["tuned"])
    return (
        msgspec.structs.replace(outcome, training=steps.training, forward=steps.forward),
        msgspec.structs.replace(decision, training=over),
    )


def advantage(other: Timing, winner: Timing) -> Advantage:
    """How many times as fast a winner is as another contender of the same rounds."""
    estimate = _paired(other, winner)
    low, high = estimate.interval()
    known = math.isfinite(estimate.error) and 1 / FARTHEST < low <= high < FARTHEST
    (verdict,) = certainty.verdicts([estimate])
    return Advantage(
        max(round(estimate.ratio, 5), 1e-5),
        round(low, 5) if known else None,
        round(high, 5) if known else None,
        verdict,
    )


def _paired(a: Timing, b: Timing) -> Estimate:
    """A / B on samples of the same rounds; on medians alone where those do not match."""
    count = len(a.samples_us)
    if count and count == len(b.samples_us):
        # an interrupted sample alone in its batch would make all uncertain
        batches = max(LEAST_BATCHES, min(certainty.BATCHES, count // 3))
        return certainty.paired(a.samples_us, b.samples_us, batches)
    return Estimate(math.log(max(a.median_us, 1e-4) / max(b.median_us, 1e-4)))
