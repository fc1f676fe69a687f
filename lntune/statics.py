"""What is known of a candidate for a GPU before the device's time is spent on it, found at the price of compiling it.

From the compiler's log: registers, spills, stack, shared memory, and so how many blocks a multiprocessor holds. From the PTX: the widths of
accesses. From the emulator: whether a matrix is moved more than once. That takes longer than a trial on a device, and what decides it are the
schedule and those of its knobs that choose between ways (words and switches), hardly ever the numbers; so it is asked once for each of
these, on a row as short as the knobs allow. `inspection` looks closer, at one candidate.
"""

from __future__ import annotations

from typing import Any

import msgspec

from lntune import build, cuda, inspection, knobs
from lntune.case import Case
from lntune.cuda import Inspection
from lntune.device import Device
from lntune.device_code import Program
from lntune.errors import LntuneError
from lntune.schedule import Schedule

_SHORT = (1024, 2048, 4096, 8192)


class Facts(msgspec.Struct, frozen=True):
    """The kernels of a candidate as compiled, with the number of their blocks for the case's rows; `moved` names what is moved again and
    again, and is empty for a good candidate.
    """

    kernels: tuple[Inspection, ...]
    blocks: tuple[int, ...]
    moved: tuple[str, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """What keeps a candidate from being measured."""
        return (*(problem for kernel in self.kernels for problem in kernel.problems), *self.moved)


def shortened(case: Case, schedule: Schedule, setting: Any, device: Device) -> Case:
    """The case with the shortest row that the knobs fit and that ends as raggedly as the case's own; for the emulator, which is slow."""
    for unit in _SHORT:
        hidden = case.hidden % unit + unit
        short = msgspec.structs.replace(case, hidden=hidden)
        if hidden < case.hidden and schedule.reason_invalid(setting, short, device) is None:
            return short
    return case


def facts(case: Case, schedule: Schedule, setting: Any, device: Device, program: Program | None = None) -> Facts:
    """Compile a candidate (`program`, where TVM has made it already) for a GPU, which need not be here.

    Raises:
        ScheduleError, BuildError: it cannot be made; ToolchainError: there is no CUDA compiler.
        EmulatorError: it does what would be an error on a device.
    """
    program = program or build.program(case, schedule, setting, device)
    kernels = tuple(cuda.inspect_kernel(program.source, device.isa, one.threads, one.shared, one.kernel, machine=False) for one in program.launches)
    blocks = []
    for one in program.launches:
        x, y, z = one.blocks(case.rows)
        blocks.append(x * y * z)
    return Facts(kernels, tuple(blocks), moved(case, schedule, setting, device))


def moved(case: Case, schedule: Schedule, setting: Any, device: Device) -> tuple[str, ...]:
    """Matrices that a candidate, and all that differ from it in numbers only, reads or writes more than once."""
    ways = tuple((name, value) for name, value in knobs.to_dict(setting).items() if not isinstance(value, int) or isinstance(value, bool))
    key = (case.op, case.dtype, case.variant, schedule.name, schedule.source, device.isa, ways)
    if key not in _moved:
        short = shortened(case, schedule, setting, device)
        try:
            _moved[key] = inspection.inspect(short, schedule, setting, device).repeated
        except LntuneError:
            _moved[key] = ()  # what is wrong with it shows when it is verified
    return _moved[key]


_moved: dict[Any, tuple[str, ...]] = {}
