"""How many verified trials a second a tuning run on this CPU makes, and where their time goes.

    python bench/trial_speed.py [--op OP,...] [--candidates 8] [--seed 0] [--output FOLDER]

Of each case candidates are drawn at random from all schedules' knobs. They are tried as a tuning
run tries them, in a process of its own: built, checked and timed. A case's first trial also makes
what its others share (inputs, problems with their float64 outputs), and is told apart. Then the
same is done in this process step by step: scheduling, TVM's passes, LLVM, loading, the check,
timing. A pass is counted without those inside it, on the last candidate of each case.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
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
from lntune.measure.worker import Worker
from lntune.report.columns import Column, Table, key
from lntune.system.heap import kept_heap
from lntune.tune.candidates import Candidates
from lntune.tune.loop import start_worker
from lntune.tune.settings import Settings
from lntune.tune.times import TRIAL_SECONDS

SIZES = {
    "layer_norm": ((256, "float32", 512), (1000, "bfloat16", 32), (4096, "bfloat16", 512)),
    "layer_norm_backward": ((256, "bfloat16", 32), (1000, "float32", 512), (4096, "float16", 512)),
    "lnlstm_step": ((128, "float32", 1), (400, "bfloat16", 32), (1024, "float32", 128)),
    "lnlstm_step_backward": ((128, "bfloat16", 32), (400, "float32", 32), (1024, "float16", 128)),
}
"""(hidden, dtype, rows) of each operator."""
TIMEOUT = 60.0
TOP = 5
"""Passes that are shown by name."""
PARTS = ("schedule", "passes", "LLVM", "load", "check", "timing")
Answer = TypeVar("Answer")


class Row(msgspec.Struct, frozen=True):
    """What trials of a case take: seconds of the first, seconds of each of the others and of these
    how many are ok, and the median milliseconds of each part and pass.
    """

    case: Case
    first: float
    trials: list[float]
    ok: int
    statuses: dict[str, int]
    parts: dict[str, float]
    passes: dict[str, float]

    @property
    def rate(self) -> float:
        """Trials a second."""
        return len(self.trials) / sum(self.trials) if self.trials else 0.0


def candidates_of(case: Case, count: int, seed: int) -> list[Candidate]:
    """Some of a case's candidates, the same for the same seed."""
    every = list(Candidates(case, device.current()))
    return random.Random(seed).sample(every, min(count, len(every)))


def tried(worker: Worker, case: Case, candidates: Iterable[Candidate]) -> list[tuple[float, str]]:
    """What each trial takes in a worker, in seconds, and what came of it."""
    done = []
    for candidate in candidates:
        begun = time.perf_counter()
        job = Try(case, device.current(), candidate, TRIAL_SECONDS)
        status = worker.run(job, TIMEOUT).status
        done.append((time.perf_counter() - begun, status))
    return done


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


def measure(cases: Iterable[Case], count: int, seed: int) -> list[Row]:
    """All cases, one after another."""
    rows = []
    settings = Settings()
    with Worker(settings.threads) as worker, kept_heap():
        start_worker(worker, settings)
        compiler.warm_up()
        for case in cases:
            drawn = candidates_of(case, count + 1, seed)
            (first, _), *others = tried(worker, case, drawn)
            parts, passes = parts_of(case, drawn)
            statuses = Counter(status for _, status in others)
            trials = [round(seconds, 4) for seconds, _ in others]
            rows.append(Row(case, first, trials, statuses["ok"], dict(statuses), parts, passes))
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
    seed: int = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder for trial_speed.json and trial_speed.txt.")
    ] = None,
) -> None:
    """Trials a second, and their parts."""
    names = [ops.get(name).name for name in op.split(",")]
    cases = [Case(name, *size) for name in names for size in SIZES[name]]
    screen = keeping.screen()
    rows = measure(cases, candidates, seed)
    screen.print(table(rows))
    screen.print(passes_table(rows))
    for name, rate in rates(rows).items():
        screen.print(f"{name}: {rate:.1f} verified trials a second")
    if output is not None:
        facts = {
            "settings": {"candidates": candidates, "seed": seed},
            "rates": rates(rows),
            "results": rows,
        }
        keeping.keep(output, "trial_speed", screen, facts)


if __name__ == "__main__":
    typer.run(main)
