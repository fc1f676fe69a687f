"""Commands that build or run kernels: tune, check, build, demo."""

from __future__ import annotations

import contextlib
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from lntune import ops
from lntune.backends import DEFAULT
from lntune.cli import plans
from lntune.cli.base import (
    DTYPE,
    EVERY_CASE,
    FORMAT,
    GRID,
    HIDDEN,
    JSON,
    LOG_DIR,
    MANY,
    OP,
    ROWS,
    SEED,
    TARGET,
    WIDE,
    command,
    dispatching,
    finish,
    print_json,
    tell,
    using_logs,
)
from lntune.cli.parse import cases, names, seconds, some
from lntune.errors import InputError, got_expected
from lntune.search import SEARCHES
from lntune.words import counted

if TYPE_CHECKING:
    from lntune.case import Case
    from lntune.device import Device
    from lntune.tune import Settings


@command("Search schedules and knobs on a device; log every trial")
def tune(
    op: Annotated[
        list[str] | None,
        typer.Argument(help="Operators, all by default; see `lntune ops`."),
    ] = None,
    hidden: HIDDEN = "",
    dtype: DTYPE = "",
    rows: ROWS = "",
    grid: GRID = "default",
    cases_file: Annotated[
        Path | None,
        typer.Option(
            "--cases",
            metavar="FILE",
            help="The cases that a program was recorded to use (lntune.record_cases or"
            " LNTUNE_RECORD_CASES), those with the most time first, each on its device.",
        ),
    ] = None,
    missing: Annotated[
        bool,
        typer.Option(
            "--missing",
            help="Only cases that have no final on the device, or none of today's code.",
        ),
    ] = False,
    stale: Annotated[
        bool,
        typer.Option(
            "--stale",
            help="Only cases whose finals are of older code (schedule, operator or lowering);"
            " without sizes, a grid or --cases: all of those in the log.",
        ),
    ] = False,
    budget: Annotated[
        str,
        typer.Option(
            help=(
                "Time for the whole run, the measuring process's start (some 5 s) and the finals"
                " included: 60s, 10m, 1h; below 10s hardly anything is tuned."
            )
        ),
    ] = "60s",
    trials: Annotated[
        int | None, typer.Option(help="At most this many new candidates per case.")
    ] = None,
    search: Annotated[
        str,
        typer.Option(
            "--search",
            "--strategy",
            help=f"{', '.join(SEARCHES)} (optuna needs `pip install 'lntune[search]'`); by default"
            " bayesian on a CPU, ranked on a GPU. See `lntune search-study`.",
        ),
    ] = "",
    schedule: Annotated[str, typer.Option(help="Only these schedules, separated by commas.")] = "",
    knob: Annotated[
        list[str] | None,
        typer.Option(
            "--knob",
            metavar="NAME=VALUE",
            help="Only candidates with this value of a knob, of schedules that have it; may be"
            " given several times. A switch's name alone means on.",
        ),
    ] = None,
    seed: SEED = 0,
    timeout: Annotated[
        str,
        typer.Option(
            help=(
                "Time one candidate may take before it is killed; up to four times as much where"
                " others take its cores."
            )
        ),
    ] = "30s",
    again: Annotated[
        bool,
        typer.Option(
            "--again",
            help=(
                "Measure also what earlier runs have tried, failures too (a crash, a hang): after"
                " a change of the machine that the log does not know of."
            ),
        ),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that build and check a CPU's candidates beside each other; one is timed"
            " while the others are stopped. By default as many as cores, 4 at most, and as memory"
            " allows (1 GB each)."
        ),
    ] = None,
    target: TARGET = "",
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help=(
                "Everything but the device, which need not be here (cuda:sm_90): nothing is"
                " measured or logged."
            ),
        ),
    ] = False,
    log_dir: LOG_DIR = None,
    wide: WIDE = False,
    output_format: FORMAT = "table",
    as_json: JSON = False,
) -> None:
    """Search the schedules of operators on this machine and log every trial.

    Without --hidden, --dtype and --rows the operators' default grids are tuned, the most valuable
    cases first; --cases FILE tunes what a program was recorded to use instead, on each of its
    devices that is here (--target: on that one), and names what no kernel takes. --missing and
    --stale leave out what is tuned already. Each candidate is built and run in a process of its
    own, checked against float64 before it is timed, and logged at once; on a CPU several are built
    beside each other (--workers) and each is timed alone. With a budget too small for anything the
    first case has one trial and a short final all the same, and the output says so.

    Trials that the log has of the same case, schedule, device, threads and versions are not made
    again, failed ones included, but count: killed at any moment, the same command goes on where it
    was, and a second run tries what the first did not, first in the cases that have no result yet.
    Finalists are always measured anew.

    Ctrl-C ends with what was found: the best candidate of the case in hand is measured once more,
    shortly, and is its winner; a second Ctrl-C ends at once. Exit code 0 when at least one case was
    tuned, 1 when none was. SIGTERM and SIGHUP do the same with exit code 143 and 129.

    With --target cuda the next candidates are built on all cores but one while the GPU measures.
    --dry-run builds a few candidates of each case (--trials; 8), verifies them (a GPU's in an
    emulator), and says what a run would measure and how long it would take; exit code 1 when one of
    them is wrong or a run would measure none.
    """
    from lntune.backends import option
    from lntune.commands.tune import run
    from lntune.report.output import Output
    from lntune.report.overview import result_tables
    from lntune.report.progress import TuningProgress
    from lntune.report.rows import rows_of
    from lntune.report.tables import console
    from lntune.report.tuned import disturbed_lines, summary_lines
    from lntune.tune import TIME_OVER, Settings

    settings = Settings(
        search=search,
        schedules=tuple(names(schedule)),
        knobs=tuple(knob or ()),
        seconds=seconds("--budget", budget),
        trials=trials,
        seed=seed,
        log_dir=log_dir,
        timeout=seconds("--timeout", timeout),
        again=again,
        workers=workers,
    )
    sizes = hidden, dtype, rows
    operators = plans.fitting(op or [], settings.schedules, settings.knobs, target)
    plan = plans.plan(operators, sizes, grid, cases_file, target, missing, stale, log_dir)
    for note in plan.notes:
        tell(f"note: {note}")
    if dry_run and len(plan.parts) > 1:
        several = ", ".join(part.device.name for part in plan.parts)
        raise InputError(got_expected("--dry-run", several, "one device", "Choose by --target."))
    if dry_run and plan.parts:
        (device, asked) = plan.parts[0]
        _dry_run(asked, replace(settings, device=device), wide, output_format)
        return
    if not plan.cases:
        selected = missing or stale
        why = "nothing of that is missing or stale" if selected else "nothing can be tuned of that"
        finish(Output({"cases": [], "notes": plan.notes}, (), [why]), output_format, ok=selected)
        return
    with TuningProgress(console(stderr=output_format != "table")) as progress:
        summary = run(plan.parts, settings, lambda _: progress, progress.say)
    table = rows_of(summary.finals)
    pace = progress.pace.per_second
    facts = {
        "trials": summary.trials,
        "statuses": dict(summary.statuses),
        "earlier_trials": summary.earlier.total(),
        "earlier_statuses": dict(summary.earlier),
        "seconds": round(summary.seconds, 2),
        "verified_trials_per_second": pace and round(pace, 2),
        "interrupted": summary.interrupted,
        "log_dir": str(summary.log_dir),
        "untuned": summary.untuned,
        "failures": summary.failures.reasons(),
        "notes": [*plan.notes, *summary.notes],
        "cases": table,
    }
    text = summary_lines(summary, pace)
    if TIME_OVER in summary.untuned.values():
        text.append("note: the same command goes on with the cases that it had no time for")
    for part in plan.parts:
        own = [final for final in summary.finals if final.device == part.device]
        text += disturbed_lines(own, option(part.device))
    shown = result_tables(table, "tuned")
    finish(Output(facts, shown, text, table), output_format, wide, ok=bool(table))


