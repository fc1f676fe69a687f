"""Searches compared by what they would have found: tuning logs that hold all of a case's space are
played to each of them, again and again.

Nothing is built or measured. A space is what a log has of it: where only some values of a knob were
tried (a thinned space), a step leads from one of these to the next.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lntune import knobs, search
from lntune import schedule as schedules
from lntune.case import Case
from lntune.device import Device
from lntune.errors import InputError, LntuneError, got_expected
from lntune.log import pace, records
from lntune.log.records import Key, Record
from lntune.measure.jobs import Candidate
from lntune.search import Space, replay
from lntune.system import paths
from lntune.tune import nearby
from lntune.words import counted

FOLDER = "search_study"
AFTER = (5, 10, 20, 50)
"""Trials after which the regret is looked at."""
NEAR = 0.05
"""How near to the best a search is to come."""
IN_TIME = 0.1
"""The part of the space's trials in which it is to."""
COVERED = 0.9
"""The part of a case's space that has to be tried."""
LEAST = 8
"""Candidates of a space that is worth searching."""
DRAWS_NOTHING = ("exhaustive", "ranked")
"""Searches that go the same way with every seed."""
IN_THEIR_ORDER = ("exhaustive", "random")
"""Searches to which nothing can be given to begin with."""


@dataclass(frozen=True)
class Table:
    """What the candidates of a case cost on a device, in microseconds; infinite for what failed.
    The default is the first. `of` is how many a whole space would have.
    """

    case: Case
    device: Device
    costs: Mapping[Candidate, float]
    of: int

    @property
    def best(self) -> float:
        """The least cost."""
        return min(self.costs.values())


class Uncovered(msgspec.Struct, frozen=True):
    """A case of a log of which too little was tried, or nothing works: so many candidates of so
    many, and why it is left out.
    """

    case: Case
    device: str
    tried: int
    of: int
    reason: str


class Result(msgspec.Struct, frozen=True):
    """What a search comes to on a case, over seeds.

    `given` says whether it was given the best of the operator's other cases to begin with, as a
    tuning run is by its log. `regret` and `regret_90` are the median and 90th percentile, after as
    many trials as the keys say, of how much slower the best of them is than the best of all, as a
    share; `trials_to_near` the same of the trials to come within NEAR of it, null where it never
    does; `share_to_near` the median's share of the space. `near_in_time` says whether the median
    run is that near after a tenth of the space's trials (rounded up).
    """

    case: Case
    device: str
    search: str
    given: bool
    candidates: int
    seeds: int
    default_regret: float | None
    regret: dict[str, float | None]
    regret_90: dict[str, float | None]
    trials_to_near: float | None
    trials_to_near_90: float | None
    share_to_near: float | None
    near_in_time: bool


class Study(msgspec.Struct, frozen=True):
    """The results of all searches on all cases that are covered, and what is not."""

    results: list[Result]
    uncovered: list[Uncovered]


def searches(wanted: Sequence[str]) -> list[str]:
    """The names of those wanted, of all that can be used here where none is.

    Raises:
        UnknownNameError: there is none of that name.
        ToolchainError: one that was named needs a package that is missing.
    """
    for name in wanted:
        search.ensure_usable(name)
    return list(wanted) or search.usable()


def committed() -> list[Path]:
    """The folders of whole spaces that a checkout has.

    Raises:
        InputError: there are none here.
    """
    folders = sorted(paths.content("bench").glob(f"results/*/{FOLDER}"))
    if not folders:
        raise InputError(got_expected("LOG", "none", _EXPECTED, "A checkout has some."))
    return folders


def tables(logs: Sequence[Path]) -> tuple[list[Table], list[Uncovered]]:
    """The cost tables of logs (files, or folders of them), and the cases of which they do not have
    enough for one.

    Raises:
        InputError: a path that is not there, or has no log in it.
    """
    groups: dict[tuple[str, Case], list[Record]] = {}
    for path in _files(logs):
        for record in records.read_file(path, "trial"):
            groups.setdefault((record.device.slug, record.case), []).append(record)
    found: list[Table] = []
    left_out: list[Uncovered] = []
    for (_, case), trials in sorted(groups.items(), key=lambda group: group[0]):
        one = _table(case, trials)
        (found if isinstance(one, Table) else left_out).append(one)  # type: ignore[arg-type]
    return found, left_out


