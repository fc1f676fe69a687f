"""What racing does to trials: how many a second there are with it and without, and whether the best
candidates are found all the same.

    python bench/racing.py [--candidates 60] [--output FOLDER]

A case of each operator; its candidates, default knobs first and the others in random order, are
tried by two processes in turns, each building and checking every candidate for itself: in one a
trial is as long as any, in the other as long as it deserves beside the best that this one has seen.
`regret` is how much slower the candidate that racing finds best is than the best, by the times of
the full trials.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import keeping
import msgspec
import typer

from lntune import device, ops
from lntune.case import Case
from lntune.measure.jobs import Candidate, Outcome, Try
from lntune.measure.trial import TRIAL_SAMPLES
from lntune.measure.worker import Worker
from lntune.report.columns import Column, Table, key
from lntune.tune import TRIAL_SECONDS, TRIAL_TIMEOUT
from lntune.tune.candidates import Candidates


class Tried(msgspec.Struct, frozen=True):
    """A trial: its wall time in seconds, and its outcome's median in microseconds, infinite where
    it failed; `short`: it was given up early.
    """

    seconds: float
    us: float
    short: bool


class Row(msgspec.Struct, frozen=True):
    """A case: trials a second without racing and with it, the median over candidates of the ratio
    of their seconds, the share given up early, and the regret.
    """

    case: Case
    trials: int
    full: float
    raced: float
    ratio: float
    short: float
    regret: float


def cases() -> list[Case]:
    """The case in the middle of each operator's default grid."""
    return [op.grid[len(op.grid) // 2] for op in ops.OPS.values() if op.grid]


def shuffled(case: Case, count: int, seed: int) -> list[Candidate]:
    """So many candidates of a case, default knobs first."""
    every = Candidates(case, device.current())
    rest = [c for c in every if c not in every.defaults]
    random.Random(seed).shuffle(rest)
    return [*every.defaults, *rest][:count]


def tried(worker: Worker, case: Case, candidate: Candidate, best_us: float | None) -> Tried:
    """One trial."""
    begun = time.monotonic()
    job = Try(case, device.current(), candidate, TRIAL_SECONDS, best_us=best_us)
    outcome: Outcome = worker.run(job, TRIAL_TIMEOUT)
    seconds = time.monotonic() - begun
    if outcome.status != "ok":
        return Tried(seconds, math.inf, False)
    timing = outcome.timings["tuned"]
    return Tried(seconds, timing.median_us, len(timing.samples_us) < TRIAL_SAMPLES)


def measure(workers: Sequence[Worker], case: Case, candidates: Sequence[Candidate]) -> Row:
    """Every candidate tried by both, in turns."""
    full: list[Tried] = []
    raced: list[Tried] = []
    for number, candidate in enumerate(candidates):
        best = min((t.us for t in raced), default=math.inf)
        ways = [
            (full, workers[0], None),
            (raced, workers[1], best if best < math.inf else None),
        ]
        for kept, worker, best_us in ways if number % 2 else reversed(ways):
            kept.append(tried(worker, case, candidate, best_us))
    return row(case, full, raced)


def row(case: Case, full: Sequence[Tried], raced: Sequence[Tried]) -> Row:
    """What the trials of a case come to."""
    found = min(range(len(raced)), key=lambda i: raced[i].us)
    best = min(t.us for t in full)
    return Row(
        case,
        len(full),
        round(len(full) / sum(t.seconds for t in full), 3),
        round(len(raced) / sum(t.seconds for t in raced), 3),
        round(
            statistics.median(a.seconds / b.seconds for a, b in zip(full, raced, strict=True)), 3
        ),
        round(sum(t.short for t in raced) / len(raced), 3),
        round(full[found].us / best - 1, 4) if best < math.inf else 0.0,
    )


def table(rows: Sequence[Row]) -> Table:
    """A line for each case."""
    columns = [
        *key("case"),
        Column("trials", 2),
        Column("full/s"),
        Column("raced/s"),
        Column("faster"),
        Column("short", 1),
        Column("regret"),
    ]
    shown = Table("Trials a second: all as long, and racing", columns)
    for r in rows:
        shown.add(
            str(r.case),
            str(r.trials),
            f"{r.full:.2f}",
            f"{r.raced:.2f}",
            f"{r.ratio:.2f}x",
            f"{100 * r.short:.0f}%",
            f"{100 * r.regret:.1f}%",
        )
    return shown


def main(
    count: Annotated[int, typer.Option("--candidates", help="Candidates of each case.")] = 60,
    seed: int = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder for racing.json and racing.txt.")
    ] = None,
) -> None:
    """Trials a second with racing and without."""
    screen = keeping.screen()
    with Worker() as one, Worker() as other:
        one.start()
        other.start()
        rows = [measure((one, other), case, shuffled(case, count, seed)) for case in cases()]
    screen.print(table(rows))
    if output is not None:
        facts = {
            "settings": {"candidates": count, "seed": seed},
            "results": rows,
        }
        keeping.keep(output, "racing", screen, facts)


if __name__ == "__main__":
    typer.run(main)
