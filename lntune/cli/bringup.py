"""The command `lntune bringup`: the first minutes with a new device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lntune.cli.base import (
    FORMAT,
    JSON,
    LOG_DIR,
    SEED,
    WIDE,
    command,
    finish,
    using_logs,
)
from lntune.cli.parse import names, seconds


@command("All a new device needs: checks, tuning, a benchmark")
def bringup(
    budget: Annotated[str, typer.Option(help="Time for the whole run: 60s, 10m, 1h.")] = "10m",
    target: Annotated[
        str,
        typer.Option(help="cpu, cuda or cuda:1. By default the GPU if there is one, else the CPU."),
    ] = "",
    operators: Annotated[
        str,
        typer.Option("--ops", help="Only these operators, separated by commas; see `lntune ops`."),
    ] = "",
    grid: Annotated[
        str,
        typer.Option(
            "--grid", help="default, or small: one small case of each operator, for trying out."
        ),
    ] = "default",
    trials: Annotated[
        int | None,
        typer.Option(
            help="At most this many candidates per case, for trying out: nothing is tuned again."
        ),
    ] = None,
    with_compile: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile",
            help="Measure torch.compile too (seconds of compiling per case).",
        ),
    ] = True,
    seed: SEED = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            help=(
                "Folder for summary.txt and summary.json, written after every stage and at the end."
            )
        ),
    ] = None,
    log_dir: LOG_DIR = None,
    wide: WIDE = False,
    output_format: FORMAT = "table",
    as_json: JSON = False,
) -> None:
    """Bring up a device: doctor, smoke check, tuning in order of value, verification, benchmark,
    one summary.

    Every measurement is in the log at once. Killed at any moment, the same command goes on: what
    the log has of this device and of today's schedules is not tuned again before everything else
    is. Exit code 0 when the smoke check passed, something is tuned and nothing that serves calls is
    wrong, else 1.
    """
    from lntune.commands import bringup as first_minutes
    from lntune.report import bringup as report
    from lntune.report.tables import console

    length, only = seconds("--budget", budget), tuple(names(operators))
    settings = first_minutes.Settings(
        length, target, only, grid, trials, with_compile, seed, output
    )
    with using_logs(log_dir, may_be_new=True):
        outcome = first_minutes.run(settings, console(stderr=output_format != "table"))
    finish(report.output(outcome), output_format, wide, outcome.ok)
