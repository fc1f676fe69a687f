"""The command line: parses, calls, prints."""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from lntune import __version__, case, device, knobs, ops, paths, records
from lntune.case import Case
from lntune.errors import InputError, LntuneError, got_expected, unknown

if TYPE_CHECKING:
    from lntune.report.rows import Row

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Tune layer-normalization kernels for this machine, and see what came of it.",
)

OP = Annotated[str, typer.Argument(help="Operator; see `lntune ops`.")]
HIDDEN = Annotated[str, typer.Option("--hidden", help="Hidden sizes, separated by commas.")]
DTYPE = Annotated[str, typer.Option("--dtype", help="Element types: float32, float16, bfloat16.")]
ROWS = Annotated[str, typer.Option("--rows", help="Numbers of rows, separated by commas. Each stands for its row bucket.")]
JSON = Annotated[bool, typer.Option("--json", help="Print the same facts as JSON.")]
LOG_DIR = Annotated[Path | None, typer.Option("--log-dir", help="Folder of tuning logs, instead of LNTUNE_LOG_DIR or the default.")]


def main() -> None:
    """Entry point: our own errors become one line and exit code 2."""
    with contextlib.suppress(BrokenPipeError):
        try:
            app(standalone_mode=True)
        except LntuneError as e:
            if "--json" in sys.argv:
                print(msgspec.json.encode({"error": str(e), "kind": type(e).__name__}).decode())
            print(f"lntune: {e}", file=sys.stderr)
            raise SystemExit(2) from None


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    # Warnings of ours are one line; Python's form with source lines is for programmers.
    warnings.showwarning = lambda message, category, *_: print(f"warning: {message}", file=sys.stderr)


