"""What each kernel of a program does for a number of rows, for the model to reckon with: from its
code, its launch and its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lntune import ops
from lntune.backends.cuda import Inspection
from lntune.backends.cuda.code import Work
from lntune.backends.cuda.device_code import Launch, Program
from lntune.backends.cuda.model import Part
from lntune.case import DTYPES, Case
from lntune.device import Device

_MANY = 1 << 20
"""Rows that no kernel has so many blocks for, unless it has blocks for any number of rows."""


def of(
    case: Case, program: Program, kernels: Sequence[Inspection], device: Device
) -> tuple[Part, ...]:
    """The parts of a program's launches, whose kernels have been inspected, for the case's rows on
    a GPU.

    Blocks that are as many whatever the rows take these in turns, in the outermost loop of their
    code. Loops within it, or any loops of other kernels, go over a thread's part of a row, as
    often as its widest accesses take for that.
    """
    written: set[str] = set()
    parts = []
    for launch, kernel in zip(program.launches, kernels, strict=True):
        matrices, moved = _arguments(case, launch, device)
        scratch = {
            s.name: math.prod(s.sizes(case.rows)) * s.bytes_of_one
            for s in program.scratch
            if s.name in launch.arguments
        }
        x, y, z = launch.blocks(case.rows)
        rows_at_once = (y if y > 1 else x) * launch.block[1]
        in_turns = bool(matrices) and launch.blocks(_MANY) == launch.blocks(2 * _MANY)
        turns = max(1, -(-case.rows // rows_at_once)) if in_turns else 1
        largest = max(matrices) if matrices else max(scratch.values(), default=0)
        own = largest / (x * y * z * turns * launch.threads)
        outside, *loops = kernel.depths
        once, body = (outside, loops) if in_turns else (Work(), [outside, *loops])
        parts.append(
            Part(
                threads=launch.threads,
                resident=kernel.occupancy.blocks,
                blocks=x * y * z,
                turns=turns,
                once=once,
                turn=_passed(body, own),
                bytes=moved + sum(size for name, size in scratch.items() if name not in written),
                cached=sum(size for name, size in scratch.items() if name in written),
            )
        )
        written |= set(scratch)
    return tuple(parts)


def _arguments(case: Case, launch: Launch, device: Device) -> tuple[list[int], int]:
    """Bytes of each matrix that a kernel takes, and of all that it moves: each argument once, sums
    that are added to twice, by blocks that have rows.
    """
    blocks = min(case.blocks(device), case.rows)
    matrices: list[int] = []
    moved = 0
    for a in ops.get(case.op).arguments(case):
        if a.role == "scalar" or a.name not in launch.arguments:
            continue
        size = DTYPES[a.dtype] * math.prod(a.sizes(case.rows, case.hidden, blocks))
        moved += size * (2 if a.role == "sum" else 1)
        if len(a.shape) > 1 and "rows" in a.shape:
            matrices.append(size)
    return matrices, moved


def _passed(depths: Sequence[Work], own: float) -> Work:
    """What a warp goes through in all: the first of the depths once, the loops below it as often as
    their widest accesses take for a thread's `own` bytes.
    """
    if not depths:
        return Work()
    work, *loops = depths
    for inner in loops:
        times = max(1, math.ceil(8 * own / inner.widest)) if inner.widest else 1
        work = Work(
            work.slots + times * inner.slots,
            work.shuffles + times * inner.shuffles,
            work.barriers + times * inner.barriers,
            work.accesses + times * inner.accesses,
            max(work.widest, inner.widest),
            work.ahead,
        )
    return work
