"""Commands that change nothing: operators, what serves a call and why, its code, the state of the
machine.
"""

from __future__ import annotations

import shutil
import sys
from typing import Annotated, Any

import msgspec
import typer

from lntune import knobs, ops
from lntune.backends import DEFAULT
from lntune.case import Case
from lntune.cli.base import (
    DTYPE,
    FORMAT,
    HIDDEN,
    JSON,
    LOG_DIR,
    OP,
    WIDE,
    command,
    dispatching,
    finish,
    print_json,
    using_logs,
)
from lntune.cli.parse import grids, integers, names, some
from lntune.compare.run import Options
from lntune.errors import InputError, got_expected, unknown
from lntune.ops import models
from lntune.words import counted


@command("List operators, their variants and their schedules", name="ops")
def list_ops(
    op: Annotated[
        str, typer.Argument(help="One operator, with its variants; all of them by default.")
    ] = "",
    output_format: FORMAT = "table",
    as_json: JSON = False,
) -> None:
    """List operators in a line each; with the name of one its schedules for CPUs and for GPUs, and
    its variants: what may be compiled in beside the shape (`lntune show --variant`); and the grids
    of hidden sizes that `--grid` takes, with where they are from.

    --json has all of this of every operator.
    """
    from lntune import schedule
    from lntune.report.columns import Column, Table, key, whole
    from lntune.report.output import Line, Output

    chosen = [ops.get(op)] if op else list(ops.OPS.values())
    operators = [
        {
            "op": o.name,
            "summary": o.summary,
            "variants": o.variants,
            "schedules": list(schedule.for_op(o.name, "cpu")),
            "gpu_schedules": list(schedule.for_op(o.name, "gpu")),
            "grids": grids(o.name),
        }
        for o in chosen
    ]
    if not op:
        table = Table("", [*key("operator"), Column("what it computes", right=False)])
        for o in chosen:
            table.add(o.name, o.summary)
        table.notes = [f"{whole('lntune ops NAME')} has the schedules, variants and grids of one"]
        finish(Output(operators, [table], (), operators), output_format)
        return
    lines: list[Line] = []
    for o in chosen:
        lines.append((f"{o.name}: ", o.summary))
        for kind, lead in (("cpu", "schedules"), ("gpu", "on GPUs")):
            lines.append((f"  {lead}: ", ", ".join(schedule.for_op(o.name, kind)) or "none"))
        lines.append(("  cases: ", f"{counted(len(o.grid), 'case')} in the default grid"))
        lines.append(("  variants: ", ", ".join(o.variants)))
        lines.append(("  tuned by: ", whole(f"lntune tune {o.name}")))
        for name in grids(o.name):
            if (family := models.FAMILIES.get(name)) is not None:
                sizes = ", ".join(map(str, family.hidden))
                lines.append((f"  --grid {name}: ", f"{family.summary}: {sizes} ({family.source})"))
    finish(Output(operators, (), lines, operators), output_format)


@command("Which kernel serves a call, and why")
def why(
    op: OP,
    hidden: Annotated[int, typer.Option(help="Hidden size.")],
    dtype: Annotated[
        str, typer.Option(help="float32, float16 or bfloat16; float64 is eager's.")
    ] = "float32",
    rows: Annotated[int, typer.Option(help="Number of rows.")] = 1,
    target: Annotated[
        str,
        typer.Option(
            help="cpu; cuda (the GPU that is here); one that need not be: cuda:sm_90,"
            " nvidia/nvidia-h100, emulated:sm_90."
        ),
    ] = DEFAULT,
    every: Annotated[
        bool,
        typer.Option("--all", help="Also each device whose records are not used, and why."),
    ] = False,
    log_dir: LOG_DIR = None,
    output_format: FORMAT = "table",
    as_json: JSON = False,
) -> None:
    """Explain which kernel serves a call, and why, and what checks on this machine found of other
    kernels of these sizes: for other variants (`lntune ops NAME`), for rows that lie apart. It ends
    with the command that tunes the case or measures it again, where that is of use.
    """
    from lntune.report.columns import whole
    from lntune.report.output import Output

    with dispatching(log_dir):
        from lntune.torch.explanation import explain

        explanation = explain(op, hidden, dtype, rows, target)
    told = explanation.told(every)
    lines = [(lead, whole(text) if text == explanation.command else text) for lead, text in told]
    finish(Output(explanation, (), lines, [explanation]), output_format)