def _dry_run(requested: list[Case], settings: Settings, wide: bool, output_format: str) -> None:
    from lntune.report import dry_runs
    from lntune.report.output import Output
    from lntune.report.progress import StepProgress
    from lntune.report.tables import console
    from lntune.tune import dry

    with StepProgress(console(stderr=True), "dry run", len(requested)) as progress:

        def on_case(case: Case, _index: int, _count: int, built: int) -> None:
            if not built:
                progress(str(case))

        plan = dry.run(requested, settings, on_case)
    totals = {
        "measured": plan.measured,
        "within_budget": plan.within,
        "run_seconds": round(plan.run_seconds, 1),
        "wrong": plan.wrong,
    }
    facts = {**msgspec.to_builtins(plan), **totals}
    output = Output(facts, [dry_runs.table(plan)], dry_runs.lines(plan), plan.plans)
    ok = not (plan.wrong or plan.interrupted or not plan.measured)
    finish(output, output_format, wide, ok)


@command("Check tuned cases against float64 and eager")
def check(
    op: OP = ops.DEFAULT,
    hidden: HIDDEN = "",
    dtype: DTYPE = "",
    rows: ROWS = "",
    grid: GRID = "default",
    target: TARGET = DEFAULT,
    every_case: EVERY_CASE = False,
    log_dir: LOG_DIR = None,
    wide: WIDE = False,
    output_format: FORMAT = "table",
    as_json: JSON = False,
) -> None:
    """Check every tuned case against float64 and eager over adversarial inputs.

    Without --hidden, --dtype and --rows: every case tuned on the device, or the default grid where
    none is. What is wrong comes first, and on a terminal alone where there are many cases, unless
    --every-case is given. Exit code 1 when a case is wrong.
    """
    from lntune.backends import device_of
    from lntune.commands import check as verification
    from lntune.report.output import Output
    from lntune.report.progress import StepProgress
    from lntune.report.tables import console
    from lntune.report.verdicts import verdict_lines, verdict_table

    narrowed = bool(hidden or dtype or rows or grid != "default")
    requested = cases(op, hidden, dtype, rows, grid) if narrowed else []
    device = device_of(target)
    with dispatching(log_dir):
        if not narrowed:
            requested = verification.tuned_cases(op, device)
            if requested == list(ops.get(op).grid):
                typer.echo(
                    f"nothing is tuned here: the default knobs of {counted(len(requested), 'case')}"
                    " of the default grid are checked, some seconds each; name --hidden, --dtype"
                    " and --rows for fewer",
                    err=True,
                )
        steps = len(verification.asked_of(requested))
        with StepProgress(console(stderr=True), "check", steps) as progress:
            results = verification.check_cases(requested, device, lambda c: progress(str(c)))
    few = every_case or len(requested) <= MANY
    whole = few or output_format != "table" or not sys.stdout.isatty()
    shown = results if whole else [r for r in results if not r.ok]
    text = verdict_lines(results)
    if not whole:
        text.append("each case: the same command with --every-case")
    output = Output(results, [verdict_table(shown)] if shown else (), text, results)
    finish(output, output_format, wide, ok=all(r.ok for r in results))


