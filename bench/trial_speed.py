"""How many verified trials a second a tuning run on this CPU makes, and where their time goes.

    python bench/trial_speed.py [--op OP,...] [--candidates 8] [--workers N] [--seed 0]
                                [--output FOLDER]

Of each case candidates are drawn at random from all schedules' knobs, by the search of a tuning
run, with as many workers as it would have: candidates are built and checked beside each other, and
each is timed alone. What a case's first trials make for its others (inputs, problems with their
float64 outputs) is told apart. Then the same is done in this process step by step: scheduling,
TVM's passes, LLVM, loading, the check, timing. A pass is counted without those inside it, on the
last candidate of each case.

With several workers some candidates are timed again, by turns with nothing else going on and while
the others build: how far these times are apart, and times made alone from each other.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import keeping
import msgspec
import typer

from lntune import backends, check, device, ops
from lntune.backends.cpu import llvm, lowering
from lntune.case import Case
from lntune.kernels import compiler
from lntune.measure import calls
from lntune.measure.jobs import Candidate, Try
from lntune.report.columns import Column, Table, key
from lntune.report.failures import Failures
from lntune.system.heap import kept_heap
from lntune.tune.beside import Beside, count
from lntune.tune.candidates import Candidates
from lntune.tune.loop import start_worker, workers_of
from lntune.tune.run import Run
from lntune.tune.settings import Settings
from lntune.tune.state import Progress, Summary
from lntune.tune.times import TRIAL_SECONDS
from lntune.words import counted

SIZES = {
    "layer_norm": ((256, "float32", 512), (1000, "bfloat16", 32), (4096, "bfloat16", 512)),
    "layer_norm_backward": ((256, "bfloat16", 32), (1000, "float32", 512), (4096, "float16", 512)),
    "lnlstm_step": ((128, "float32", 1), (400, "bfloat16", 32), (1024, "float32", 128)),
    "lnlstm_step_backward": ((128, "bfloat16", 32), (400, "float32", 32), (1024, "float16", 128)),
}
"""(hidden, dtype, rows) of each operator."""
TIMEOUT = 60.0
TURNS, TIMED_AGAIN = 3, 2
"""How often a candidate is timed in each way to see whether times agree, and how many are of each
case.
"""
BUILT_BESIDE, BUILDS = ("lnlstm_step_backward", 400, "float32", 32), 16
"""The case whose candidates are built meanwhile, which takes longest, and how many different
ones.
"""
TOP = 5
"""Passes that are shown by name."""
PARTS = ("schedule", "passes", "LLVM", "load", "check", "timing")
Answer = TypeVar("Answer")


class Row(msgspec.Struct, frozen=True):
    """What trials of a case take: seconds of the first ones, one for each worker, seconds from each
    of the others to the next, how many are ok of all, and the median milliseconds of each part and
    pass. `beside` are the times of a candidate while others are built, as shares of those that it
    takes alone, `again` the same of others that it takes alone.
    """

    case: Case
    first: float
    trials: list[float]
    ok: int
    statuses: dict[str, int]
    parts: dict[str, float]
    passes: dict[str, float]
    beside: list[float]
    again: list[float]

    @property
    def rate(self) -> float:
        """Trials a second."""
        return len(self.trials) / sum(self.trials) if self.trials else 0.0


def candidates_of(case: Case, count: int, seed: int) -> list[Candidate]:
    """Some of a case's candidates, the same for the same seed."""
    every = list(Candidates(case, device.current()))
    return random.Random(seed).sample(every, min(count, len(every)))


def searched(run: Run, case: Case) -> tuple[list[float], Counter[str]]:
    """When each trial of a case was over, in seconds, and what came of them."""
    begun, over = time.perf_counter(), list[float]()
    run.observer = lambda progress: over.append(time.perf_counter() - begun)
    before = run.summary.statuses.copy()
    run.search(case, run.candidates(case), {}, Failures(), Progress(case, 0, 1), None)
    run.forget()
    return over, run.summary.statuses - before


