"""Inspected GPU kernels as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lntune.backends.cuda.model import NOTE
from lntune.report.columns import Column, Table, key
from lntune.report.tables import ROW_STRIDED, percent, plan_text
from lntune.words import counted

if TYPE_CHECKING:
    from lntune.backends.cuda import Inspection
    from lntune.commands.inspect import Inspected, RowWork


def widths(counts: dict[int, int]) -> str:
    """Accesses by their width: "6x128 1x32", in bits."""
    return (
        " ".join(f"{count}x{bits}" for bits, count in sorted(counts.items(), reverse=True)) or "-"
    )


def times(moved: dict[str, float]) -> str:
    """How often matrices are moved: "x 1, dy 1"."""
    return ", ".join(f"{name} {count:.3g}" for name, count in moved.items()) or "-"


def table(inspected: Sequence[Inspected]) -> Table:
    """A row for each kernel, which is told by what it writes where a program has several."""
    several = any(len(program.kernels) > 1 for program in inspected)
    columns = [
        *key("op", "dtype", "arch"),
        Column("hidden"),
        *([Column("writes", right=False)] if several else []),
        Column("registers"),
        Column("spill"),
        Column("stack", 3),
        Column("shared", 5),
        Column("occupancy", 2),
        Column("loads", 6, False),
        Column("stores", 7, False),
        Column("read", 8, False),
        Column("written", 9, False),
        Column("beyond least", 4),
        Column("between", 12),
        Column("elements", 11),
        Column("accesses", 12),
        Column("instructions", 13),
        Column("barriers", 14),
        Column("divergent", 15),
        Column("blocks", 16),
        Column("waves", 17),
        Column(NOTE, 1),
        Column("schedule and knobs", 10, False, shared=True),
    ]
    rows = Table("compiled, not run on a device", columns)
    for program in inspected:
        works = program.work or (None,) * len(program.kernels)
        for number, (k, work) in enumerate(zip(program.kernels, works, strict=True)):
            r = k.resources
            used = (
                r.registers,
                r.spilled_bytes,
                r.stack_bytes,
                r.shared_bytes + k.dynamic_shared,
            )
            moves = (
                widths(k.code.global_loads),
                widths(k.code.global_stores),
                times(program.read),
                times(program.written),
            )
            shares = (
                f"{100 * program.extra:.1f}%",
                f"{100 * program.between:.1f}%" if program.between else "-",
            )
            case = [program.case.op, program.case.dtype, program.arch, str(program.case.hidden)]
            if several:
                case.append(", ".join(work.writes) if work and work.writes else "partial sums")
            what = plan_text(program.schedule, program.knobs, program.strided)
            passed = _passed(k, work)
            share = _model(program) if not number else "-"
            occupied = percent(k.occupancy.share)
            rows.add(*case, *map(str, used), occupied, *moves, *shares, *passed, share, what)
    return rows


def _passed(kernel: Inspection, work: RowWork | None) -> list[str]:
    """The cells of what a kernel does for the case's rows."""
    divergent = kernel.code.divergent_shuffles
    if work is None:
        return ["-"] * 7
    return [
        str(work.elements or "-"),
        str(work.accesses),
        str(work.instructions),
        str(work.barriers),
        "-" if divergent is None else str(divergent),
        str(work.blocks),
        f"{work.waves:.3g}",
    ]


def _model(program: Inspected) -> str:
    """The cell of the model's share."""
    predicted = program.predicted
    return f"{percent(predicted.share)} {predicted.bound}" if predicted else "-"


def lines(inspected: Sequence[Inspected]) -> list[str]:
    """What is wrong, and where the widths come from."""
    origins = {k.code.origin for program in inspected for k in program.kernels}
    text = [
        f"widths in bits, counted in the code ({', '.join(sorted(origins))}); reads and writes"
        " counted by running 8 rows or so in the emulator"
    ]
    if any(program.work for program in inspected):
        text.append(
            "elements of a thread; accesses, instructions and barriers of a warp for a row, or for"
            " the rows that share a block; divergent: shuffles that part of a warp may reach alone"
            " (only machine code tells); blocks, and waves of them, for the case's rows"
        )
        text.append(
            f"{NOTE}: the share of a copy's bandwidth that a model of the kernels predicts, and"
            " what bounds it"
        )
    if any(program.between for program in inspected):
        text.append(
            "between: what the kernels of a program write and read for each other, as a share of"
            " the least for the case's rows"
        )
    bad = [
        f"{program.case} {program.arch}{ROW_STRIDED if program.strided else ''}:"
        f" {'; '.join(program.problems)}"
        for program in inspected
        if program.problems
    ]
    none = "no problems: no spills, no stack, nothing moved twice"
    number = sum(len(program.kernels) for program in inspected)
    return [*text, *(bad or [f"{counted(number, 'kernel')}, {none}"])]
