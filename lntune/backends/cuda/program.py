"""From a scheduled GPU kernel to CUDA source and the launches it takes."""

from __future__ import annotations

from typing import Any

from lntune import ops
from lntune.backends.backend import TVM, Scheduled
from lntune.backends.cuda import device_code
from lntune.backends.cuda.device_code import Program
from lntune.device import Device
from lntune.transforms import strides

WARP, MOST_THREADS = 32, 1024


def target(device: Device) -> dict[str, Any]:
    """The TVM target of a GPU, as the dictionary that tvm.target.Target takes."""
    return {
        "kind": "cuda",
        "arch": device.isa,
        "max_threads_per_block": MOST_THREADS,
        "thread_warp_size": WARP,
    }


def program(scheduled: Scheduled) -> Program:
    """CUDA source of a scheduled kernel, for a GPU that need not be here; what it was lowered to
    before, where it was.

    Raises:
        BuildError: TVM cannot compile it.
    """
    if scheduled.program is not None:
        lowered: Program = scheduled.program
        return lowered
    arguments = ops.get(scheduled.case.op).arguments(scheduled.case)
    free = strides.names(arguments) if scheduled.strided else {}
    goal = target(scheduled.device)
    with TVM:
        return device_code.generate(scheduled.module, goal, tuple(free.values()))
