"""How near each other the kernels are that two independent tuning runs choose.

    python bench/two_runs.py [--cases 24] [--budget 8] [--time 1] [--output FOLDER]

Each run has an empty log and a seed of its own, tunes the same cases, spread evenly over the
default grids of all operators, with `--budget` seconds each, and what `lntune` would then serve is
taken from its log: a kernel or eager mode. The two choices of a case are built, checked and timed
in the same rounds for `--time` seconds, and up to six times as long until their ratio is known as
precisely as `lntune compare --measure` wants it. Where both are the same there is nothing to time.
Takes some (2 x budget + time + 1) seconds a case: seven minutes as it stands. `--search` names
another search than the one that is used where none is named.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import keeping
import msgspec
import typer

from lntune import certainty, device, ops, schedule, tune
from lntune.case import Case
from lntune.knobs import describe
from lntune.log import records, select
from lntune.log.records import Timing
from lntune.measure.jobs import Candidate, Final, Outcome
from lntune.measure.worker import Worker
from lntune.report.columns import Column, Table
from lntune.report.tables import micros
from lntune.words import counted

BAR = 0.95
"""The share of cases that is wanted within NEAR."""
NEAR = 0.03
EAGER = "eager"
TIMEOUT = 60.0
PRECISE = 6
"""Times as long as asked for, at most, two choices are timed until their ratio is precise."""


class Row(msgspec.Struct, frozen=True):
    """A case: what each run chose, its median in microseconds, and how many times as fast the
    second choice is as the first, with the interval in which that lies but for 5 %. `how` is what
    each run said of its winner, and what decided. Of equal choices only that is told; of a
    comparison that failed, why.
    """

    case: Case
    first: str
    second: str
    same: bool
    how: tuple[str, str]
    first_us: float | None = None
    second_us: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    failed: str = ""

    @property
    def near(self) -> bool:
        """Whether the two differ by no more than NEAR."""
        if self.same:
            return True
        return self.ratio is not None and max(self.ratio, 1 / self.ratio) <= 1 + NEAR


def thinned(count: int) -> list[Case]:
    """So many cases, as many of each operator, spread evenly over its default grid."""
    grids = [op.grid for op in ops.OPS.values() if op.grid]
    each = max(1, count // len(grids))
    return [
        case
        for grid in grids
        for case in dict.fromkeys(grid[i * len(grid) // each] for i in range(each))
    ]


class Chosen(msgspec.Struct, frozen=True):
    """What a run's log serves a case: a candidate, None for eager mode; and how it was decided."""

    candidate: Candidate | None
    how: str

    @property
    def name(self) -> str:
        """On a line."""
        if self.candidate is None:
            return EAGER
        return f"{self.candidate.schedule} {describe(self.candidate.knobs)}"


def choices(folder: Path, cases: Sequence[Case]) -> dict[Case, Chosen]:
    """What a run's log serves each of some cases; nothing of those that it has not tuned."""
    here, found = device.current(), dict[Case, Chosen]()
    for case in cases:
        log = records.read([folder], case.op, here, "final")
        choice = select.select(case, here, log, schedule.for_op(case.op, here.kind))
        if choice.record is None or not choice.measured:
            continue
        decision = choice.record.decision
        how = f"{decision.verdict}, by {decision.by}" if decision else ""
        candidate = None
        if choice.tier != "eager":
            candidate = Candidate(choice.schedule, tuple(choice.knobs.items()))
        found[case] = Chosen(candidate, how)
    return found


def compared(case: Case, first: Chosen, second: Chosen, outcome: Outcome | None) -> Row:
    """The row of a case, of a final with the candidates among the two choices, in their order; None
    where the two are the same.
    """
    row = Row(
        case, first.name, second.name, first.candidate == second.candidate, (first.how, second.how)
    )
    if outcome is None:
        return row
    if outcome.status != "ok":
        return msgspec.structs.replace(row, failed=f"{outcome.status}: {outcome.message}")
    a, b = (_timing(chosen, outcome) for chosen in (first, second))
    estimate = certainty.paired(a.samples_us, b.samples_us)
    low, high = estimate.interval()
    return msgspec.structs.replace(
        row,
        first_us=a.median_us,
        second_us=b.median_us,
        ratio=round(estimate.ratio, 4),
        low=round(low, 4),
        high=round(high, 4),
    )


