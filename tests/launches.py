"""What the launcher's tests share: kernels written by hand, tensors as C passes them, and the
kernel of a small layer norm.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import tvm_ffi
from fake_gpu import FakeGpu
from kernel_arguments import arguments

from lntune import schedule
from lntune.backends.cuda import launcher
from lntune.backends.cuda.device_code import Argument, Binary, Launch, Scratch
from lntune.case import Case
from lntune.kernels import cache

CASE = Case("layer_norm", 96, "float32", 8, "weight+bias")
PLAN = next(iter(schedule.for_op("layer_norm", "gpu").values()))


def kernel_of(case: Case = CASE, strided: bool = False, **changed: Any) -> Any:
    """The kernel of a case by the first schedule, with its default knobs or some of them
    changed; `strided`: for rows that may lie apart.
    """
    device = launcher.device(0)
    setting = PLAN.default(case.typical, device)
    knobs = type(setting)(**{**vars(setting), **changed})
    return cache.kernel(case, PLAN, knobs, device, strided)


def tensors(rows: int = 5, case: Case = CASE) -> dict[str, Any]:
    """Arguments by name, in the order of the operator's."""
    return arguments(case, rows)


def right(values: dict[str, Any]) -> bool:
    """True when y is the layer norm of x."""
    truth = torch.nn.functional.layer_norm(
        values["x"], values["x"].shape[1:], values["weight"], values["bias"], values["eps"]
    )
    return torch.allclose(values["y"], truth, atol=1e-5)


def launches(fake_gpu: FakeGpu) -> int:
    """Launches since the log was read last."""
    return sum(line.startswith("cuLaunchKernel") for line in fake_gpu.log())


TWO = """
extern "C" __global__ void first(float* x, float* part, float* total, int64_t many) {
  if (threadIdx.x == 0) part[blockIdx.x] = x[blockIdx.x * 2] + x[blockIdx.x * 2 + 1];
  if (threadIdx.x == 0 && blockIdx.x == 0) total[0] = (float)many;
}
extern "C" __global__ void second(float* part, float* total, float factor, float* y) {
  y[blockIdx.x] = factor * part[blockIdx.x] + total[0];
}
"""
X, FACTOR, Y = (
    Argument("x", "in", "float32", ("rows", "2")),
    Argument("factor", "scalar", "float32", ()),
    Argument("y", "out", "float32", ("rows",)),
)


def two(**changed: Any) -> Binary:
    """y = factor times the sums of rows of two, plus a number, in two kernels with scratch between
    them.
    """
    binary = Binary(
        title="two kernels",
        arguments=(X, FACTOR, Y),
        vector_width=1,
        launches=(
            Launch(
                "first", ("x", "part", "total", "((rows + 3) // 4)"), ("rows", "1", "1"), (32, 1, 1)
            ),
            Launch("second", ("part", "total", "factor", "y"), ("rows", "1", "1"), (1, 1, 1)),
        ),
        scratch=(Scratch("part", ("rows",), "float32"), Scratch("total", ("1",), "float32")),
        images={"sm_90": TWO.encode() + b"\0"},
        ptx="",
        compiler="none",
    )
    return Binary(**{**{f: getattr(binary, f) for f in binary.__struct_fields__}, **changed})


class Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int * 2),
        ("ndim", ctypes.c_int),
        ("dtype", ctypes.c_ubyte * 4),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class AnyView(ctypes.Structure):
    """TVMFFIAny, of a tensor or a float."""

    _fields_ = (("type", ctypes.c_int), ("padding", ctypes.c_uint), ("value", ctypes.c_uint64))


def raw(
    data: torch.Tensor | None,
    shape: tuple[int, ...],
    device: tuple[int, int] = (1, 0),
    offset: int = 0,
) -> Tensor:
    """A DLTensor of float32 made by hand, without strides."""
    dims = (ctypes.c_int64 * len(shape))(*shape)
    dtype = (ctypes.c_ubyte * 4)(2, 32, 1, 0)
    pointer = data.data_ptr() - offset if data is not None else 0
    return Tensor(
        pointer,
        (ctypes.c_int * 2)(*device),
        len(shape),
        dtype,
        ctypes.cast(dims, ctypes.POINTER(ctypes.c_int64)),
        None,
        offset,
    )


def call(kernel: Any, *values: Tensor | float) -> str:
    """Call a kernel as C does; its error's text, empty where there is none."""
    ffi = ctypes.CDLL(tvm_ffi.libinfo.find_libtvm_ffi())
    packed = (AnyView * len(values))()
    for one, value in zip(packed, values, strict=True):
        one.type = 3 if isinstance(value, float) else 7
        one.value = (
            int.from_bytes(ctypes.c_double(value), "little")
            if isinstance(value, float)
            else ctypes.addressof(value)
        )
    if not ffi.TVMFFIFunctionCall(
        ctypes.c_void_p(kernel.__chandle__()), packed, len(values), ctypes.byref(AnyView())
    ):
        return ""
    error = ctypes.c_void_p()
    ffi.TVMFFIErrorMoveFromRaised(ctypes.byref(error))
    size = ctypes.cast((error.value or 0) + 24 + 24, ctypes.POINTER(ctypes.c_size_t))[0]
    return ctypes.string_at(
        ctypes.cast((error.value or 0) + 24 + 16, ctypes.POINTER(ctypes.c_void_p))[0], size
    ).decode()
