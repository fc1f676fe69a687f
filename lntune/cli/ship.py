"""The command `lntune export`: kernels in a folder for other machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    WIDE,
    command,
    dispatching,
    finish,
)
from lntune.cli.parse import cases, names, some
from lntune.device import Device
from lntune.errors import InputError, got_expected


@command("Write kernels for machines with neither TVM nor a compiler")
def export(
    op: Annotated[str, typer.Argument(help="Operator; see `lntune ops`.")] = "",
    hidden: HIDDEN = "",
    dtype: DTYPE = "",
    rows: ROWS = "",
    grid: GRID = "default",
    everything: Annotated[
        bool, typer.Option("--all", help="Every case that is tuned on the targets.")
    ] = False,
    target: Annotated[
        str,
        typer.Option(
            "--target",
            help="Devices, separated by commas: cpu, cuda, cuda:sm_90, nvidia/nvidia-h100, or the"
            " folder of a device in the tuning logs; none need be here.",
        ),
    ] = DEFAULT,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder of the bundle.")
    ] = None,
    hf: Annotated[
        Path | None,
        typer.Option(
            "--hf",
            help="Also, or instead, the folder of a repository for Hugging Face's `kernels` package"
            " (layer norm on CPUs).",
        ),
    ] = None,
    training: Annotated[
        bool,
        typer.Option("--training/--inference", help="Also what only steps of training call."),
    ] = True,
    strided: Annotated[
        bool, typer.Option("--strided", help="Also kernels for row-strided views.")
    ] = False,
    log_dir: LOG_DIR = None,
    wide: WIDE = False,
    output_format: FORMAT = "table",
    as_json: JSON = False,
) -> None:
    """Write the kernels that will serve calls into a folder, with the records that chose them and
    the SHA-256 sum of each file: a bundle.

    It serves wherever LNTUNE_BUNDLE names it, or lntune.load was given it, before any tuning log;
    it takes PyTorch and a plain install of lntune there, neither TVM nor a compiler. It is written
    whole or not at all, and the same whenever it is written of the same. Exit code 1 when something
    cannot be built.
    """
    from lntune.commands import export as exporting
    from lntune.report import builds
    from lntune.report.exports import lines
    from lntune.report.output import Output
    from lntune.report.tables import console

    sizes = {"--hidden": hidden, "--dtype": dtype, "--rows": rows}
    given = [name for name, value in sizes.items() if value]
    if bool(op or given) == everything:
        got = f"--all beside {op or given[0]}" if everything else "none"
        raise InputError(got_expected("what to export", got, "an operator, or --all"))
    if output is None and hf is None:
        raise InputError(
            got_expected("--output", "none", "the folder of the bundle", "For example -o bundle.")
        )
    err = console(stderr=True)

    def on_kernel(index: int, count: int, case: Case, device: Device) -> None:
        line = f"[{index + 1}/{count}] {case} for {device.isa}"
        err.print(line, markup=False, highlight=False)

    with dispatching(log_dir):
        devices = [exporting.device_named(name) for name in names(some("--target", target))]
        asked: Mapping[Device, Sequence[Case]] = (
            {device: exporting.tuned(device) for device in devices}
            if everything
            else dict.fromkeys(devices, cases(op or ops.DEFAULT, hidden, dtype, rows, grid))
        )
        options = exporting.Options(training, strided)
        exported = exporting.export(asked, output, options, on_kernel, hf)
    shown = Output(exported, [builds.table(exported.kernels)], lines(exported), exported.kernels)
    finish(shown, output_format, wide, ok=bool(exported.sha256))