def _timing(chosen: Chosen, outcome: Outcome) -> Timing:
    """What a choice took in a final."""
    if chosen.candidate is None:
        return outcome.timings[EAGER]
    for rival in outcome.rivals:
        if (rival.schedule, rival.knobs) == (chosen.candidate.schedule, chosen.candidate.knobs):
            return rival.timing
    return outcome.timings["tuned"]


def measure(worker: Worker, case: Case, first: Chosen, second: Chosen, seconds: float) -> Row:
    """Time the two choices of a case in the same rounds."""
    if first.candidate == second.candidate:
        return compared(case, first, second, None)
    candidates = tuple(c.candidate for c in (first, second) if c.candidate is not None)
    sides = (EAGER,) if None in (first.candidate, second.candidate) else ()
    job = Final(
        *(case, device.current(), candidates, seconds),
        retry_seconds=2 * seconds,
        most_seconds=PRECISE * seconds,
        sides=sides,
    )
    return compared(case, first, second, worker.run(job, TIMEOUT + 4 * PRECISE * seconds))


def table(rows: Sequence[Row]) -> Table:
    """A line for each case whose choices are not the same."""
    columns = [
        Column("case", right=False),
        Column("first us"),
        Column("second us"),
        Column("ratio"),
        Column("95 %", 1),
        Column("first", 3, right=False),
        Column("second", 4, right=False),
    ]
    shown = Table("Cases in which two runs chose different kernels: first / second", columns)
    for r in rows:
        if r.same:
            continue
        ratio = r.failed if r.ratio is None else f"{r.ratio:.3f}x{'' if r.near else ' !'}"
        interval = "-" if r.low is None or r.high is None else f"{r.low:.3f}-{r.high:.3f}"
        shown.add(
            str(r.case),
            micros(r.first_us),
            micros(r.second_us),
            ratio,
            interval,
            r.first,
            r.second,
        )
    return shown


def lines(rows: Sequence[Row], missing: int) -> list[str]:
    """What the rows come to."""
    near, same = sum(r.near for r in rows), sum(r.same for r in rows)
    share = near / len(rows) if rows else 0.0
    found = [
        f"within {100 * NEAR:.0f} % of each other in {near} of {counted(len(rows), 'case')}"
        f" ({100 * share:.0f} %; {'reached' if share >= BAR else 'missed'}: {100 * BAR:.0f} %)",
        f"the same choice in {same} of {len(rows)}",
    ]
    if missing:
        found.append(f"{counted(missing, 'case')} left out: a run has not tuned it")
    return found


def main(
    count: Annotated[int, typer.Option("--cases", help="Cases of all operators together.")] = 24,
    budget: Annotated[float, typer.Option(help="Seconds of tuning a case and run.")] = 8.0,
    seconds: Annotated[
        float, typer.Option("--time", help="Seconds of comparing two choices.")
    ] = 1.0,
    seed: int = 0,
    search: Annotated[str, typer.Option(help="Another search than the usual one.")] = "",
    output: Annotated[
        Path | None, typer.Option(help="Folder for two_runs.json and two_runs.txt.")
    ] = None,
) -> None:
    """Two independent tuning runs, and how near each other their choices are."""
    screen, cases = keeping.screen(), thinned(count)
    with tempfile.TemporaryDirectory() as folder:
        chosen = []
        for run in range(2):
            settings = tune.Settings(
                search=search,
                seconds=budget * len(cases),
                seed=seed + 1000 * run,
                log_dir=Path(folder) / str(run),
            )
            summary = tune.tune(cases, settings)
            screen.print(
                f"run {run + 1}: {counted(summary.trials, 'trial')} in {summary.seconds:.0f} s"
            )
            chosen.append(choices(Path(folder) / str(run), cases))
    both = [case for case in cases if all(case in run for run in chosen)]
    with Worker() as worker:
        rows = [measure(worker, c, chosen[0][c], chosen[1][c], seconds) for c in both]
    found = lines(rows, len(cases) - len(both))
    screen.print(table(rows))
    for line in found:
        screen.print(line)
    if output is not None:
        facts = {
            "settings": {
                "cases": count,
                "budget": budget,
                "time": seconds,
                "seed": seed,
                "search": search,
            },
            "found": found,
            "near": sum(r.near for r in rows),
            "same": sum(r.same for r in rows),
            "results": rows,
        }
        keeping.keep(output, "two_runs", screen, facts)


if __name__ == "__main__":
    typer.run(main)