@command("Build kernels for machines that have no compiler")
def build(
    op: OP = ops.DEFAULT,
    hidden: HIDDEN = "",
    dtype: DTYPE = "",
    rows: ROWS = "",
    grid: GRID = "default",
    target: Annotated[
        str,
        typer.Option(
            "--target",
            help="Devices, separated by commas: cpu, cuda, cuda:sm_90, nvidia/nvidia-h100;"
            " none need be here.",
        ),
    ] = DEFAULT,
    archs: Annotated[
        str,
        typer.Option(
            help=(
                "Architectures whose code each GPU's file holds"
                " beside that of its own: sm_100,sm_120."
            )
        ),
    ] = "",
    strided: Annotated[
        bool, typer.Option("--strided", help="The kernels that serve row-strided views.")
    ] = False,
    gpu_pass: Annotated[
        bool,
        typer.Option(
            "--gpu-pass",
            help="What part 1 of tools/gpu_pass.sh takes on GPUs, instead of an operator's.",
        ),
    ] = False,
    log_dir: LOG_DIR = None,
    wide: WIDE = False,
    output_format: FORMAT = "table",
    as_json: JSON = False,
) -> None:
    """Build the kernels that will serve calls, for machines without a compiler; GPUs need not be
    here.

    What the tuning logs choose for the devices goes into the kernel cache (LNTUNE_CACHE_DIR), where
    the first call would have put it, and is checked where its device is here; of one that is wrong
    the next choice is built, and both are said. Exit code 1 when something cannot be built.
    """
    from lntune import backends
    from lntune.architectures import architecture
    from lntune.backends import device_of
    from lntune.commands import build as prebuild
    from lntune.report import builds
    from lntune.report.output import Output
    from lntune.report.progress import StepProgress
    from lntune.report.tables import console

    devices = [device_of(name) for name in names(some("--target", target))]
    architectures = tuple(architecture(arch).name for arch in names(archs))
    if architectures and not any(backends.of(device).multi_arch for device in devices):
        got = f"{archs} beside --target {target}"
        raise InputError(got_expected("--archs", got, "a GPU's target"))
    if gpu_pass and (given := hidden or dtype or rows or archs or ("--strided" if strided else "")):
        expected = "--target alone: what it builds is its own choice"
        raise InputError(got_expected("--gpu-pass", f"{given} beside it", expected))
    with contextlib.ExitStack() as stack:
        steps: list[StepProgress] = []
        lock = threading.Lock()  # those of a pass are built by several threads

        def on_case(_: int, count: int, case: Case, device: Device) -> None:
            with lock:
                if not steps:
                    tell(f"{counted(count, 'kernel')}, about a second each that is not there yet")
                    steps.append(StepProgress(console(stderr=True), "build", count))
                    stack.enter_context(steps[0])
                steps[0](f"{case} for {device.isa}")

        if gpu_pass:
            from lntune.commands.gpu_pass import prebuild as first_pass

            built = first_pass.build(devices, on_case)
        else:
            requested = cases(op, hidden, dtype, rows, grid)
            with dispatching(log_dir):
                built = prebuild.build(requested, devices, architectures, strided, on_case)
    text = builds.lines(built, prebuild.folder(built))
    output = Output(built, [builds.table(built)], text, built)
    finish(output, output_format, wide, ok=all(kernel.status != "failed" for kernel in built))


@command("A minute's tour: tune a small grid, use it, see the report")
def demo(
    budget: Annotated[str, typer.Option(help="Time for the tuning.")] = "50s",
    log_dir: LOG_DIR = None,
    wide: WIDE = False,
    as_json: JSON = False,
) -> None:
    """Tune a small grid for this CPU, load the winners in PyTorch, check them, print the report.

    Exit code 1 when a tuned op does not agree with eager, or nothing was tuned.
    """
    from lntune.commands import demo as tour
    from lntune.report.tables import console

    length = seconds("--budget", budget)
    with using_logs(log_dir, may_be_new=True):
        result = tour.run(length, out=console(stderr=as_json), wide=wide)
    if as_json:
        print_json({"ok": result.ok, **msgspec.to_builtins(result)})
    if not result.ok:
        raise typer.Exit(1)