def agreement(
    group: Beside, case: Case, candidates: Sequence[Candidate]
) -> tuple[list[float], list[float]]:
    """The times of candidates while others build, and alone once more, as shares of those that they
    take alone: medians of some turns of all three.
    """
    other = Case(*BUILT_BESIDE)
    builds = itertools.cycle(candidates_of(other, BUILDS, 0))
    beside, again = list[float](), list[float]()
    for candidate in candidates:
        taken: dict[str, list[float]] = {"alone": [], "beside": [], "again": []}
        for _ in range(TURNS):
            for way, times in taken.items():
                group.forget()
                group.begin(case, candidate)
                for _ in range(group.count - 1 if way == "beside" else 0):
                    group.begin(other, next(builds))
                job = Try(case, device.current(), candidate, TRIAL_SECONDS)
                outcome, _ = group.tried(job, TIMEOUT)
                if outcome is not None and outcome.status == "ok":
                    times.append(outcome.timings["tuned"].median_us)
        if all(taken.values()):
            alone, others, once_more = (statistics.median(times) for times in taken.values())
            beside.append(round(others / alone, 4))
            again.append(round(once_more / alone, 4))
    group.forget()
    return beside, again


def pass_times(module: Any, goal: Any) -> dict[str, float]:
    """Milliseconds of each pass that lowers a scheduled module, without those inside it."""
    import tvm

    taken: dict[str, float] = defaultdict(float)
    stack: list[list[float]] = []

    @tvm.ir.instrument.pass_instrument
    class Clock:
        """Times passes."""

        def run_before_pass(self, mod: Any, info: Any) -> None:
            """A pass begins."""
            stack.append([time.perf_counter(), 0.0])

        def run_after_pass(self, mod: Any, info: Any) -> None:
            """A pass is over."""
            begun, inner = stack.pop()
            whole = time.perf_counter() - begun
            taken[str(info.name)] += 1e3 * (whole - inner)
            if stack:
                stack[-1][1] += whole

    with tvm.transform.PassContext(instruments=[Clock()]):
        lowering.lower(module, goal, asserts=False)
    return taken


def parts_of(
    case: Case, candidates: Iterable[Candidate]
) -> tuple[dict[str, float], dict[str, float]]:
    """(median milliseconds of each part of a trial, of each pass), in this process."""
    import tvm

    here = device.current()
    backend = backends.of(here)
    goal, taken = tvm.target.Target(llvm.target(here)), dict[str, list[float]]()
    inputs = backend.inputs(case, here)
    passes: dict[str, float] = {}

    def part(name: str, step: Callable[[], Answer]) -> Answer:
        begun = time.perf_counter()
        answer = step()
        taken.setdefault(name, []).append(1e3 * (time.perf_counter() - begun))
        return answer

    def one(candidate: Candidate) -> None:
        schedule, setting = candidate.resolved(case.op)
        module = part("schedule", lambda: compiler.scheduled(case, schedule, setting, here))
        lowered = part("passes", lambda: lowering.lower(module, goal, asserts=False))
        executable = part("LLVM", lambda: llvm.generate(lowered, goal))
        kernel = part("load", lambda: llvm.function_of(executable))
        if part("check", lambda: backend.verify(case, here, kernel)).ok:
            bound = calls.bind(case, kernel, inputs, allocate=False)
            part("timing", lambda: backend.measure({"tuned": bound}, here, TRIAL_SECONDS))
        passes.update(pass_times(module, goal))

    for number, candidate in enumerate(candidates):
        one(candidate)
        if number == 0:  # which makes what others share
            taken.clear()
    return {name: statistics.median(of) for name, of in taken.items()}, passes


