"""The command `lntune report`: what tuning logs say."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from lntune import ops
from lntune.backends import DEFAULT
from lntune.cli.base import (
    DTYPE,
    EVERY_CASE,
    FORMAT,
    HIDDEN,
    JSON,
    LOG_DIR,
    MANY,
    PLOT,
    ROWS,
    WIDE,
    command,
    command_line,
    finish,
    tell,
    using_logs,
)
from lntune.cli.parse import integers, names
from lntune.device import Device
from lntune.errors import InputError, got_expected
from lntune.log import cases as recorded
from lntune.log import records
from lntune.log.wanted import Wanted
from lntune.system import paths
from lntune.words import counted


@command("What is tuned, how fast, and against whom, as a table")
def report(
    op: Annotated[str, typer.Argument(help="Operator; all by default.")] = "",
    hidden: HIDDEN = "",
    dtype: DTYPE = "",
    rows: ROWS = "",
    log_dir: LOG_DIR = None,
    device: Annotated[
        str,
        typer.Option(
            "--device", help="Devices whose folder has this in its name, instead of this machine's."
        ),
    ] = "",
    everywhere: Annotated[
        bool, typer.Option("--all-devices", help="Also the records of other devices.")
    ] = False,
    target: Annotated[
        str, typer.Option(help="Whose records: cpu, or a GPU that is here: cuda, cuda:1.")
    ] = DEFAULT,
    cases_file: Annotated[
        Path | None,
        typer.Option(
            "--cases",
            metavar="FILE",
            help="How the cases are served that a program was recorded to use"
            " (lntune.record_cases or LNTUNE_RECORD_CASES), and what tuning them gains.",
        ),
    ] = None,
    every_case: EVERY_CASE = False,
    knobs: Annotated[
        bool, typer.Option("--knobs", help="The knobs of each case, on a line below it.")
    ] = False,
    cold: Annotated[
        bool,
        typer.Option(
            "--cold",
            help="Figures of a cold cache, of the cases that were measured with one, too.",
        ),
    ] = False,
    history: Annotated[
        bool,
        typer.Option(
            "--history", help="How cases went from run to run, and where they became faster."
        ),
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(help="Write a page with charts and every record to this file, too."),
    ] = None,
    plot: PLOT = None,
    wide: WIDE = False,
    output_format: FORMAT = "table",
    as_json: JSON = False,
) -> None:
    """Show what the tuning log comes to by operator and dtype, then a line for each case: the
    measurement that serves it, with a bar for how many times as fast as eager mode it is.

    On a terminal the lines are left out where there are many and none are asked for by an operator,
    a size or --every-case. What is missing of the default grid or has to be measured again is
    counted, with the command that does it. --history follows how many times as fast as eager mode
    cases are (which leaves out how fast the machine was) and names the steps that are certain.

    --cases FILE shows what a recorded program uses instead, those cases with the most time first:
    what serves each, how many times as fast that was measured, and what tuning is known to save.

    Exit code 1 when there is no measurement.
    """
    from lntune import schedule
    from lntune.backends import device_of
    from lntune.report import called, histories, plots, surveyed
    from lntune.report.output import Output
    from lntune.report.survey import surveys

    if device and target != DEFAULT:
        raise InputError(got_expected("--device", f"{device} beside --target {target}", "one"))
    if history and (html or plot or output_format == "html"):
        beside = f"{'a plot' if plot else 'a page'} beside it"
        raise InputError(got_expected("--history", beside, "one of the two"))
    if cold and (history or html or plot or output_format == "html"):
        raise InputError(got_expected("--cold", "a history, page or plot beside it", "a table"))
    others = {
        "--history": history,
        "--html": html,
        "--plot": plot,
        "--cold": cold,
        "--knobs": knobs,
        "--all-devices": everywhere,
        "--device": device,
        "--format html": output_format == "html",
    }
    if cases_file and (given := [name for name, value in others.items() if value]):
        raise InputError(got_expected("--cases", f"{given[0]} beside it", "one of the two"))
    if plot:
        plots.check(plot)
    wanted = Wanted.of(
        op, integers("--hidden", hidden), names(dtype), integers("--rows", rows), device
    )
    owner = None if everywhere or device else device_of(target)
    again = command_line(
        "report",
        [op] if op else [],
        {
            "--hidden": hidden,
            "--dtype": dtype,
            "--rows": rows,
            "--device": device,
            "--all-devices": everywhere,
            "--target": "" if target == DEFAULT else target,
            "--log-dir": str(log_dir or ""),
            "--history": history,
            "--every-case": every_case,
            "--cases": str(cases_file or ""),
            "--knobs": knobs,
            "--cold": cold,
        },
    )
    with using_logs(log_dir):
        folders = paths.log_dirs()
        schedules = schedule.all_schedules()
        if cases_file is not None:
            tallies = recorded.asked(recorded.read(cases_file), wanted)
            finish(
                called.of_file(cases_file, tallies, folders, schedules, again), output_format, wide
            )
            return
        if history:
            output = histories.of_logs(folders, wanted, owner, again)
        else:
            found = surveys(folders, wanted, owner, schedules, cold)
            few = sum(len(one.cases) for one in found) <= MANY
            asked = every_case or knobs or wanted.narrowed or output_format != "table"
            shown = asked or few or not sys.stdout.isatty()
            output = surveyed.output(found, again, shown, knobs, cold)

        def page() -> str:
            from lntune.report.page import write

            command = f"{again} --html {shlex.quote(str(html or 'report.html'))}"
            return write.of_logs(folders, schedules, command, wanted, owner)

        if html:
            from lntune.report.page.write import save

            save(html, page())
            tell(f"The page is in {html}.")
        if plot and output.records:
            plots.of_logs(folders, schedules, plot, wanted, owner)
            tell(f"The plot is in {plot}.")
        if not output.records:
            output = Output(output.facts, (), _failed(folders, wanted, owner))
            _tell_nothing(wanted, owner, target, folders, cold)
    finish(dataclasses.replace(output, page=page), output_format, wide, ok=bool(output.records))


def _tell_nothing(
    wanted: Wanted, owner: Device | None, target: str, folders: Sequence[Path], cold: bool
) -> None:
    """Say that there is no measurement, and how there will be one."""
    from lntune.report.columns import whole

    is_here = not wanted.device and (owner is None or _is_here(owner))
    whose = "any device" if owner is None else "this device" if target == DEFAULT else target
    if wanted.device:
        whose = f"devices with {wanted.device!r} in their names"
    run = "Run" if is_here else "Run where it is"
    where = target if is_here or wanted.device else "cuda"
    sizes = {
        "--hidden": wanted.hidden,
        "--dtype": wanted.dtypes,
        "--rows": wanted.rows,
        "--target": () if where == DEFAULT else (where,),
    }
    options = "".join(f" {name} {','.join(map(str, v))}" for name, v in sizes.items() if v)
    what = (" with a cold cache" if cold else "") + (
        " of what is asked for" if wanted.narrowed else ""
    )
    tell(
        f"no measurements{what} of {whose} in {', '.join(map(whole, folders))}."
        f" {run}: lntune tune {wanted.op or ops.DEFAULT}{options}"
    )


def _failed(folders: Sequence[Path], wanted: Wanted, device: Device | None) -> list[str]:
    """What the log holds where it holds no measurement that counts: trials, and why they failed."""
    from lntune.report.failures import Failures, lines

    read, failures = records.read(folders, wanted.op, device, role="trial"), Failures()
    trials = [trial for trial in read if wanted.takes(trial.case)]
    if not trials:
        return []
    for trial in trials:
        if trial.status != "ok":
            failures.add(trial.status, trial.message)
    count = f"{counted(len(trials), 'trial')}, none of which has won a case"
    return [count, *lines(failures.reasons())]


def _is_here(device: Device) -> bool:
    """Whether a device is of this machine."""
    from lntune import backends

    try:
        backends.of(device).torch_device(device)
    except InputError:
        return False
    return True
