"""A GPU's kernel as a function of CPU tensors: what the emulator makes of a program, called like
any built kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lntune import ops
from lntune.backends.cuda import device_code
from lntune.backends.emulated import emulator
from lntune.backends.emulated.emulator import Traffic
from lntune.case import Case
from lntune.transforms import strides


def kernel(
    case: Case,
    program: device_code.Program,
    order: str = "forward",
    seen: list[Traffic] | None = None,
) -> Callable[..., None]:
    """f(*arguments), in the order of the operator's; `order` is that of the threads, `seen`
    collects what each launch read and wrote.

    Buffers between a program's kernels begin as NaN, so that a part that is read without having
    been written shows.

    Raises:
        EmulatorError: the source does not compile; when called: the kernel did what would be an
            error, or undefined, on a device.
    """
    import torch

    code = emulator.compile(program.source)
    arguments = ops.get(case.op).arguments(case)
    matrix = next(i for i, a in enumerate(arguments) if a.shape[:1] == ("rows",))
    free = strides.names(arguments)

    def run(*values: Any) -> None:
        given = dict(zip((a.name for a in arguments), values, strict=True))
        rows = values[matrix].shape[0]
        apart = {stride: given[name].stride(0) for name, stride in free.items()}
        given |= {
            s.name: torch.full(s.sizes(rows), math.nan, dtype=getattr(torch, s.dtype))
            for s in program.scratch
        }
        for launch in program.launches:
            grid = launch.blocks(rows)
            if not all(grid):
                continue  # no launch of an empty grid
            taken = [
                given[name] if name in given else device_code.number(name, rows, apart)
                for name in launch.arguments
            ]
            traffic = code.launch(launch.kernel, grid, launch.block, taken, launch.shared, order)
            if seen is not None:
                seen.append(traffic)

    return run
