"""`lntune build --gpu-pass`: what the first part of a pass takes, put into the cache beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from lntune import backends
from lntune.case import Case
from lntune.commands import build as prebuild
from lntune.commands.build import Built
from lntune.commands.gpu_pass import plan, roundtrips
from lntune.device import Device, usable_cores
from lntune.errors import InputError, got_expected


def build(
    devices: Sequence[Device],
    on_kernel: Callable[[int, int, Case, Device], None] = lambda *_: None,
) -> list[Built]:
    """Build the kernels of the first part for GPUs that need not be here, several at a time, and
    what loads and calls them. `on_kernel` is told number, how many, case and device before each.

    Raises:
        InputError: a device is no GPU of CUDA's.
        ToolchainError, BuildError: there is no compiler; or the kernels that take the time of round
            trips cannot be built.
    """
    for device in devices:
        if not backends.of(device).multi_arch:
            expected = "a GPU: cuda, cuda:sm_90 or a product"
            raise InputError(got_expected("--target", device.name, expected))
    prebuild.ensure_libraries(devices)
    todo = [
        (device, *one) for device in devices for one in plan.kernels(device, plan.sizes_for(device))
    ]
    for device in devices:
        for kernel in roundtrips.BLOCKS:
            roundtrips.prepare(kernel, device.isa)

    def one(number: int) -> Built:
        device, case, candidate = todo[number]
        on_kernel(number, len(todo), case, device)
        chosen = Built(
            case,
            device.name,
            device.isa,
            "default",
            candidate.schedule,
            candidate.knobs,
            strided=False,
            status="failed",
        )
        return prebuild.build_chosen(chosen, device)

    with ThreadPoolExecutor(usable_cores()) as pool:
        return list(pool.map(one, range(len(todo))))