def _print_json(value: Any) -> None:
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def _integers(name: str, text: str) -> list[int]:
    """ "1,64,4096" as numbers."""
    try:
        return [int(part.replace("_", "")) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError(got_expected(name, repr(text), "integers separated by commas", f"For example {name} 768,1024.")) from None


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def seconds(name: str, text: str) -> float:
    """ "90", "300ms", "90s", "10m" or "1h" in seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|[smh]?)", text.strip())
    if not match or not float(match[1]):
        raise InputError(got_expected(name, repr(text), "a duration above 0 such as 90s, 10m or 1h"))
    return float(match[1]) * {"": 1, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}[match[2]]


def _cases(op: str, hidden: str, dtype: str, rows: str) -> list[Case]:
    """The cases asked for: the operator's default grid, narrowed or replaced along each axis that was given."""
    plan = ops.get(op)
    if not (hidden or dtype or rows):
        return list(plan.grid)
    sizes = _integers("--hidden", hidden) or list(dict.fromkeys(c.hidden for c in plan.grid))
    types = _names(dtype) or list(dict.fromkeys(c.dtype for c in plan.grid))
    counts = _integers("--rows", rows) or list(dict.fromkeys(c.rows for c in plan.grid))
    return [Case(op, h, t, r) for h in sizes for t in types for r in counts]


@contextlib.contextmanager
def _log_dir(folder: Path | None) -> Iterator[None]:
    """Everything in the block reads and writes `folder`."""
    import os

    if folder is None:
        yield
        return
    before = os.environ.get("LNTUNE_LOG_DIR")
    os.environ["LNTUNE_LOG_DIR"] = str(folder)
    try:
        yield
    finally:
        del os.environ["LNTUNE_LOG_DIR"]
        if before is not None:
            os.environ["LNTUNE_LOG_DIR"] = before


def _show_rows(rows: list[Row], title: str, details: bool) -> None:
    from lntune.report.tables import cases_table, console, summary_lines

    out = console()
    out.print(cases_table(rows, title, details))
    for line in summary_lines(rows):
        out.print(line)


@app.command("ops")
def list_ops(as_json: JSON = False) -> None:
    """List operators, their variants and their schedules."""
    from lntune import schedule

    found = [{"op": o.name, "summary": o.summary, "variants": o.variants, "schedules": list(schedule.for_op(o.name, "cpu"))} for o in ops.OPS.values()]
    if as_json:
        _print_json(found)
        return
    for entry in found:
        print(f"{entry['op']}: {entry['summary']}\n  schedules: {', '.join(entry['schedules'])}\n  variants: {', '.join(entry['variants'])}")


@app.command()
def tune(
    op: OP = "layer_norm",
    hidden: HIDDEN = "",
    dtype: DTYPE = "",
    rows: ROWS = "",
    budget: Annotated[str, typer.Option(help="Time for the whole run: 60s, 10m, 1h.")] = "60s",
    trials: Annotated[int | None, typer.Option(help="At most this many candidates per case.")] = None,
    search: Annotated[str, typer.Option(help="exhaustive, random or local.")] = "local",
    schedule: Annotated[str, typer.Option(help="Only these schedules, separated by commas.")] = "",
    seed: Annotated[int, typer.Option(help="Seed of the search and of the inputs.")] = 0,
    timeout: Annotated[str, typer.Option(help="Time one candidate may take before it is killed.")] = "30s",
    log_dir: LOG_DIR = None,
    as_json: JSON = False,
) -> None:
    """Search the schedules of an operator on this machine and log every trial.

    Without --hidden, --dtype and --rows the operator's default grid is tuned, the most valuable cases first. Each candidate
    is built and run in a process of its own, checked against float64 before it is timed, and logged at once. Ctrl-C ends
    with what was found.
    """
    from lntune.report.progress import TuningProgress
    from lntune.report.rows import rows_of
    from lntune.report.tables import console
    from lntune.tune import Settings
    from lntune.tune import tune as run

    settings = Settings(
        search=search,
        schedules=tuple(_names(schedule)),
        seconds=seconds("--budget", budget),
        trials=trials,
        seed=seed,
        log_dir=log_dir,
        timeout=seconds("--timeout", timeout),
    )
    with TuningProgress(console(stderr=as_json)) as progress:
        summary = run(_cases(op, hidden, dtype, rows), settings, progress)
    table = rows_of(summary.finals)
    facts = {
        "trials": summary.trials,
        "statuses": dict(summary.statuses),
        "seconds": round(summary.seconds, 2),
        "interrupted": summary.interrupted,
        "log_dir": str(summary.log_dir),
        "untuned": summary.untuned,
        "cases": table,
    }
    if as_json:
        _print_json(facts)
    else:
        if table:
            _show_rows(table, "tuned", details=True)
        statuses = ", ".join(f"{count} {kind}" for kind, count in sorted(summary.statuses.items())) or "none"
        print(f"{summary.trials} trials ({statuses}) in {summary.seconds:.0f} s; log in {summary.log_dir}" + (" (interrupted)" if summary.interrupted else ""))
        for name, why in summary.untuned.items():
            print(f"not tuned: {name}: {why}")
    if not table:
        raise typer.Exit(1)


@app.command()
def report(
    op: Annotated[str, typer.Argument(help="Operator; all by default.")] = "",
    log_dir: LOG_DIR = None,
    everywhere: Annotated[bool, typer.Option("--all-devices", help="Also the records of other devices.")] = False,
    as_json: JSON = False,
) -> None:
    """Show the tuning log as a table: the latest measurement of each case."""
    from lntune.report.rows import rows_of, summary

    if op:
        ops.get(op)
    with _log_dir(log_dir):
        found = records.read(paths.log_dirs(), op or None, None if everywhere else device.current())
    by_device: dict[str, list[records.Record]] = {}
    for record in found:
        by_device.setdefault(record.device.slug, []).append(record)
    tables = {slug: rows_of(records.finals(rs).values()) for slug, rs in by_device.items()}
    if as_json:
        _print_json([{"device": slug, "cases": rows, "summary": summary(rows)} for slug, rows in tables.items()])
    else:
        for slug, rows in tables.items():
            if rows:
                _show_rows(rows, slug, details=True)
    if not any(tables.values()):
        print(f"no measurements of this device in {', '.join(map(str, paths.log_dirs()))}. Run: lntune tune layer_norm", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def why(
    op: OP,
    hidden: Annotated[int, typer.Option(help="Hidden size.")],
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16; others are eager's.")] = "float32",
    rows: Annotated[int, typer.Option(help="Number of rows.")] = 1,
    log_dir: LOG_DIR = None,
    as_json: JSON = False,
) -> None:
    """Explain which kernel serves a call, and why."""
    ops.get(op)
    if dtype == "float64" or hidden > case.MAX_HIDDEN:
        what = "float64" if dtype == "float64" else f"hidden {hidden}, above {case.MAX_HIDDEN},"
        facts: dict[str, Any] = {"tier": "eager", "steps": [f"eager: {what} is not built; PyTorch serves it"], "schedule": "", "knobs": {}}
    else:
        from lntune.torch import dispatch

        with _log_dir(log_dir):
            dispatch.reload()
            facts = dispatch.describe(Case(op, hidden, dtype, rows))
            dispatch.reload()
    if as_json:
        _print_json(facts)
        return
    served = {
        "exact": "its own record",
        "bucket": "a record of another row bucket",
        "near": "the record of a nearby hidden size",
        "default": "the schedule's default knobs (not measured here)",
        "eager": "eager mode",
    }
    print(f"{op} hidden {hidden} {dtype} rows {rows}: served by {served[facts['tier']]}")
    if facts["schedule"]:
        print(f"  {facts['schedule']} {knobs.describe(facts['knobs'])}")
    for step in facts["steps"]:
        print(f"  - {step}")


@app.command()
def show(
    op: OP,
    hidden: Annotated[int, typer.Option(help="Hidden size.")],
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    rows: Annotated[int, typer.Option(help="Number of rows: picks the row bucket.")] = 512,
    form: Annotated[str, typer.Option("--as", help="te, tir, source (LLVM IR) or asm.")] = "tir",
    variant: Annotated[str, typer.Option(help="What is compiled in; see `lntune ops`.")] = "",
    schedule: Annotated[str, typer.Option(help="This schedule with its default knobs, instead of what serves the call.")] = "",
) -> None:
    """Print the kernel that serves a call: definition, scheduled loops, LLVM IR or assembly."""
    from lntune import build
    from lntune import schedule as schedules
    from lntune.torch import dispatch

    if form not in build.FORMS:
        raise unknown("form", form, build.FORMS)
    asked = Case(op, hidden, dtype, rows, ops.get(op).check_variant(variant))
    here = device.current()
    if schedule:
        plan = schedules.get(schedule, op)
        setting = plan.default(asked, here)
    else:
        choice = dispatch.choose(asked)
        if not choice.schedule:
            raise InputError(f"eager mode serves {asked} ({choice.steps[-1]}); name a --schedule to see a kernel all the same.")
        plan = schedules.get(choice.schedule, op)
        setting = knobs.from_dict(plan.knobs, dict(choice.knobs))
    print(build.show(asked, plan, setting, here, form))


@app.command()
def check(
    op: Annotated[str, typer.Argument(help="Operator.")] = "layer_norm",
    hidden: HIDDEN = "",
    dtype: DTYPE = "",
    rows: ROWS = "",
    log_dir: LOG_DIR = None,
    as_json: JSON = False,
) -> None:
    """Check every tuned case against float64 and eager over adversarial inputs; exit code 1 when one is wrong.

    Without --hidden, --dtype and --rows: every case tuned on this device, or the default grid where none is.
    """
    from lntune import verification

    with _log_dir(log_dir):
        asked = _cases(op, hidden, dtype, rows) if hidden or dtype or rows else verification.tuned_cases(op)
        results = verification.check_cases(asked)
    if as_json:
        _print_json(results)
    else:
        from lntune.report.tables import console
        from lntune.report.verdicts import verdict_table

        out = console()
        out.print(verdict_table(results))
        wrong = sum(not r.ok for r in results)
        out.print(f"{len(results)} kernels checked, {wrong} wrong" if wrong else f"{len(results)} kernels checked, all right")
    if not results or any(not r.ok for r in results):
        raise typer.Exit(1)


@app.command()
def bench(
    op: OP = "layer_norm",
    hidden: HIDDEN = "",
    dtype: DTYPE = "",
    rows: ROWS = "",
    time_per_case: Annotated[str, typer.Option("--time", help="Time per case.")] = "1s",
    with_compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Measure torch.compile too (seconds of compiling per case).")] = True,
    given_output: Annotated[bool, typer.Option("--given-output", help="Kernel against a plain copy, both into existing outputs.")] = False,
    output: Annotated[Path | None, typer.Option(help="Also write the records to this JSON file.")] = None,
    log_dir: LOG_DIR = None,
    as_json: JSON = False,
) -> None:
    """Benchmark eager, torch.compile, the tuned op and a plain copy, interleaved."""
    from lntune import bench as benchmark
    from lntune.report.rows import rows_of, summary
    from lntune.report.tables import console

    asked = _cases(op, hidden, dtype, rows)
    err = console(stderr=True)
    with _log_dir(log_dir):
        made = benchmark.run(
            asked,
            seconds("--time", time_per_case),
            with_compile,
            given_output,
            on_case=lambda i, n, c: err.print(f"[{i + 1}/{n}] {c}"),
        )
    table = rows_of(made)
    facts = {"outputs": "given" if given_output else "allocated by every call", "cases": table, "summary": summary(table), "records": made}
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(msgspec.json.format(msgspec.json.encode(facts), indent=1) + b"\n")
    if as_json:
        _print_json(facts)
        return
    title = "kernel and copy into existing outputs" if given_output else "every call allocates its output"
    _show_rows(table, title, details=True)


@app.command()
def doctor(as_json: JSON = False) -> None:
    """Look at versions, compiler, CPU, threads, GPU, folders and logs; exit code 1 when something will not work."""
    from lntune import doctor as examination

    found = examination.examine()
    failed = any(f.status == "fail" for f in found)
    if as_json:
        _print_json({"ok": not failed, "findings": found})
    else:
        from lntune.report.tables import console

        out = console()
        marks = {"ok": "[green]ok  [/green]", "warn": "[yellow]warn[/yellow]", "fail": "[red]FAIL[/red]"}
        for finding in found:
            remedy = f" -> {finding.remedy}" if finding.remedy and finding.status != "ok" else ""
            out.print(f"{marks[finding.status]} {finding.topic:16}", end="")
            out.print(f"{finding.detail}{remedy}", markup=False)
    if failed:
        raise typer.Exit(1)


@app.command()
def demo(
    budget: Annotated[str, typer.Option(help="Time for the tuning.")] = "50s",
    log_dir: LOG_DIR = None,
) -> None:
    """Tune a small grid for this CPU, load the winners in PyTorch, check them against eager and print the report."""
    from lntune import demo as tour

    with _log_dir(log_dir):
        if not tour.run(seconds("--budget", budget)):
            raise typer.Exit(1)


if __name__ == "__main__":
    main()
