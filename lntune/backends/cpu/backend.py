"""CPUs: machine code by LLVM in shared libraries, timed by the machine's clock."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

import lntune.device
from lntune import check, ops, timing
from lntune.backends import inputs
from lntune.backends.backend import Call, Kernel, Scheduled
from lntune.backends.cpu import cold, llvm, runtime, signature
from lntune.backends.host import HostBackend
from lntune.case import Case
from lntune.device import Device
from lntune.log.records import Timing
from lntune.system import toolchain
from lntune.system.sealed import Facts

_COPIED = 1 << 30
"""Bytes of the tensor that `copy_bandwidth` copies, at most; twice that is moved."""
FEW_ROWS = (2, 3, 4, 6, 7, check.SEVERAL)
"""Rows a kernel is checked with besides: every remainder of the rows that are worked on side by
side, and several for each thread.
"""
COMPARED_ELEMENTS, BEYOND = 1 << 23, 101
"""Elements of what is compared with eager mode beside a case's own, and rows beyond those."""
MOST_COMPARED, OF_MEMORY = 1 << 27, 16
"""Elements beyond which no more rows than a case's own are compared, since it takes seconds; and
the fraction of the memory that the tensors of such a call may take: eager mode makes others.
"""
MOST_ROWS = 2048
"""Of more the largest error is of a row that is next to constant."""
LEAST_HIDDEN = 8
"""Of many shorter rows some are all but constant, and eager mode is no measure there."""
_SHARE = 16
"""At most this fraction of the free memory is copied."""


class Cpu(HostBackend):
    """This machine's CPU."""

    name = "cpu"
    kind = "cpu"
    suffix = "so"
    search = "bayesian"
    outputs_on_heap = True
    short_elements = check.SEVERAL << 10
    calls_directly = True
    node = True
    beside = "cold"
    fence = check.FENCE
    case_seconds = 4.0
    option = "cpu"

    def targets(self) -> list[str]:
        """See Backend."""
        return ["cpu"]

    def find(self, target: str) -> Device | None:
        """See Backend."""
        return lntune.device.current() if target == "cpu" else None

    def device_of(self, index: int) -> Device:
        """See Backend."""
        return lntune.device.current()

    def last_cache(self, device: Device) -> int:
        """See Backend."""
        return device.l3

    def target(self, device: Device) -> dict[str, Any]:
        """See Backend."""
        return llvm.target(device)

    def in_memory(self, scheduled: Scheduled) -> Kernel:
        """See Backend."""
        module, device = scheduled.module, scheduled.device
        checked = scheduled.checked or not signature.is_of(module, scheduled.case, device)
        return llvm.in_memory(module, device, checked)

    def show(self, scheduled: Scheduled, form: str) -> str:
        """See Backend."""
        return llvm.show(scheduled.module, scheduled.device, form)

    def more_rows(self, case: Case, device: Device, kernel: Kernel) -> tuple[int, ...]:
        """See Backend."""
        return FEW_ROWS

    def verify(
        self, case: Case, device: Device, kernel: Kernel, thoroughly: bool = False
    ) -> check.Verdict:
        """See Backend."""
        rows: tuple[int, ...] = FEW_ROWS
        every = 0
        if thoroughly:
            every = check.rows.up_to(case.hidden)
            rows = tuple(dict.fromkeys((*FEW_ROWS, *check.rows.many(case))))
        return check.verify(
            case, kernel, self.fence, "cpu", device, rows, thoroughly, every, in_process=thoroughly
        )

    def verify_by_all(self, case: Case, device: Device, kernel: Kernel) -> check.Verdict:
        """See Backend."""
        return check.verify(case, kernel, self.fence, "cpu", device, FEW_ROWS, plainly=True)

    def machine(self, device: Device) -> Facts:
        """See Backend."""
        if device != lntune.device.current():
            return {}
        return {"cpu": f"{device.name} {device.model}".strip(), "isa": device.isa}

    def compare(self, case: Case, device: Device, kernel: Kernel, given: Mapping[str, Any]) -> str:
        """See Backend. Records serve more rows than they are timed with, which are tried, too."""
        if case.hidden < LEAST_HIDDEN:
            return ""
        if wrong := check.compare_with_eager(case, kernel, given, device):
            return wrong
        rows = more_than(case)
        if rows <= case.rows:
            return ""
        more = msgspec.structs.replace(case, rows=rows)
        return check.compare_with_eager(more, kernel, _plain(more, device), device)

    def inputs_beside(self, case: Case, device: Device, seed: int = 0) -> list[dict[str, Any]]:
        """See Backend, and cold.py beside this file."""
        first = inputs.plain(case, device, seed)
        count = cold.copies(ops.get(case.op).bytes(case), self.last_cache(device))
        return [inputs.copied(first) for _ in range(count + 1)] if count else []

    def measure_beside(
        self,
        contenders: Mapping[str, Sequence[Call]],
        case: Case,
        device: Device,
        seconds: float,
        seed: int = 0,
    ) -> dict[str, Timing]:
        """See Backend, and cold.py beside this file."""
        size, last_cache = ops.get(case.op).bytes(case), self.last_cache(device)
        return cold.measure(contenders, seconds, size, last_cache, seed)

    def ensure_compiler(self) -> None:
        """See Backend. What LLVM has compiled is linked by a C++ compiler."""
        toolchain.compiler()

    def compiler(self) -> str:
        """See Backend."""
        return "TVM with LLVM"

    def store(self, scheduled: Scheduled, path: Path, archs: Sequence[str] = ()) -> Facts:
        """See Backend."""
        llvm.to_library(scheduled.module, scheduled.device, path)
        return {}

    def load(self, path: Path) -> Kernel:
        """See Backend."""
        return runtime.load(path)

    def tools(self) -> Facts:
        """See Backend."""
        return {}

    def runtime(self) -> str:
        """See Backend."""
        return runtime.source_hash()

    def ensure_library(self) -> tuple[Path, ...]:
        """See Backend."""
        return (runtime.ensure_library(),)

    def copy_bandwidth(self, device: Device, seconds: float = 0.5) -> float:
        """See Backend."""
        import torch

        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        size = min(_COPIED, max(1 << 20, free // _SHARE))
        # ones: zeros may be pages that are not there yet
        source = torch.ones(size, dtype=torch.uint8)
        copied = torch.ones_like(source)
        measured = timing.measure({"copy": lambda: copied.copy_(source)}, seconds, rounds=3)
        return 2 * size / measured.timings["copy"].median_us * 1e6


def more_than(case: Case) -> int:
    """More rows than a case has, as far as it does not take long to try them, or all of a machine's
    memory; fewer where there are no such.
    """
    beyond = case.rows + case.rows // 8 + BEYOND
    usual = min(MOST_ROWS, COMPARED_ELEMENTS // case.hidden) + BEYOND
    size = ops.get(case.op).bytes(msgspec.structs.replace(case, rows=beyond))
    fits = beyond * case.hidden <= MOST_COMPARED and size * OF_MEMORY <= inputs.memory()
    return max(usual, beyond if fits else 0)


@functools.lru_cache(maxsize=1)  # of one case there are several finalists
def _plain(case: Case, device: Device) -> dict[str, Any]:
    """Plain random inputs, of which COMPARED_ELEMENTS are drawn and repeated."""
    return inputs.on_device(case, device, "cpu", most=max(1, COMPARED_ELEMENTS // case.hidden))


BACKEND = Cpu()