@command("Print a kernel: definition, loops, source or assembly")
def show(
    op: OP,
    hidden: Annotated[int, typer.Option(help="Hidden size.")],
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    rows: Annotated[int, typer.Option(help="Number of rows: picks the row bucket.")] = 512,
    form: Annotated[
        str,
        typer.Option("--as", help="te, tir, source (LLVM IR; CUDA C++) or asm (PTX for a GPU)."),
    ] = "tir",
    variant: Annotated[str, typer.Option(help="What is compiled in; see `lntune ops NAME`.")] = "",
    schedule: Annotated[
        str,
        typer.Option(help="This schedule with its default knobs, instead of what serves the call."),
    ] = "",
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="A B",
            help="What differs in the code of A and B: schedules, with knobs"
            " (cached_rows:lanes=4,unroll=2) or without, default, tuned.",
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            help="cpu; cuda (the GPU that is here); one that need not be: cuda:sm_90,"
            " nvidia/nvidia-h100, emulated:sm_90."
        ),
    ] = DEFAULT,
    full: Annotated[
        bool,
        typer.Option("--full", help="With the headers and types before a GPU kernel's source."),
    ] = False,
    log_dir: LOG_DIR = None,
    as_json: JSON = False,
) -> None:
    """Print the kernel that serves a call: definition, scheduled loops, source or assembly.

    With --json the text is whole. --diff shows two schedules or settings side by side where both
    fit the terminal, else as a unified diff; a schedule's knobs that are not given are the best
    that were measured, else the default ones.
    """
    from lntune import schedule as schedules
    from lntune.backends import device_of
    from lntune.kernels import compiler

    if form not in compiler.FORMS:
        raise unknown("form", form, compiler.FORMS)
    if rows < 1:
        remedy = "PyTorch serves an empty batch."
        raise InputError(got_expected("--rows", rows, "1 or more", remedy))
    case = Case(op, hidden, dtype, rows, ops.get(op).check_variant(variant))
    device = device_of(target)
    if diff:
        if schedule:
            raise InputError(got_expected("--schedule", f"{schedule} beside --diff", "one of them"))
        _diff(*diff, case, form, Options(target, log_dir), as_json, full)
        return
    if schedule:
        chosen = schedules.get(schedule, op, device.kind)
        if chosen.kind != device.kind:
            raise InputError(
                f"--schedule: {schedule} is for a {chosen.kind}, expected one for the target"
                f" {target}, a {device.kind}."
            )
        setting = chosen.untuned(case, device)
    else:
        with dispatching(log_dir) as dispatch:
            choice = dispatch.choose(case, device)
        if not choice.schedule:
            raise InputError(
                f"eager mode serves {case} ({choice.steps[-1]});"
                " name a --schedule to see a kernel all the same."
            )
        chosen, setting = schedules.resolve(choice.schedule, op, choice.knobs)
    text = compiler.show(case, chosen, setting, device, form)
    if as_json:
        facts = {"case": case, "schedule": chosen.name, "knobs": knobs.to_dict(setting)}
        print_json({**facts, "form": form, "text": text})
    else:
        print(text if full else compiler.without_prelude(text))


def _diff(
    a: str, b: str, case: Case, form: str, options: Options, as_json: bool, full: bool
) -> None:
    """Print what differs in the code of two sides."""
    from lntune.commands import show as showing
    from lntune.kernels import compiler
    from lntune.report import diffs

    with using_logs(options.log_dir):
        one, other = (showing.code(name, case, options, form) for name in (a, b))
    names = f"{a} ({knobs.describe(one.knobs)})", f"{b} ({knobs.describe(other.knobs)})"
    if as_json:
        difference = diffs.unified(one.text, other.text, names)
        print_json({"case": case, "form": form, "a": one, "b": other, "diff": difference})
        return
    texts = [c.text if full else compiler.without_prelude(c.text) for c in (one, other)]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    beside = diffs.side_by_side(texts[0], texts[1], names, width)
    lines = diffs.unified(texts[0], texts[1], names) if beside is None else beside
    print("\n".join(lines) if texts[0] != texts[1] else f"{names[0]} and {names[1]} are the same")


