"""Commands that exchange measurements with other tools: export-log, import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lntune.backends import DEFAULT
from lntune.case import Case
from lntune.cli.base import FORMAT, JSON, LOG_DIR, command, finish, using_logs
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


@command("Add trials that other tools wrote to the log", name="import")
def import_(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE ...",
            help="Files in the T4 format, or folders of them.",
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
    """Add the trials of files in the T4 auto-tuning format to the tuning log, each once.

    Files of `lntune export-log` say what they are of; for others options do. A configuration whose
    knobs the schedule does not take is left out, with the reason.
    """
    from lntune import schedule as schedules
    from lntune.backends import device_of
    from lntune.commands import import_log as importing
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
        found = importing.from_t4(files, paths.log_dir(), search)
    known = f", {found.known} there before" if found.known else ""
    lines = [f"{counted(found.added, 'record')} added to {found.log}{known}"]
    finish(Output(found, (), [*lines, *left_out(found.left_out)], found.left_out), output_format)
