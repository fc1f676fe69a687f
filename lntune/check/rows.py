"""Every number of rows, one after another: what a kernel makes of the last rows, which are as many
as its blocks leave over, is right for all of them.

A row's outputs hardly ever depend on how many rows there are, so most are compared bit by bit with
those of the call with all rows, and only others with what is right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from lntune import ops
from lntune.case import Case
from lntune.check import problems
from lntune.check.judging import judge
from lntune.check.memory import POISON
from lntune.check.problems import Problem
from lntune.check.stage import Stage, Subject
from lntune.words import counted

if TYPE_CHECKING:
    import torch

REMAINDERS = 64
"""Whatever is left over by blocks of so many rows, or fewer, is met: below one block."""
MOST = 2 * REMAINDERS - 1
"""The same behind one block at least."""
MOST_ELEMENTS = 1 << 22
"""Of all calls up to MOST rows, beyond which there are REMAINDERS."""
MANY, MOST_OF_MANY = (260, 1029), 1 << 21
"""Rows that are more than a byte counts, and many; and the elements that a number of rows may have
to be checked against float64.
"""
_SUMS = "sums over every number of rows"


def up_to(hidden: int) -> int:
    """How many rows there are at most in a case of that hidden size."""
    return MOST if MOST * (MOST + 1) // 2 * hidden <= MOST_ELEMENTS else REMAINDERS


def many(case: Case) -> tuple[int, ...]:
    """The large numbers of rows that what is to serve a case is checked with: MANY and the case's
    own, as far as it does not take long.
    """
    return tuple(n for n in (*MANY, case.rows) if n * case.hidden <= MOST_OF_MANY)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits."""
    import torch

    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def first(problem: Problem, rows: int, names: tuple[str, ...]) -> Problem:
    """The problem's first rows, of outputs that have rows."""
    return msgspec.structs.replace(
        problem,
        rows=rows,
        truth={n: problem.truth[n][:rows] for n in names},
        finite={n: problem.finite[n][:rows] for n in names},
        kinds=dict.fromkeys(names),
    )


def _sums(subject: Subject, problem: Problem, names: tuple[str, ...]) -> Problem:
    """For each output that is a sum over rows what it is for 1, 2, ... rows: a matrix."""
    case, op = subject.case, ops.get(subject.case.op)
    import torch

    def make() -> Problem:
        given = problem.given
        by_row = {a.name for a in op.arguments(case) if a.role == "in" and a.shape[:1] == ("rows",)}
        each: dict[str, list[Any]] = {name: [] for name in names}
        for row in range(problem.rows):
            one = {n: v[row : row + 1] if n in by_row else v for n, v in given.items()}
            truth = op.reference(case, one)
            for name in names:
                each[name].append(truth[name])
        summed = {name: torch.stack(rows).cumsum(0) for name, rows in each.items()}
        finite = {name: torch.ones_like(v, dtype=torch.bool) for name, v in summed.items()}
        return msgspec.structs.replace(
            problem, style=_SUMS, truth=summed, finite=finite, kinds=dict.fromkeys(names)
        )

    return problems.kept(case, _SUMS, problem.rows, subject.place, make)


def wrong(subject: Subject, most: int) -> str:
    """What is wrong with a kernel for some number of rows up to `most`, empty where nothing is.

    Raises:
        Exception: whatever the kernel itself raised.
    """
    import torch

    problem = problems.of_rows(subject.case, most, subject.place)
    stage = Stage(subject, most)
    stage.fill(problem.given)
    outputs = stage.call()
    message, _, _ = judge(outputs, problem)
    if message:
        return message
    shapes = {a.name: a.shape for a in stage.arguments}
    by_row = tuple(n for n in outputs if shapes[n][:1] == ("rows",))
    whole = {n: outputs[n].clone() for n in by_row}
    summed: dict[str, list[Any]] = {n: [] for n in outputs if n not in by_row}
    total = {n: outputs[n].clone() for n in summed}
    for name in by_row:
        stage.tensors[name].view.view(torch.uint8).fill_(POISON)
    for rows in range(1, most):
        outputs = stage.call(rows)
        other = tuple(n for n in by_row if not same(outputs[n], whole[n][:rows]))
        if other:
            message, _, _ = judge({n: outputs[n] for n in other}, first(problem, rows, other))
            if message:
                return message
        for name, calls in summed.items():
            calls.append(outputs[name].clone())
        for name in by_row:
            beyond = stage.tensors[name].view[rows : rows + 1].view(torch.uint8)
            if not bool((beyond == POISON).all()):
                return f"{name}: wrote to a row beyond {counted(rows, 'row')}"
    if summed:
        sums = {name: torch.stack([*calls, total[name]]) for name, calls in summed.items()}
        message, _, _ = judge(sums, _sums(subject, problem, tuple(sums)))
    return message or stage.broken