@command("Registers, spills, occupancy and traffic of a GPU's kernels")
def inspect(
    op: OP = ops.DEFAULT,
    target: Annotated[
        str,
        typer.Option(
            help="GPUs, separated by commas: cuda:sm_90, nvidia/nvidia-h100; none need be here."
        ),
    ] = "cuda:sm_90",
    hidden: HIDDEN = "1024,4096,8192,12288",
    dtype: DTYPE = "float32,float16,bfloat16",
    rows: Annotated[int, typer.Option(help="Number of rows: picks the row bucket.")] = 4096,
    variant: Annotated[str, typer.Option(help="What is compiled in; see `lntune ops NAME`.")] = "",
    schedule: Annotated[
        str, typer.Option(help="This schedule, instead of the operator's first.")
    ] = "",
    strided: Annotated[
        bool, typer.Option("--strided", help="The kernels that serve row-strided views.")
    ] = False,
    knob: Annotated[
        list[str] | None,
        typer.Option(
            "--knob",
            metavar="NAME=VALUE",
            help="This value of a knob, instead of the default one; may be given several times. A"
            " switch's name alone puts it on.",
        ),
    ] = None,
    wide: WIDE = False,
    output_format: FORMAT = "table",
    as_json: JSON = False,
) -> None:
    """Compile kernels for GPUs, default knobs unless others are given, and show registers, spills,
    occupancy, widths of accesses and bytes moved.

    Needs a CUDA compiler and no GPU. Exit code 1 when a kernel spills, has a stack frame, cannot be
    launched, or moves something twice.
    """
    from lntune import backends
    from lntune import schedule as schedules
    from lntune.backends import device_of
    from lntune.commands import inspect as inspection
    from lntune.report import inspections
    from lntune.report.output import Output
    from lntune.report.tables import console

    devices = [device_of(name) for name in names(some("--target", target))]
    kind = devices[0].kind
    chosen = schedules.get(schedule, op, kind) if schedule else _first(op, kind)
    if chosen.kind != kind or not all(backends.of(device).inspects for device in devices):
        raise InputError(
            f"inspect: got schedule {chosen.name} and target {target}, expected a GPU's; `lntune"
            " show --as asm` is for CPUs."
        )
    checked = ops.get(op).check_variant(variant)
    sizes, types = integers("--hidden", some("--hidden", hidden)), names(some("--dtype", dtype))
    todo = [(Case(op, h, d, rows, checked), g) for g in devices for h in sizes for d in types]
    # all of them before anything is compiled, which takes seconds each
    settings = [inspection.setting(case, chosen, knob or (), g, strided) for case, g in todo]
    err = console(stderr=True)
    kernels = []
    for number, ((case, gpu), setting) in enumerate(zip(todo, settings, strict=True), 1):
        err.print(f"[{number}/{len(todo)}] {case} for {gpu.isa}", markup=False, highlight=False)
        kernels.append(inspection.inspect_case(case, chosen, setting, gpu, strided))
    facts = [{**msgspec.to_builtins(k), "problems": k.problems} for k in kernels]
    output = Output(facts, [inspections.table(kernels)], inspections.lines(kernels), facts)
    finish(output, output_format, wide, ok=not any(kernel.problems for kernel in kernels))


def _first(op: str, kind: str) -> Any:
    """The operator's first schedule for a kind of device."""
    from lntune import schedule as schedules

    ops.get(op)
    if of_kind := schedules.for_op(op, kind):
        return next(iter(of_kind.values()))
    others = ", ".join(name for name in ops.OPS if schedules.for_op(name, kind))
    raise InputError(f"op: {op} has no schedule for a {kind} yet, expected one that has: {others}.")


@command("Look at versions, compiler, CPU, GPU, folders and logs")
def doctor(output_format: FORMAT = "table", as_json: JSON = False) -> None:
    """Look at versions, compiler, CPU, threads, GPU, folders and logs.

    Exit code 1 when something will not work.
    """
    from lntune.commands import doctor as examination
    from lntune.report.findings import lines
    from lntune.report.output import Output

    findings = examination.examine()
    ok = not any(f.status == "fail" for f in findings)
    facts = {"ok": ok, "findings": findings}
    finish(Output(facts, (), lines(findings), findings), output_format, ok=ok)
