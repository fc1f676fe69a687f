"""How long blocks of threads take to hear from each other, and what a node of a graph takes: the
kernels of roundtrips.cu, built beforehand and launched as lntune's own are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lntune import backends
from lntune.backends import cuda
from lntune.backends.cuda import launcher, stored
from lntune.backends.cuda import timing as gpu_timing
from lntune.backends.cuda.device_code import Argument, Binary, Launch
from lntune.commands.gpu_pass import checks
from lntune.device import Device
from lntune.errors import LaunchError
from lntune.system import native, paths, sealed

SOURCE = Path(__file__).with_name("roundtrips.cu")
BLOCKS = {
    "empty_node": (1, 32),
    "cluster_barrier": (128, 128),
    "distributed_shared": (2, 32),
    "l2_flag": (2, 32),
    "grid_barrier": (128, 32),
}
"""Kernel -> (blocks, threads of a block). All blocks of a kernel are resident at once, as they wait
for each other.
"""
FLAGS = 64
SHORT, LONG = 200, 2200
"""Round trips of two launches, whose difference is free of what a launch takes."""


def path_of(kernel: str, arch: str) -> Path:
    """Where a kernel lies once built, whatever compiles it."""
    name = f"{kernel}-{native.source_hash(SOURCE)}-{arch}.{native.FORMAT}.gpu"
    return paths.cached("kernels", "roundtrips", name)


def prepare(kernel: str, arch: str) -> Path:
    """The file of a kernel for an architecture, built now where it is not there.

    Raises:
        BuildError: it does not compile, or cannot be stored; ToolchainError: there is no compiler.
    """
    path = path_of(kernel, arch)
    if path.is_file():
        return path
    compiled = cuda.to_cubin(SOURCE.read_text(encoding="utf-8"), arch)
    blocks, threads = BLOCKS[kernel]
    binary = Binary(
        title=f"round trips ({kernel})",
        arguments=(
            Argument("out", "out", "int64", ("rows",)),
            Argument("flags", "sum", "int32", (str(FLAGS),)),
        ),
        vector_width=1,
        launches=(
            Launch(kernel, ("out", "flags", "rows"), (str(blocks), "1", "1"), (threads, 1, 1)),
        ),
        scratch=(),
        images={arch: compiled.cubin},
        ptx="",
        compiler=cuda.identity(),
    )
    with native.atomic(path) as temporary:
        sealed.seal(temporary, stored.write(temporary, binary))
    return path


def measure(kernel: str, device: Device, seconds: float) -> dict[str, Any]:
    """Microseconds of one round trip, `us`, and its clock `cycles`; of an empty kernel the
    microseconds that a node of a graph takes, and no cycles.

    Raises:
        BuildError: the kernel was not built.
        LaunchError: the GPU refuses it, or a wait in it was given up.
    """
    import torch

    place = backends.of(device).torch_device(device)
    launch = launcher.load(stored.read(prepare(kernel, device.isa)))
    flags = torch.zeros(FLAGS, dtype=torch.int32, device=place)
    outs = {count: torch.zeros(count, dtype=torch.int64, device=place) for count in (SHORT, LONG)}

    def call(count: int) -> Callable[[], None]:
        return lambda: launch(outs[count], flags)

    contenders = {str(count): [call(count)] for count in outs}
    measured = gpu_timing.measure(contenders, seconds, checks.clock_of(device))
    short, long = (measured.timings[str(count)].median_us for count in (SHORT, LONG))
    if kernel == "empty_node":
        return {"us": short, "clocks": measured.clocks}
    cycles = [int(out[0].item()) for out in outs.values()]
    if min(cycles) < 0:
        raise LaunchError(f"{kernel}: a wait was given up, or this GPU has no clusters.")
    return {
        "us": (long - short) / (LONG - SHORT),
        "cycles": (cycles[1] - cycles[0]) / (LONG - SHORT),
        "clocks": measured.clocks,
    }
