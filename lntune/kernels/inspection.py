"""What is known of a GPU kernel before a GPU is there: its resources, the widths of its loads and
stores, the bytes it moves.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from lntune import backends, knobs, ops
from lntune.backends import cuda
from lntune.backends.cuda import Inspection
from lntune.backends.emulated import calls as emulated
from lntune.backends.emulated.emulator import Traffic
from lntune.case import DTYPES, Case
from lntune.device import Device
from lntune.errors import InputError
from lntune.kernels import compiler
from lntune.schedule import Schedule

ROWS = 8
"""Rows the emulator runs to count bytes; enough to fill a block of any default knobs, few enough to
take no time.
"""
ROWS_PER_BLOCK = 4
"""Rows of each block that adds to sums of its own, which it does once, or at each row."""
TWICE = 1.5
"""From here on a matrix counts as moved more than once; below it is what the last block of rows
repeats.
"""


class Inspected(msgspec.Struct, frozen=True):
    """One kernel of a case on one architecture. `read` and `written` are how many times the bytes
    of a matrix of rows, by its argument, are moved; a good kernel moves each once. `extra` is the
    share of bytes moved beyond the least: matrices once, and vectors once for all rows, where they
    stay in cache. `between` is what the kernels of one program leave for each other in memory,
    written and read, as a share of the least for the case's rows; it is the same whatever the
    number of rows, and no part of `extra`.
    """

    case: Case
    arch: str
    schedule: str
    knobs: dict[str, knobs.Value]
    kernels: tuple[Inspection, ...]
    read: dict[str, float]
    written: dict[str, float]
    extra: float
    between: float = 0.0
    strided: bool = False

    @property
    def problems(self) -> tuple[str, ...]:
        """What would have the candidate pruned before it costs a device's time; empty for a good
        one.
        """
        return (
            *(problem for kernel in self.kernels for problem in kernel.problems),
            *repeated(self.read, self.written),
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


def inspect(
    case: Case, schedule: Schedule, setting: Any, device: Device, strided: bool = False
) -> Inspected:
    """Compile a kernel for a GPU, which need not be here, and run it in the emulator on a few rows;
    `strided`: one for matrices whose rows may lie anywhere.

    Raises:
        InputError: the device is no GPU.
        ScheduleError, BuildError: the kernel cannot be made; ToolchainError: there is no CUDA
            compiler.
        EmulatorError: it does what would be an error on a device.
    """
    if not backends.of(device).inspects:
        raise InputError(
            f"target: got {device.name}, expected a GPU, such as cuda:sm_90; `lntune show --as asm`"
            " is for CPUs."
        )
    program = compiler.program(case, schedule, setting, device, strided)
    kernels = tuple(
        cuda.inspect_kernel(program.source, device.isa, one.threads, one.shared, one.kernel)
        for one in program.launches
    )
    few = msgspec.structs.replace(
        case, rows=max(ROWS, int(knobs.to_dict(setting).get("rows_per_block", 1)))
    )
    sums = any(a.role == "sum" for a in ops.get(case.op).arguments(case))
    if sums:  # so that each block has rows enough to show what one costs
        device = msgspec.structs.replace(device, cores=max(1, few.rows // ROWS_PER_BLOCK))
        program = compiler.program(case, schedule, setting, device, strided)
    read, written, extra, between = moves(few, program, case.blocks(device.cores))
    # perhaps only by blocks that have none of so few rows, and read the last one again
    if not sums and repeated(read, written):
        smaller = (
            msgspec.structs.replace(device, cores=cores) for cores in (1, 2, 4, 8, 16, 32, 64)
        )
        fitting = next(
            (gpu for gpu in smaller if schedule.reason_invalid(setting, case, gpu) is None), device
        )
        program = compiler.program(case, schedule, setting, fitting, strided)
        # blocks of rows whose sums have a kernel of their own are on this axis
        rows = few.rows * max(launch.blocks(1)[1] for launch in program.launches)
        read, written, extra, _ = moves(
            msgspec.structs.replace(few, rows=rows), program, case.blocks(fitting.cores)
        )
    share = between / ops.get(case.op).bytes(case)
    return Inspected(
        case,
        device.isa,
        schedule.name,
        knobs.to_dict(setting),
        kernels,
        read,
        written,
        extra,
        share,
        strided,
    )


def repeated(read: dict[str, float], written: dict[str, float]) -> tuple[str, ...]:
    """The matrices that are moved more than once, one sentence each."""
    reads = [f"reads {name} {times:.3g} times" for name, times in read.items() if times >= TWICE]
    return (
        *reads,
        *(f"writes {name} {times:.3g} times" for name, times in written.items() if times >= TWICE),
    )


def moves(
    case: Case, program: Any, blocks: int
) -> tuple[dict[str, float], dict[str, float], float, int]:
    """(read, written, extra) of Inspected and the bytes moved between kernels, found by running the
    case's rows in the emulator; `blocks` keep sums of their own.

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
    return read, written, moved / least - 1, between
