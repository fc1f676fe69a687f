"""The command `lntune bench`: what serves calls against everyone else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from lntune import ops
from lntune.backends import DEFAULT
from lntune.cli.base import (
    DTYPE,
    FORMAT,
    GRID,
    HIDDEN,
    JSON,
    LOG_DIR,
    OP,
    PLOT,
    ROWS,
    SEED,
    TARGET,
    WIDE,
    command,
    dispatching,
    draw,
    finish,
    tell,
)
from lntune.cli.parse import cases, seconds
from lntune.errors import InputError, got_expected

if TYPE_CHECKING:
    from lntune.case import Case


@command("Measure eager, torch.compile, the tuned op and a plain copy")
def bench(
    op: OP = ops.DEFAULT,
    hidden: HIDDEN = "",
    dtype: DTYPE = "",
    rows: ROWS = "",
    grid: GRID = "default",
    time_per_case: Annotated[str, typer.Option("--time", help="Time per case.")] = "1s",
    with_compile: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile",
            help="Measure torch.compile too (seconds of compiling per case).",
        ),
    ] = True,
    given_output: Annotated[
        bool,
        typer.Option(
            "--given-output", help="Kernel against a plain copy, both into existing outputs."
        ),
    ] = False,
    strided: Annotated[
        bool,
        typer.Option(
            "--strided", help="Inputs whose rows are halves of wider rows, as in x[:, :1024]."
        ),
    ] = False,
    page_faults: Annotated[
        bool,
        typer.Option(
            "--page-faults",
            help=(
                "Let the C library return large outputs to the system at once,"
                " as it does by default."
            ),
        ),
    ] = False,
    training: Annotated[
        bool,
        typer.Option(
            "--training",
            help="Forward and backward of the modules, as a training step runs them, instead.",
        ),
    ] = False,
    call_cost: Annotated[
        bool,
        typer.Option(
            "--call-cost",
            help=(
                "What one row costs from Python, and how long loading and importing take, instead."
            ),
        ),
    ] = False,
    seed: SEED = 0,
    output: Annotated[
        Path | None,
        typer.Option(help="Also write facts and records to this JSON file, for `lntune compare`."),
    ] = None,
    plot: PLOT = None,
    target: TARGET = DEFAULT,
    log_dir: LOG_DIR = None,
    wide: WIDE = False,
    output_format: FORMAT = "table",
    as_json: JSON = False,
) -> None:
    """Benchmark eager, torch.compile, the tuned op and a plain copy, interleaved.

    Everyone allocates an output at every call, from a heap that is kept: by default the C library
    takes outputs above 32 MB or so from the system and gives them back at every call, and the page
    faults of that cost more than any kernel. A case measured while others used the machine is
    measured up to three times; what stays busy is marked. On a GPU (--target cuda) the inputs are
    not in its cache, launches are recorded as a graph, Liger-Kernel's and Triton's layer norm are
    measured too where they are installed, and the table has the share of what a large plain copy
    reaches on the card.

    With --training it is `torch.nn.LayerNorm`, that compiled, and `lntune.LayerNorm` that are
    measured: the forward while gradients are recorded, and forward and backward, by autograd.

    --output is written after every case; Ctrl-C ends with the cases that are done.
    """
    from lntune.backends import device_of
    from lntune.commands import bench as benchmark
    from lntune.report import plots
    from lntune.report.output import Output
    from lntune.report.overview import result_tables
    from lntune.report.rows import peer_lines, rows_of, summary
    from lntune.report.tables import console

    length = seconds("--time", time_per_case)
    _write(output)
    if plot is not None:
        plots.check(plot)
    if strided and (given_output or call_cost):
        got = f"{'--given-output' if given_output else '--call-cost'} beside it"
        raise InputError(got_expected("--strided", got, "neither --given-output nor --call-cost"))
    if training:
        options = (
            ("--strided", strided),
            ("--given-output", given_output),
            ("--call-cost", call_cost),
            (f"--target {target}", target != DEFAULT),
        )
        if conflicts := [name for name, is_set in options if is_set]:
            expected = "neither that nor another kind of benchmark"
            raise InputError(got_expected("--training", f"{conflicts[0]} beside it", expected))
        requested = cases(op, hidden, dtype, rows, grid)
        _training(requested, length, with_compile, seed, output, plot, log_dir, wide, output_format)
        return
    if call_cost:
        if target != DEFAULT:
            got = f"--target {target} beside it"
            remedy = "It measures calls on the CPU."
            raise InputError(got_expected("--call-cost", got, "cpu", remedy))
        if plot is not None:
            expected = "no plot of it: it measures one row alone"
            raise InputError(got_expected("--call-cost", f"--plot {plot} beside it", expected))
        if given_output or rows not in ("", "1"):
            got = f"{'--given-output' if given_output else f'--rows {rows}'} beside it"
            remedy = "It measures calls of one row that allocate their output."
            raise InputError(got_expected("--call-cost", got, "neither", remedy))
        _call_cost(op, hidden, dtype, length, output, log_dir, wide, output_format)
        return
    requested = cases(op, hidden, dtype, rows, grid)
    err = console(stderr=True)

    def facts_of(result: benchmark.Result) -> dict[str, Any]:
        table = rows_of(result.records)
        facts: dict[str, Any] = {
            "outputs": result.outputs,
            "cases": table,
            "summary": summary(table),
            "records": result.records,
        }
        return facts if result.bandwidth is None else {**facts, "copy_bandwidth": result.bandwidth}

    with dispatching(log_dir):
        result = benchmark.run(
            requested,
            length,
            with_compile,
            given_output,
            page_faults=page_faults,
            seed=seed,
            on_case=lambda i, n, c: err.print(f"[{i + 1}/{n}] {c}", markup=False),
            device=device_of(target),
            on_result=lambda sofar: _write(output, facts_of(sofar)),
            strided=strided,
        )
    table = rows_of(result.records)
    shown = result_tables(table, f"outputs {result.outputs}", result.bandwidth)
    peers = peer_lines(result.records)
    finish(Output(facts_of(result), shown, peers, table), output_format, wide)
    _say_where(output)
    draw(plot, result.records)


def _training(
    requested: list[Case],
    length: float,
    with_compile: bool,
    seed: int,
    output: Path | None,
    plot: Path | None,
    log_dir: Path | None,
    wide: bool,
    output_format: str,
) -> None:
    from lntune.commands.bench import training
    from lntune.log.records import Record
    from lntune.report.output import Output
    from lntune.report.tables import console
    from lntune.report.training import facts, steps_lines, steps_of, steps_table

    err = console(stderr=True)

    def facts_of(records: list[Record]) -> dict[str, Any]:
        steps = steps_of(records)
        return {"cases": steps, "summary": facts(steps), "records": records}

    def on_case(index: int, count: int, case: Case) -> None:
        err.print(f"[{index + 1}/{count}] {case}", markup=False)

    with dispatching(log_dir):
        records = training.run(
            requested,
            length,
            with_compile,
            seed,
            on_case,
            lambda sofar: _write(output, facts_of(sofar)),
        )
    steps = steps_of(records)
    printed = Output(facts_of(records), [steps_table(steps)], steps_lines(steps), steps)
    finish(printed, output_format, wide)
    _say_where(output)
    draw(plot, records)


def _call_cost(
    op: str,
    hidden: str,
    dtype: str,
    length: float,
    output: Path | None,
    log_dir: Path | None,
    wide: bool,
    output_format: str,
) -> None:
    from lntune.commands.bench import call_cost
    from lntune.report.costs import costs_lines, costs_table
    from lntune.report.output import Output

    requested = cases(op, hidden or "1024", dtype or "float32", "1")
    with dispatching(log_dir):
        costs = [call_cost.measure(case, length) for case in requested]
    _write(output, costs)
    finish(Output(costs, [costs_table(costs)], costs_lines(costs), costs), output_format, wide)
    _say_where(output)


def _say_where(output: Path | None) -> None:
    """Name the file that was written, on standard error."""
    if output is not None:
        tell(f"The figures are in {output}.")


def _write(output: Path | None, facts: Any = None) -> None:
    """Write facts to the file asked for; without facts only find out that it can be written."""
    if output is None:
        return
    text = b""
    if facts is not None:
        text = msgspec.json.format(msgspec.json.encode(facts), indent=1) + b"\n"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("ab" if facts is None else "wb") as file:
            file.write(text)
    except OSError as e:
        expected, reason = "a file that can be written", e.strerror or str(e)
        raise InputError(got_expected("--output", output, expected, reason)) from e
