"""What compiling a candidate for a GPU tells about it before it is measured, so that bad ones are
left out and good ones come first.

From the compiler's log: registers, spills, stack, shared memory, and so how many blocks a
multiprocessor holds. From the PTX: what a warp goes through for a row, and the widths of loads and
stores. From the emulator: whether a
matrix is moved more than once. That takes longer than a trial on a device, and what decides it are
the schedule and those of its knobs that choose between ways (words and switches), hardly ever the
numbers; so it is asked once for each of these, on a row as short as the knobs allow.
"""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any

import msgspec

from lntune import knobs
from lntune.backends import cuda
from lntune.backends.backend import Scheduled
from lntune.backends.cuda import Inspection, parts, row_counts
from lntune.backends.cuda.device_code import Program
from lntune.backends.cuda.model import Part
from lntune.case import Case
from lntune.device import Device
from lntune.errors import BuildError, InputError, LntuneError, got_expected
from lntune.kernels import compiler, traffic
from lntune.schedule import Schedule
from lntune.system import native, paths

_FORMAT = 1
_SHORT = (1024, 2048, 4096, 8192, 16384)
ROWS = 32
"""Rows at least that the emulator counts the bytes of; no fewer than all blocks work on at a time,
or those without a row would count, too.
"""
MOST_ROWS = 1024
EMULATED = 1 << 20
"""Elements of a matrix that a candidate is checked with in the emulator at most, as far as fewer
multiprocessors help; some seconds.
"""
FEWER = (16, 3, 1)
"""Multiprocessors that are tried instead of the device's."""


class Facts(msgspec.Struct, frozen=True):
    """The kernels of a candidate as compiled, and what each does for the case's rows; `moved` names
    what is moved again and again, and is empty for a good candidate.
    """

    kernels: tuple[Inspection, ...]
    parts: tuple[Part, ...]
    moved: tuple[str, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """What keeps a candidate from being measured."""
        return (*(problem for kernel in self.kernels for problem in kernel.problems), *self.moved)

    def instructions(self, case: Case) -> float:
        """Instructions that threads issue for an element of a row, in all kernels together, by the
        way that the model takes through their code.
        """
        issued = (
            (part.once.slots + part.turns * part.turn.slots) * part.blocks * part.threads
            for part in self.parts
        )
        return sum(issued) / (case.rows * case.hidden)


def shortened(case: Case, schedule: Schedule, setting: Any, device: Device) -> Case:
    """The case with the shortest row that the knobs fit and that ends as raggedly as the case's
    own; for the emulator, which is slow.
    """
    for unit in _SHORT:
        hidden = case.hidden % unit + unit
        short = msgspec.structs.replace(case, hidden=hidden)
        if hidden < case.hidden and schedule.reason_invalid(setting, short, device) is None:
            return short
    return case


def to_emulate(case: Case, schedule: Schedule, setting: Any, device: Device) -> Scheduled:
    """A candidate as the emulator is to check it: on a row as short as the knobs allow, and on
    fewer multiprocessors than the device has where two steps of all their blocks over the rows
    would be too many rows.

    Raises:
        ScheduleError, BuildError: it cannot be made.
    """
    # a short row need not be as large as a cache
    uncached = msgspec.structs.replace(device, l2=0)
    found = compiler.lowered(
        shortened(case, schedule, setting, uncached), schedule, setting, uncached
    )
    for cores in FEWER:
        rows = max(row_counts.reaching(found.program.launches), default=0)
        if rows * found.case.hidden <= EMULATED or cores >= device.cores:
            break
        small = msgspec.structs.replace(uncached, cores=cores)
        short = shortened(case, schedule, setting, small)
        if schedule.reason_invalid(setting, short, small) is None:
            found = compiler.lowered(short, schedule, setting, small)
    return found


def facts(
    case: Case, schedule: Schedule, setting: Any, device: Device, program: Program | None = None
) -> Facts:
    """Compile a candidate (`program`, where TVM has made it already) for a GPU, which need not be
    here.

    Raises:
        ScheduleError, BuildError: it cannot be made; ToolchainError: there is no CUDA compiler.
        EmulatorError: it does what would be an error on a device.
    """
    # as it is stored
    program = program or compiler.program(case.typical, schedule, setting, device)
    kernels = tuple(
        cuda.inspect_kernel(
            program.source, device.isa, one.threads, one.shared, one.kernel, machine=False
        )
        for one in program.launches
    )
    todo = parts.of(case, program, kernels, device)
    return Facts(kernels, todo, _beyond_default(case, schedule, setting, device))


def _beyond_default(
    case: Case, schedule: Schedule, setting: Any, device: Device
) -> tuple[str, ...]:
    """What a candidate moves again and again, and the default does not: what that does may be all
    that can be done, as with rows that nothing holds.
    """
    default = schedule.untuned(case, device)
    if _ways(setting) == _ways(default) or not (repeated := moved(case, schedule, setting, device)):
        return ()
    known = moved(case, schedule, default, device)
    return tuple(sentence for sentence in repeated if sentence not in known)


def _ways(setting: Any) -> dict[str, knobs.Value]:
    """The knobs that choose between ways to do it."""
    return {
        name: value
        for name, value in knobs.to_dict(setting).items()
        if not isinstance(value, int) or isinstance(value, bool)
    }


def moved(case: Case, schedule: Schedule, setting: Any, device: Device) -> tuple[str, ...]:
    """Matrices that a candidate, and all that differ from it in numbers only, reads or writes more
    than once; asked once per machine.
    """
    key = [
        _FORMAT,
        case.op,
        case.dtype,
        case.variant,
        schedule.name,
        schedule.code,
        device.isa,
        _ways(setting),
    ]
    name = hashlib.sha256(msgspec.json.encode(key, order="deterministic")).hexdigest()[:24]
    path = paths.cached("facts", f"{name}.json")
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode(path.read_bytes(), type=tuple[str, ...])
    try:
        repeated = _emulated(case, schedule, setting, device)
    except LntuneError:
        return ()  # what is wrong with it shows when it is verified
    with contextlib.suppress(BuildError), native.atomic(path) as temporary:
        temporary.write_bytes(msgspec.json.encode(repeated))
    return repeated


def _emulated(case: Case, schedule: Schedule, setting: Any, device: Device) -> tuple[str, ...]:
    """`moved` of a candidate itself, on as few multiprocessors as it takes: where blocks loop
    over the rows in strides of the grid, few rows then fill them.

    Raises:
        LntuneError: it cannot be built or run, or would take too long.
    """
    for cores in (1, 8, device.cores):
        # what is asked of matrices that a cache does not hold
        small = msgspec.structs.replace(device, cores=cores, l2=0)
        short = shortened(case, schedule, setting, small)
        if schedule.reason_invalid(setting, short, small) is None:
            break
    program = compiler.program(short, schedule, setting, small)
    at_a_time = program.launches[0].blocks(1)[0] * int(
        knobs.to_dict(setting).get("rows_per_block", 1)
    )
    rows = -(-ROWS // at_a_time) * at_a_time
    if rows > MOST_ROWS:
        raise InputError(got_expected("rows to count", rows, f"at most {MOST_ROWS}"))
    counted = traffic.count(msgspec.structs.replace(short, rows=rows), program, short.blocks(small))
    return traffic.repeated(counted.read, counted.written)