def measure(cases: Sequence[Case], count: int, workers: int, seed: int) -> list[Row]:
    """All cases, one after another."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        settings = Settings(
            search="random",
            seconds=None,
            trials=count + workers,
            seed=seed,
            log_dir=Path(folder),
            again=True,
            workers=workers,
        )
        worker, group = workers_of(settings, cases)
        stack.enter_context(group or worker)
        stack.enter_context(kept_heap())
        run = Run(settings, worker, lambda _: None, Summary(), None, group)
        if group:
            group.wait(workers)
        else:
            start_worker(worker, settings)
        compiler.warm_up()
        for case in cases:
            over, statuses = searched(run, case)
            first = over[workers - 1]
            trials = [round(b - a, 4) for a, b in itertools.pairwise(over[workers - 1 :])]
            drawn = candidates_of(case, count + 1, seed)
            alike = agreement(group, case, drawn[:TIMED_AGAIN]) if group else ([], [])
            parts, passes = parts_of(case, drawn)
            rows.append(
                Row(case, first, trials, statuses["ok"], dict(statuses), parts, passes, *alike)
            )
            check.forget()
    return rows


def rates(rows: list[Row]) -> dict[str, float]:
    """Trials a second of each operator, over all its cases' trials but the first."""
    return {
        op: sum(len(r.trials) for r in rows if r.case.op == op)
        / sum(sum(r.trials) for r in rows if r.case.op == op)
        for op in dict.fromkeys(r.case.op for r in rows)
    }


def table(rows: list[Row]) -> Table:
    """A line for each case."""
    columns = [Column("trials/s"), Column("first ms", 1), *(Column(f"{p} ms", 2) for p in PARTS)]
    shown = Table("Trials a second, and what one takes", [*key("case"), *columns])
    for r in rows:
        parts = [f"{r.parts[name]:.0f}" if name in r.parts else "" for name in PARTS]
        shown.add(str(r.case), f"{r.rate:.1f}", f"{1e3 * r.first:.0f}", *parts)
    return shown


def passes_table(rows: list[Row]) -> Table:
    """The passes that take longest, a line for each operator."""
    shown = Table("Passes that take longest", [*key("operator", "passes, ms")])
    for op in dict.fromkeys(r.case.op for r in rows):
        sums: Counter[str] = Counter()
        for r in rows:
            sums.update(r.passes if r.case.op == op else {})
        longest = ", ".join(f"{name.split('.')[-1]} {ms:.0f}" for name, ms in sums.most_common(TOP))
        shown.add(op, longest)
    return shown


def main(
    op: Annotated[str, typer.Option(help="Operators, separated by commas.")] = ",".join(SIZES),
    candidates: Annotated[int, typer.Option(help="Of each case, beside the first.")] = 8,
    workers: Annotated[int, typer.Option(help="0: as many as a tuning run would have.")] = 0,
    seed: int = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder for trial_speed.json and trial_speed.txt.")
    ] = None,
) -> None:
    """Trials a second, and their parts."""
    names = [ops.get(name).name for name in op.split(",")]
    cases = [Case(name, *size) for name in names for size in SIZES[name]]
    screen = keeping.screen()
    workers = workers or count(device.current(), cases)
    rows = measure(cases, candidates, workers, seed)
    screen.print(f"{counted(workers, 'worker')} on {counted(device.usable_cores(), 'core')}")
    screen.print(table(rows))
    screen.print(passes_table(rows))
    for name, rate in rates(rows).items():
        screen.print(f"{name}: {rate:.1f} verified trials a second")
    if any(r.beside for r in rows):
        for way, shares in (
            ("while others build", [share for r in rows for share in r.beside]),
            ("alone once more", [share for r in rows for share in r.again]),
        ):
            off = sorted(abs(share - 1) for share in shares)
            screen.print(
                f"timed {way}, as a share of the time alone, of {counted(len(off), 'candidate')}:"
                f" median {statistics.median(shares):.3f}; off by {statistics.median(off):.1%} in"
                f" the median, {off[math.ceil(0.9 * len(off)) - 1]:.1%} in nine of ten"
            )
    if output is not None:
        facts = {
            "settings": {"candidates": candidates, "workers": workers, "seed": seed},
            "rates": rates(rows),
            "results": rows,
        }
        keeping.keep(output, "trial_speed", screen, facts)


if __name__ == "__main__":
    typer.run(main)