def _files(logs: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in logs:
        if path.is_dir():
            inside = sorted(path.rglob("*.jsonl"))
            if not inside:
                raise InputError(got_expected("LOG", f"{path}, without a log in it", _EXPECTED))
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise InputError(got_expected("LOG", f"{path}, which is not there", _EXPECTED))
    return files


_EXPECTED = "a tuning log (*.jsonl) or a folder of them"


def _table(case: Case, trials: Sequence[Record]) -> Table | Uncovered:
    """The table of one case on one device, or why there is none."""
    device = trials[-1].device
    beside = [r.timings[pace.BESIDE].median_us for r in trials if pace.BESIDE in r.timings]
    unit_us = statistics.median(beside) if beside else None
    samples: dict[Candidate, list[float]] = {}
    gone = Counter[str]()
    for record in trials:
        try:
            one, setting = Candidate.of_record(record).resolved(case.op)
        except LntuneError:
            gone[record.schedule] += 1
            continue
        measured = record.status == "ok" and pace.TRIED in record.timings
        cost = pace.at(unit_us, record.timings) if measured else math.inf
        samples.setdefault(Candidate.of(one.name, setting), []).append(cost)
    costs = {candidate: statistics.median(taken) for candidate, taken in samples.items()}
    space, defaults = _space(case, device, costs)
    of = len({*space, *costs})

    def left_out(reason: str) -> Uncovered:
        return Uncovered(case, device.slug, len(costs), of, reason)

    if gone:
        names = ", ".join(gone)
        return left_out(
            f"of {names} in {counted(gone.total(), 'trial')} there is no such schedule or knob"
        )
    if len(costs) < max(LEAST, COVERED * of):
        return left_out(f"{len(costs)} of {counted(of, 'candidate')} were tried")
    if min(costs.values()) == math.inf:
        return left_out("no candidate worked")
    first = [c for c in defaults if c in costs][:1] or list(costs)[:1]
    ordered = {c: costs[c] for c in (*first, *costs)}
    return Table(case, device, ordered, of)


def _space(
    case: Case, device: Device, costs: Iterable[Candidate]
) -> tuple[list[Candidate], list[Candidate]]:
    """The valid candidates of those schedules and values of knobs that were tried, and the default
    ones among them.
    """
    values: dict[tuple[str, str], set[object]] = {}
    for candidate in costs:
        for name, value in candidate.items:
            values.setdefault((candidate.schedule, name), set()).add(value)
    space: list[Candidate] = []
    defaults: list[Candidate] = []
    for name in dict.fromkeys(c.schedule for c in costs):
        one = schedules.get(name, case.op)
        defaults.append(Candidate.of(name, one.untuned(case, device)))
        for setting in one.space(case, device):
            candidate = Candidate.of(name, setting)
            if all(v in values.get((name, knob), ()) for knob, v in candidate.items):
                space.append(candidate)
    order = list(schedules.for_op(case.op, device.kind))
    defaults.sort(key=lambda c: order.index(c.schedule) if c.schedule in order else len(order))
    return space, defaults


def space_of(table: Table) -> Space:
    """A table as a search sees a space, with steps between the values that it has, and the knobs
    that schedules want tried first.
    """
    used: dict[tuple[str, str], dict[knobs.Value, None]] = {}
    own: dict[tuple[str, str], tuple[knobs.Value, ...]] = {}
    scales: dict[str, tuple[knobs.Value, ...]] = {}
    for candidate in table.costs:
        for name, value in candidate.items:
            used.setdefault((candidate.schedule, name), {})[value] = None
    for name in dict.fromkeys(c.schedule for c in table.costs):
        for knob, listed in knobs.values_of(schedules.get(name).knobs).items():
            tried = used.get((name, knob), {})
            own[name, knob] = tuple(v for v in listed if v in tried)
            known = {*tried, *scales.get(knob, ())}
            scales[knob] = tuple(v for v in listed if v in known)
    first: dict[str, Candidate] = {}
    for candidate in table.costs:
        first.setdefault(candidate.schedule, candidate)
    defaults = list(first.values())

    def neighbours(candidate: Candidate) -> list[Candidate]:
        around = []
        for name, value in candidate.items:
            scale = own[candidate.schedule, name]
            at = scale.index(value)
            for step in (at - 1, at + 1):
                if 0 <= step < len(scale):
                    changed = {**candidate.knobs, name: scale[step]}
                    around.append(Candidate(candidate.schedule, tuple(changed.items())))
        return around + [c for c in defaults if c.schedule != candidate.schedule]

    named = [
        Candidate.of(name, setting)
        for name in first
        for setting in schedules.get(name).first(table.case, table.device)
    ]
    return Space(
        tuple(table.costs),
        neighbours,
        seeds=tuple(dict.fromkeys(c for c in named if c in table.costs and c not in defaults)),
        knobs=lambda c: {"schedule": c.schedule, **c.knobs},
        scales=scales,
    )


Observer = Callable[[Table, str], None]


def study(
    found: Sequence[Table],
    names: Sequence[str],
    seeds: int,
    given: Sequence[bool] = (False,),
    observer: Observer = lambda *_: None,
    at_once: int = 1,
) -> list[Result]:
    """Play every table to every search, with so many seeds each; where `given`, with the best of
    the operator's other cases to be tried first. A search has `at_once` candidates in hand.
    """
    results = []
    for table in found:
        for name in names:
            for with_winners in given:
                winners = _winners(table, found) if with_winners else []
                if with_winners and (not winners or name in IN_THEIR_ORDER):
                    continue  # it would be the same once more
                observer(table, name)
                runs = 1 if name in DRAWS_NOTHING else seeds
                results.append(_result(table, name, runs, winners, at_once))
    return results


def _winners(table: Table, others: Sequence[Table]) -> list[Candidate]:
    """The best of the nearest other cases of the operator on the device, as a tuning run takes them
    from its log.
    """
    own = Key.of(table.case)
    near = [
        (nearby.distance(own, key), key, min(o.costs, key=lambda c: o.costs[c]))
        for o in others
        if o.device == table.device
        and o.case.op == table.case.op
        and (key := Key.of(o.case)) != own
    ]
    fitting = [c for *_, c in sorted(near, key=lambda n: n[:2]) if c in table.costs]
    return list(dict.fromkeys(fitting))[: nearby.MOST]


def _result(
    table: Table, name: str, seeds: int, winners: Sequence[Candidate], at_once: int
) -> Result:
    space, best = space_of(table), table.best
    seeded = tuple(dict.fromkeys((*space.seeds, *winners)))
    space = dataclasses.replace(space, seeds=seeded, at_once=at_once)
    limit, wanted = (1 + NEAR) * best, search.get(name)
    runs = [replay.tried(wanted, space, table.costs, s, max(AFTER), limit) for s in range(seeds)]
    near = [replay.trials_to(costs, limit) for costs in runs]
    regrets = {n: [replay.regret(costs, n, best) for costs in runs] for n in AFTER}
    median = statistics.median(near)
    return Result(
        table.case,
        table.device.slug,
        name,
        bool(winners),
        len(table.costs),
        seeds,
        _finite(next(iter(table.costs.values())) / best - 1),
        {str(n): _finite(statistics.median(r)) for n, r in regrets.items()},
        {str(n): _finite(percentile(r, 0.9)) for n, r in regrets.items()},
        _finite(median),
        _finite(percentile(near, 0.9)),
        _finite(median / len(table.costs)),
        median <= math.ceil(IN_TIME * len(table.costs)),
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that so large a share of them does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _finite(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None
