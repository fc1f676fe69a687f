"""Where a case's tensors are and how calls on them are checked and timed: this machine's CPU, or a
GPU that is here.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lntune import check, ops, timing
from lntune import device as device_module
from lntune.backends.cuda import driver, launcher
from lntune.backends.cuda import timing as device_timing
from lntune.backends.cuda.timing import Call, Gpu
from lntune.case import Case
from lntune.device import Device
from lntune.errors import InputError, got_expected
from lntune.timing import Measured


@dataclass(frozen=True)
class Place:
    """A device with PyTorch's name of it, "cpu" or "cuda:1", and for a GPU what its time is
    measured with.
    """

    device: Device
    name: str
    gpu: Gpu | None = None

    def inputs(self, case: Case, seed: int = 0) -> list[dict[str, Any]]:
        """Plain random inputs of the case on the device; on a GPU so many copies that calls in turn
        find none in the L2 cache.

        Contenders share them and none writes to them, but for sums, of which there are as many
        blocks as the device's cores ask for.
        """
        import torch

        op = ops.get(case.op)
        first = op.inputs(case, case.rows, "normal", seed)
        for a in op.arguments(case):
            if a.role == "sum":
                first[a.name] = torch.zeros(
                    a.sizes(case.rows, case.hidden, case.blocks(self.device.cores))
                )
        if self.gpu is None:
            return [first]
        count = device_timing.copies(op.bytes(case), self.device.l2)
        with self.gpu.active():
            return [
                {
                    name: v.to(self.name, copy=True) if isinstance(v, torch.Tensor) else v
                    for name, v in first.items()
                }
                for _ in range(count)
            ]

    def baseline(self, case: Case, given: Mapping[str, Any]) -> Callable[[], Any]:
        """Eager's call as a user of this device writes it."""
        op = ops.get(case.op)
        if self.gpu is None:
            return op.baseline(case, given)
        with self.gpu.active():
            return (op.gpu_baseline or op.baseline)(case, given)

    def verify(self, case: Case, kernel: Callable[..., Any]) -> check.Verdict:
        """Check a kernel on the device, see check.verify."""
        return check.verify(
            case,
            kernel,
            check.FENCE if self.gpu is None else check.ALIGNED,
            self.name,
            self.device.cores,
        )

    def measure(
        self,
        contenders: Mapping[str, Sequence[Call]],
        seconds: float,
        rounds: int = 5,
        seed: int = 0,
    ) -> Measured:
        """Time contenders, each a call bound to every one of `inputs`; see timing.measure and
        device_timing.measure.
        """
        if self.gpu is None:
            return timing.measure(
                {name: calls[0] for name, calls in contenders.items()}, seconds, rounds, seed
            )
        return device_timing.measure(contenders, seconds, self.gpu, rounds, seed)


COPIES = 2
"""Times the bytes of a case's tensors that measuring it takes of memory at least: contenders have
outputs of their own.
"""


def memory() -> int:
    """Bytes of memory this process may use: the machine's, or what a container leaves of it."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            found = min(found, int(Path(limit).read_text(encoding="ascii")))
    return found


def check_size(cases: Sequence[Case]) -> None:
    """Complain before anything is measured about cases whose tensors this machine cannot hold, also
    those for a GPU: they are made here.

    Raises:
        InputError: with the most rows that fit.
    """
    there = memory()
    for case in cases:
        need = COPIES * ops.get(case.op).bytes(case)
        if need > there:
            got = f"{case.rows} of {case}, which take {need / 1e9:,.0f} GB to measure"
            most = max(1, case.rows * there // need)
            raise InputError(
                got_expected(
                    "rows", got, f"at most some {most} on a machine of {there / 1e9:.0f} GB"
                )
            )


def name_of(device: Device) -> str:
    """PyTorch's name of a device that is here: "cpu", "cuda:1". Starts nothing on it.

    Raises:
        InputError: a GPU that is not here, with what is.
    """
    if device.kind == "cpu":
        return "cpu"
    ordinal = launcher.ordinal_of(device)
    if ordinal is None:
        here = (
            ", ".join(f"cuda:{i}" for i in range(launcher.count()))
            or f"none ({launcher.missing().rstrip('.')})"
        )
        remedy = "For one that is elsewhere: lntune tune --dry-run."
        raise InputError(
            got_expected(
                "device",
                f"{device.name} ({device.isa}), which is not here",
                f"a GPU of this machine: {here}",
                remedy,
            )
        )
    return driver.place(ordinal)


def of(device: Device | None) -> Place:
    """The place of a device; None is this machine's CPU.

    Raises:
        InputError: a GPU that is not here, with what is.
    """
    device = device or device_module.current()
    return Place(device, "cpu") if device.kind == "cpu" else _gpu(device)


@functools.lru_cache(maxsize=8)
def _gpu(device: Device) -> Place:
    name = name_of(device)
    return Place(device, name, device_timing.Cuda(int(name.partition(":")[2] or 0)))
