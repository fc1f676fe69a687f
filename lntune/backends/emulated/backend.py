"""GPUs that are not here, as devices of their own: the CUDA source of their kernels runs on this
machine's CPU, on tensors of the CPU, thread by thread and with every access checked.

For tests: what tunes, checks, stores, loads and calls kernels of GPUs runs on any machine, and the
times are those of the emulator, which say nothing about a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lntune import check
from lntune.architectures import ARCHITECTURES
from lntune.backends.backend import Kernel, Scheduled
from lntune.backends.cuda import program as programs
from lntune.backends.cuda import row_counts, stored
from lntune.backends.cuda.device_code import Binary
from lntune.backends.emulated import calls, emulator
from lntune.backends.host import HostBackend
from lntune.case import Case
from lntune.device import Device
from lntune.errors import InputError, got_expected
from lntune.system.sealed import Facts

PREFIX = "emulated:"
MULTIPROCESSORS = 2
"""So few that blocks which go over the rows in turns have several, of few rows."""


class Emulated(HostBackend):
    """An architecture whose kernels the emulator runs."""

    name = "emulated"
    kind = "gpu"
    suffix = "emulated"
    aligned = True
    inspects = True
    fence = check.ALIGNED
    short_elements = 1 << 13
    case_seconds = 4.0

    @property
    def option(self) -> str:
        """See Backend."""
        return f"{PREFIX}sm_90"

    def targets(self) -> list[str]:
        """See Backend."""
        return [f"{PREFIX}{arch}" for arch in ARCHITECTURES]

    def find(self, target: str) -> Device | None:
        """See Backend."""
        of = ARCHITECTURES.get(target.removeprefix(PREFIX)) if target.startswith(PREFIX) else None
        if of is None:
            return None
        name, shared = f"emulated {of.name}", of.shared_block
        return Device(
            "gpu", name, of.name, MULTIPROCESSORS, shared_memory=shared, backend=self.name
        )

    def device_of(self, index: int) -> Device:
        """See Backend."""
        raise InputError(got_expected("device", index, "one of `serve`", "See backends.serve."))

    def target(self, device: Device) -> dict[str, Any]:
        """See Backend."""
        return programs.target(device)

    def widest(self, knobs: Any, case: Case) -> int:
        """See Backend."""
        return stored.widest(knobs, case)

    def in_memory(self, scheduled: Scheduled) -> Kernel:
        """See Backend."""
        return calls.function(_described(scheduled))

    def stand_in(self, scheduled: Scheduled) -> Kernel:
        """See Backend. A Python function, whose errors are the emulator's own."""
        return calls.kernel(scheduled.case, programs.program(scheduled))

    def more_rows(self, case: Case, device: Device, kernel: Kernel) -> tuple[int, ...]:
        """See Backend: as on a GPU."""
        return row_counts.of(kernel)

    def machine(self, device: Device) -> Facts:
        """See Backend."""
        return {"emulated": device.isa}

    def show(self, scheduled: Scheduled, form: str) -> str:
        """See Backend. There is no assembly: it is C++ that the CPU runs."""
        if form == "asm":
            raise InputError(got_expected("--as", "asm", "source, of an emulated GPU"))
        return programs.program(scheduled).source

    def compiler(self) -> str:
        """See Backend."""
        return "the emulator"

    def store(self, scheduled: Scheduled, path: Path, archs: Sequence[str] = ()) -> Facts:
        """See Backend."""
        return stored.write(path, _described(scheduled))

    def load(self, path: Path) -> Kernel:
        """See Backend."""
        return calls.function(stored.read(path))

    def tools(self) -> Facts:
        """See Backend."""
        return {}

    def copy_bandwidth(self, device: Device, seconds: float = 0.5) -> float:
        """See Backend: that of this machine's CPU."""
        from lntune import backends

        cpu = backends.device_of("cpu")
        return backends.of(cpu).copy_bandwidth(cpu, seconds)


def _described(scheduled: Scheduled) -> Binary:
    """The kernel as it is stored: its CUDA source in the place of device code."""
    program = programs.program(scheduled)
    emulator.compile(program.source)
    images = {scheduled.device.isa: program.source.encode()}
    return stored.described(scheduled, program, images, "", "the emulator")


BACKEND = Emulated()
