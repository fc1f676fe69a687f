"""With how many rows a GPU's kernel is to be checked so that all that its blocks do is reached,
found from its launches alone.

Where the grid grows with the rows, a block of threads has R of them, and what it does differs with
how many of these there are: 1 to R. Where blocks loop over the rows, all of them together take S
rows a step, and what is wrong from the second step on (an index, sums that are set to 0 again,
registers that hold the row before) shows with 2 S rows and a few more, which leave some blocks
without a third step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lntune import check
from lntune.backends.cuda.device_code import Launch
from lntune.backends.cuda.sizes import number
from lntune.case import Case

REST = 5
"""Rows beyond two steps of all blocks."""
Function = TypeVar("Function", bound=Callable[..., Any])
_ATTRIBUTE = "lntune_launches"
_MOST = 1 << 40
"""Rows up to which a size is asked whether it grows."""


def with_launches(kernel: Function, launches: Sequence[Launch]) -> Function:
    """The kernel, a function of Python's or tvm_ffi's, which knows its launches from now on."""
    setattr(kernel, _ATTRIBUTE, tuple(launches))
    return kernel


def of(kernel: Callable[..., Any]) -> tuple[int, ...]:
    """The row counts to check a loaded kernel with beside check.ROWS; none for a function that does
    not know its launches.
    """
    return reaching(getattr(kernel, _ATTRIBUTE, ()))


def thorough(case: Case, kernel: Callable[..., Any]) -> tuple[tuple[int, ...], int]:
    """(the row counts, the last of those that are all gone through) of what is to serve a case:
    beside what its launches say, many rows and every remainder of a block.
    """
    more = {*of(kernel), *check.rows.many(case)} - set(check.ROWS)
    return tuple(sorted(more)), check.rows.REMAINDERS


def reaching(launches: Sequence[Launch]) -> tuple[int, ...]:
    """The row counts that launches are to be checked with beside check.ROWS, ascending."""
    counts: set[int] = set()
    for launch in launches:
        of_block = _before_it_grows(launch.total)
        of_steps = _steps(launch)
        if of_block is None and of_steps is None:
            continue  # it has nothing to do with rows
        # the threads of a block that loops over the rows take one each, side by side
        together = launch.block[1] if of_block is None else of_block
        counts.update(range(1, together + 1) if together > 1 else ())
        if (at_a_time := of_steps or of_block or 1) > 1 or of_steps:
            counts.add(2 * at_a_time + min(REST, max(1, at_a_time - 1)))
    return tuple(sorted(counts - set(check.ROWS)))


def _steps(launch: Launch) -> int | None:
    """The rows that all blocks together take in one step of their loops; None where blocks do not
    loop over rows.

    Where a kernel is told the number of rows, and neither grid nor loops say what it does with
    them, each thread row of a block is taken for having one.
    """
    found = [_before_it_grows(functools.partial(number, size)) for size in launch.steps]
    told = any("rows" in argument for argument in launch.arguments)
    if told and not any(found) and _before_it_grows(launch.total) is None:
        return launch.total(1) * launch.block[1]
    return max((rows for rows in found if rows), default=None)


def _before_it_grows(size: Callable[[int], int]) -> int | None:
    """The largest number of rows for which a size, which never falls, is what it is for a single
    row; None where it is the same for all.
    """
    least = size(1)
    if size(_MOST) == least:
        return None
    low, high = 1, _MOST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) == least else (low, middle)
    return low
