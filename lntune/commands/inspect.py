"""`lntune inspect`: what is known of a GPU kernel where there is no GPU: its registers and other
resources, the widths of its loads and stores, the bytes it moves, what its warps go through for a
row, and what a model says of its time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from lntune import backends, knobs, ops
from lntune.backends import cuda
from lntune.backends.cuda import Inspection, model, parts
from lntune.backends.cuda.device_code import Program
from lntune.backends.cuda.model import Prediction
from lntune.case import Case
from lntune.device import Device
from lntune.errors import InputError, got_expected
from lntune.kernels import compiler, traffic
from lntune.schedule import Schedule
from lntune.torch.vector_width import narrowed

ROWS = 8
"""Rows the emulator runs to count bytes; enough to fill a block of any default knobs, few enough to
take no time.
"""
ROWS_PER_BLOCK = 4
"""Rows of each block that adds to sums of its own, which it does once, or at each row."""


class RowWork(msgspec.Struct, frozen=True):
    """What one kernel does for the case's rows. It writes the outputs `writes`, or partial sums for
    a kernel behind it where these are none. `blocks` fill the multiprocessors `waves` times;
    each takes `turns` groups of rows (one row, or those that share a block). `instructions` and
    `barriers` are what a warp goes through for a group, `accesses` the loads and stores of global
    memory among them, counted in the same code as the widths; `elements` of a row are a thread's.
    """

    instructions: int
    barriers: int
    accesses: int
    elements: int
    blocks: int
    waves: float
    turns: int
    writes: tuple[str, ...] = ()


class Inspected(msgspec.Struct, frozen=True):
    """One kernel of a case on one architecture. `read`, `written` and `extra` are those of
    traffic.Moved; `between` is, too, as a share of the least bytes for the case's rows: it is the
    same whatever the number of rows. `predicted` is the model's, and no measurement.
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
    work: tuple[RowWork, ...] = ()
    predicted: Prediction | None = msgspec.field(default=None, name=model.NOTE)

    @property
    def problems(self) -> tuple[str, ...]:
        """What would have the candidate pruned before it costs a device's time; empty for a good
        one.
        """
        return (
            *(problem for kernel in self.kernels for problem in kernel.problems),
            *traffic.repeated(self.read, self.written),
        )


def inspect_case(
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
    if strided:
        setting = _for_strided(case, schedule, setting, device)
    program = compiler.program(case, schedule, setting, device, strided)
    kernels = tuple(
        cuda.inspect_kernel(program.source, device.isa, one.threads, one.shared, one.kernel)
        for one in program.launches
    )
    work = _work(case, setting, program, kernels, device)
    predicted = model.predict(
        parts.of(case, program, kernels, device),
        ops.get(case.op).bytes(case),
        device,
    )
    few = msgspec.structs.replace(
        case, rows=max(ROWS, int(knobs.to_dict(setting).get("rows_per_block", 1)))
    )
    sums = any(a.role == "sum" for a in ops.get(case.op).arguments(case))
    if sums:  # so that each block has rows enough to show what one costs
        device = msgspec.structs.replace(device, cores=max(1, few.rows // ROWS_PER_BLOCK))
        program = compiler.program(case, schedule, setting, device, strided)
    moved = traffic.count(few, program, case.blocks(device))
    between = moved.between / ops.get(case.op).bytes(case)
    # perhaps only by blocks that have none of so few rows, and read the last one again
    if not sums and traffic.repeated(moved.read, moved.written):
        smaller = (
            msgspec.structs.replace(device, cores=cores) for cores in (1, 2, 4, 8, 16, 32, 64)
        )
        fitting = next(
            (gpu for gpu in smaller if schedule.reason_invalid(setting, case, gpu) is None), device
        )
        program = compiler.program(case, schedule, setting, fitting, strided)
        # blocks of rows whose sums have a kernel of their own are on this axis
        rows = few.rows * max(launch.blocks(1)[1] for launch in program.launches)
        moved = traffic.count(
            msgspec.structs.replace(few, rows=rows), program, case.blocks(fitting)
        )
    return Inspected(
        case,
        device.isa,
        schedule.name,
        knobs.to_dict(setting),
        kernels,
        moved.read,
        moved.written,
        moved.extra,
        between,
        strided,
        work,
        predicted,
    )


def setting(
    case: Case, schedule: Schedule, words: Sequence[str], device: Device, strided: bool
) -> Any:
    """The default knobs of a schedule for a case, but for those that words have, `name=value` or a
    switch that is to be on.

    Raises:
        UnknownNameError, InputError: there is no such knob or value, or no kernel with these knobs.
    """
    knobs.changed(schedule.knobs(), words)  # at once: default knobs take TVM to be known
    defaults = schedule.untuned(case, device)
    changed = knobs.changed(defaults, words)
    why = words and reason_invalid(case, schedule, changed, device, strided)
    if why:
        asked = f"knobs that fit {case} on {device.isa} ({why})"
        others = f"The others are {knobs.describe(defaults)}."
        fixed = {word.partition("=")[0].strip() for word in words}
        near = knobs.nearest(
            changed, fixed, lambda s: not reason_invalid(case, schedule, s, device, strided)
        )
        if near is not None:
            new = knobs.to_dict(near).items() - knobs.to_dict(changed).items()
            more = " ".join(f"--knob {name}={str(value).lower()}" for name, value in sorted(new))
            others += f" It fits with {more} beside it."
        raise InputError(got_expected("--knob", ", ".join(words), asked, others))
    return changed


def reason_invalid(
    case: Case, schedule: Schedule, setting: Any, device: Device, strided: bool
) -> str | None:
    """Why there is no kernel with exactly these knobs, or None."""
    if why := schedule.reason_invalid(setting, case, device):
        return why
    if strided and _for_strided(case, schedule, setting, device) != setting:
        return "vectors of row-strided views divide a row"
    return None


def _for_strided(case: Case, schedule: Schedule, setting: Any, device: Device) -> Any:
    """The knobs with which row-strided matrices are served in place of these: vectors have to
    divide a row.
    """
    width = int(knobs.to_dict(setting).get("vector_width", 1))
    return narrowed(setting, schedule, case, device, width, strided=True) or setting


def _work(
    case: Case, setting: Any, program: Program, kernels: Sequence[Inspection], device: Device
) -> tuple[RowWork, ...]:
    """What each kernel does for the case's rows, by the code that it was counted in."""
    counted = [msgspec.structs.replace(kernel, depths=kernel.code.depths) for kernel in kernels]
    per_row = int(knobs.to_dict(setting).get("threads_per_row", 1))
    arguments = {a.name for a in ops.get(case.op).arguments(case) if "rows" in a.shape}
    outputs = [a.name for a in ops.get(case.op).arguments(case) if a.role in ("out", "sum")]
    return tuple(
        RowWork(
            round(part.turn.slots),
            part.turn.barriers,
            part.turn.accesses,
            -(-case.hidden // per_row) if arguments & set(launch.arguments) else 0,
            part.blocks,
            round(part.waves(device.multiprocessors), 2) if part.resident else 0.0,
            part.turns,
            tuple(name for name in outputs if name in launch.arguments),
        )
        for launch, part in zip(
            program.launches,
            parts.of(case, program, counted, device),
            strict=True,
        )
    )
