"""A GPU's kernel as a function of CPU tensors: what the emulator makes of a program, called like
any built kernel.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

from lntune import ops
from lntune.backends.cuda import row_counts, sizes
from lntune.backends.cuda.device_code import Binary, Launch, Program, Scratch
from lntune.backends.emulated import emulator
from lntune.backends.emulated.emulator import Traffic
from lntune.case import Case
from lntune.transforms import strides


def kernel(
    case: Case,
    program: Program,
    order: str = "forward",
    seen: list[Traffic] | None = None,
    pending: Collection[str] | None = None,
) -> Callable[..., None]:
    """f(*arguments), in the order of the operator's; `order` is that of the threads, `seen`
    collects what each launch read and wrote; `pending`, for a program of one kernel, as
    emulator.Program.launch's.

    Buffers between a program's kernels begin as NaN, so that a part that is read without having
    been written shows.

    Raises:
        EmulatorError: the source does not compile; when called: the kernel did what would be an
            error, or undefined, on a device.
    """
    arguments = ops.get(case.op).arguments(case)
    names = [a.name for a in arguments]
    matrix = next(i for i, a in enumerate(arguments) if a.shape[:1] == ("rows",))
    code, free = emulator.compile(program.source), strides.names(arguments)

    def run(*values: Any) -> None:
        named = dict(zip(names, values, strict=True))
        rows = values[matrix].shape[0]
        steps = {stride: named[name].stride(0) for name, stride in free.items()}
        _launch(code, program.launches, program.scratch, named, rows, steps, order, seen, pending)

    return row_counts.with_launches(run, program.launches)


def function(binary: Binary) -> Callable[..., None]:
    """A stored program, whose image is its CUDA source, as a tvm_ffi.Function of CPU tensors.

    Raises:
        EmulatorError: as kernel.
    """
    import tvm_ffi

    code = emulator.compile(next(iter(binary.images.values())).decode())
    names = [a.name for a in binary.arguments]
    matrix = next(i for i, a in enumerate(binary.arguments) if a.shape[:1] == ("rows",))

    def run(*values: Any) -> None:
        tensors = [_view(v) if isinstance(v, tvm_ffi.Tensor) else v for v in values]
        named = dict(zip(names, tensors, strict=True))
        rows = tensors[matrix].shape[0]
        steps = {a.stride: named[a.name].stride(0) for a in binary.arguments if a.stride}
        _launch(code, binary.launches, binary.scratch, named, rows, steps)

    called: Callable[..., None] = tvm_ffi.convert(run)
    return row_counts.with_launches(called, binary.launches)


def _view(tensor: Any) -> Any:
    """PyTorch's view of memory that a call has as a bare DLTensor, which nobody owns: only its
    fields may be read, tvm_ffi 0.1 crashes where it is asked for a DLPack of it.
    """
    import torch

    dtype = getattr(torch, str(tensor.dtype))
    if not tensor.numel():
        return torch.empty(tensor.shape, dtype=dtype)
    strides = tensor.strides
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, strides, strict=True))
    memory = (ctypes.c_char * (span * dtype.itemsize)).from_address(tensor.data_ptr())
    return torch.frombuffer(memory, dtype=dtype).as_strided(tensor.shape, strides)


def _launch(
    code: emulator.Program,
    launches: Sequence[Launch],
    scratch: Sequence[Scratch],
    named: dict[str, Any],
    rows: int,
    steps: dict[str, int],
    order: str = "forward",
    seen: list[Traffic] | None = None,
    pending: Collection[str] | None = None,
) -> None:
    """All launches of a call, whose values are `named`; `steps` are the row strides."""
    import torch

    buffers = {
        s.name: torch.full(s.sizes(rows), math.nan, dtype=getattr(torch, s.dtype)) for s in scratch
    }
    values = {**named, **buffers}
    for launch in launches:
        grid = launch.blocks(rows)
        if not all(grid):
            continue  # no launch of an empty grid
        passed = [
            values[name] if name in values else sizes.number(name, rows, steps)
            for name in launch.arguments
        ]
        traffic = code.launch(
            launch.kernel, grid, launch.block, passed, launch.shared, order, pending
        )
        if seen is not None:
            seen.append(traffic)
