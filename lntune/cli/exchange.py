"""Commands that exchange measurements with other tools and machines: export-log, import,
export-candidates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lntune import ops
from lntune.backends import DEFAULT
from lntune.case import Case
from lntune.cli.base import (
    DTYPE,
    FORMAT,
    GRID,
    HIDDEN,
    JSON,
    LOG_DIR,
    ROWS,
    command,
    finish,
    using_logs,
)
from lntune.cli.parse import cases, names
from lntune.errors import InputError, got_expected, unknown
from lntune.words import counted

FORMATS = ("t4",)


@command("Write trials for other tools, in the T4 format", name="export-log")
def export_log(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A folder of files that is not there yet.")
    ],
    logs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[LOG ...]",
            help="Tuning logs, or folders of them; by default the folder of new measurements.",
        ),
    ] = None,
    to: Annotated[str, typer.Option("--to", help="The format: t4.")] = "t4",
    log_dir: LOG_DIR = None,
    output_format: FORMAT = "table",
    as_json: JSON = False,
) -> None:
    """Write the trials of tuning logs in the T4 auto-tuning format (Kernel Tuner's): a file for
    each case, device and schedule, whose results have the knobs, times and failures.

    Finals, comparisons and benchmarks are left out: the format has no form for several contenders.
    """
    from lntune.commands import export_log as exporting
    from lntune.report.output import Output
    from lntune.system import paths

    if to not in FORMATS:
        raise unknown("--to", to, FORMATS)
    with using_logs(log_dir):
        found = exporting.as_t4(logs or [paths.log_dir()], output)
    lines = [
        f"{counted(found.trials, 'trial')} in {counted(len(found.files), 'file')} in {output}",
        *(f"left out: {counted(count, 'record')}, {role}" for role, count in found.lost.items()),
    ]
    finish(Output(found, (), lines, [{"file": name} for name in found.files]), output_format)


@command("Build candidates, to measure where no compiler is", name="export-candidates")
def export_candidates(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that is to be made.")],
    op: Annotated[str, typer.Option(help="Operator; see `lntune ops`.")] = ops.DEFAULT,
    hidden: HIDDEN = "",
    dtype: DTYPE = "",
    rows: ROWS = "",
    grid: GRID = "default",
    target: Annotated[
        str,
        typer.Option(
            help="The device: cpu (one like this), cuda:sm_90, nvidia/nvidia-h100; it need not be"
            " here."
        ),
    ] = DEFAULT,
    trials: Annotated[int, typer.Option(help="At most this many candidates per case.")] = 16,
    schedule: Annotated[str, typer.Option(help="Only these schedules, separated by commas.")] = "",
    output_format: FORMAT = "table",
    as_json: JSON = False,
) -> None:
    """Write a folder of built candidates for a machine without a compiler or network: `python
    measure.py` in it measures them there, with PyTorch and apache-tvm-ffi alone, and goes on where
    it was killed; `lntune import OUT` brings the records home.

    Exit code 1 when some candidates cannot be built.
    """
    from lntune.commands.candidates import export
    from lntune.report.output import Output
    from lntune.report.progress import StepProgress
    from lntune.report.tables import console

    requested = cases(op, hidden, dtype, rows, grid)
    count = len(requested) * trials
    with StepProgress(console(stderr=True), "build", count) as progress:
        found = export.export(
            requested, target, output, trials, names(schedule), lambda _, __, c: progress(str(c))
        )
    lines = [
        f"{counted(found.candidates, 'candidate')} of {counted(found.cases, 'case')} for"
        f" {found.target} in {found.output}, {found.bytes / 1e6:.1f} MB: copy it there, run python"
        f" measure.py in it, copy it back, and run lntune import {found.output}",
        *(f"not built: {why}" for why in found.failed),
    ]
    finish(Output(found, (), lines, [found]), output_format, ok=not found.failed)


@command("Bring measurements home: of candidates, or of T4 files", name="import")
def import_(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH ...",
            help="Folders of `lntune export-candidates`; files in the T4 format, or folders.",
        ),
    ],
    op: Annotated[
        str, typer.Option(help="What a file is of that does not say so: its operator.")
    ] = "",
    hidden: Annotated[int, typer.Option(help="Its hidden size.")] = 0,
    dtype: Annotated[str, typer.Option(help="Its element type.")] = "float32",
    rows: Annotated[int, typer.Option(help="Its number of rows.")] = 1,
    schedule: Annotated[str, typer.Option(help="Its schedule, whose knobs it has.")] = "",
    target: Annotated[
        str, typer.Option(help="Its device: cpu, cuda, or one that need not be here.")
    ] = DEFAULT,
    log_dir: LOG_DIR = None,
    output_format: FORMAT = "table",
    as_json: JSON = False,
) -> None:
    """Add to the tuning log, each record once, what was measured in folders of candidates, and the
    trials of files in the T4 auto-tuning format.

    A folder of candidates is checked: that nothing was altered since it was measured, and that
    every record is of a candidate, code and kind of device that it was built with. Files of `lntune
    export-log` say what they are of; for others options do. A configuration whose knobs the
    schedule does not take is left out, with the reason.
    """
    from lntune import schedule as schedules
    from lntune.backends import device_of
    from lntune.commands import import_log as importing
    from lntune.commands.candidates import home
    from lntune.log.t4 import Search
    from lntune.report.merged import left_out
    from lntune.report.output import Output
    from lntune.system import paths

    search = None
    if op or hidden or schedule:
        if not (op and hidden and schedule):
            raise InputError(
                got_expected("--op, --hidden, --schedule", "some of them", "all or none")
            )
        device = device_of(target)
        chosen = schedules.get(schedule, op, device.kind)
        search = Search(Case(op, hidden, dtype, rows), device, chosen.name)
    with using_logs(log_dir, may_be_new=True):
        folders = [path for path in files if home.is_folder(path)]
        others = [path for path in files if path not in folders]
        taken = [home.take(path, paths.log_dir()) for path in folders]
        if others:
            taken.append(importing.from_t4(others, paths.log_dir(), search))
        found = importing.joined(taken)
    known = f", {found.known} there before" if found.known else ""
    lines = [f"{counted(found.added, 'record')} added to {found.log}{known}"]
    finish(Output(found, (), [*lines, *left_out(found.left_out)], found.left_out), output_format)
