"""How often a GPU kernel reads and writes each matrix, counted by running it in the emulator."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from lntune import ops
from lntune.backends.emulated import calls as emulated
from lntune.backends.emulated.emulator import Traffic
from lntune.case import DTYPES, Case

TWICE = 1.5
"""From here on a matrix counts as moved more than once; below it is what the last block of rows
repeats.
"""


class Moved(msgspec.Struct, frozen=True):
    """What a kernel moves. `read` and `written` are how many times the bytes of a matrix of rows,
    by its argument, are moved; a good kernel moves each once. `extra` is the share of bytes moved
    beyond the least: matrices once, and vectors once for all rows, where they stay in cache.
    `between` is the bytes that the kernels of one program leave for each other in memory, written
    and read; they are no part of `extra`.
    """

    read: dict[str, float]
    written: dict[str, float]
    extra: float
    between: int


def count(case: Case, program: Any, blocks: int) -> Moved:
    """Run a program on the case's rows in the emulator and count what it moves; `blocks` of rows
    keep sums of their own.

    Raises:
        EmulatorError: the program does what would be an error on a device.
    """
    launched = _traffic(case, program, blocks)
    read: dict[str, float] = {}
    written: dict[str, float] = {}
    moved = least = 0
    for a in ops.get(case.op).arguments(case):
        if a.role == "scalar":
            continue
        size = DTYPES[a.dtype] * math.prod(a.sizes(case.rows, case.hidden, blocks))
        loaded = sum(t[a.name].loaded for t in launched if a.name in t)
        stored = sum(t[a.name].stored for t in launched if a.name in t)
        least += size * (2 if a.role == "sum" else 1)  # which is added to
        if len(a.shape) > 1:
            moved += loaded + stored
            read |= {a.name: loaded / size} if loaded else {}
            written |= {a.name: stored / size} if stored else {}
        else:
            moved += max(size, stored)
    between = sum(
        t[s.name].loaded + t[s.name].stored
        for t in launched
        for s in program.scratch
        if s.name in t
    )
    return Moved(read, written, moved / least - 1, between)


def repeated(read: dict[str, float], written: dict[str, float]) -> tuple[str, ...]:
    """The matrices that are moved more than once, one sentence each."""
    reads = [f"reads {name} {times:.3g} times" for name, times in read.items() if times >= TWICE]
    return (
        *reads,
        *(f"writes {name} {times:.3g} times" for name, times in written.items() if times >= TWICE),
    )


def _traffic(case: Case, program: Any, blocks: int) -> list[Traffic]:
    """What each launch of the program reads and writes for the case's rows; `blocks` keep sums of
    their own.
    """
    import torch

    op, seen = ops.get(case.op), list[Traffic]()
    given = op.inputs(case, case.rows, "normal", 0)
    values = []
    for a in op.arguments(case):
        out = a.role not in ("in", "scalar")
        values.append(
            torch.zeros(a.sizes(case.rows, case.hidden, blocks), dtype=getattr(torch, a.dtype))
            if out
            else given[a.name]
        )
    emulated.kernel(case, program, seen=seen)(*values)
    return seen
