"""An emulator of GPUs: runs the CUDA C++ that TVM writes on the CPU and checks every access.

    program = emulator.compile(source)
    traffic = program.launch("main_kernel", grid=(rows, 1, 1), block=(128, 1, 1),
                             arguments=[x, y, 1e-5, rows])

A launch computes what the GPU would (up to fused multiply-adds and the last bits of functions such
as `exp`), and raises an error for what a GPU would do silently: see `errors`. It says nothing about
speed, but counts the bytes that pass between the kernel and its tensors.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import struct
import sys
import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lntune.backends.emulated.errors import (
    BarrierError,
    BoundsError,
    EmulatorError,
    MisalignedError,
    RaceError,
)
from lntune.backends.emulated.translate import TYPES, Kernel, Parameter, kernels_of, translate
from lntune.errors import BuildError, InputError, ToolchainError, got_expected
from lntune.system import native, paths, sealed, toolchain
from lntune.system.sealed import DamagedError

if TYPE_CHECKING:
    import torch

__all__ = [
    "BarrierError",
    "BoundsError",
    "EmulatorError",
    "MisalignedError",
    "Moved",
    "Program",
    "RaceError",
    "Traffic",
    "compile",
]

HERE = Path(__file__).parent
PARTS = ("runtime.cc", "fibers.h", "memory.h", "hooks.h", "prelude.h", "half.h")
# Unoptimized: every access the source writes down is made, with the width it is written with. It
# compiles fastest, too.
FLAGS = [
    "-std=gnu++17",
    "-O0",
    "-w",
    "-fPIC",
    "-shared",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
]
RUNTIME_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-shared", "-fno-exceptions", "-fno-rtti"]
ORDERS = ("forward", "backward", "shuffled")
ERRORS = (EmulatorError, BoundsError, MisalignedError, RaceError, BarrierError, EmulatorError)
SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory a block of a current GPU can have."""
MAX_BLOCK, MAX_GRID, MAX_THREADS = (1024, 1024, 64), (2**31 - 1, 65535, 65535), 1024

_one_launch = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Moved:
    """What a launch moved between its threads and one tensor; an atomic update is a load and a
    store.
    """

    loaded: int
    stored: int
    loads: int
    stores: int
    widest: int
    """Bytes loaded, bytes stored, accesses of either kind, and the bytes of the widest one."""


class Traffic(dict[str, Moved]):
    """What a launch moved, by parameter."""


_SIZES = ("bytes", "granule", "pending", "loaded", "stored", "loads", "stores", "widest")


class _Buffer(ctypes.Structure):
    """`Buffer` of memory.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_uint64) for name in _SIZES),
        ("low", ctypes.c_void_p),
        ("cells", ctypes.c_void_p),
    )


@functools.cache
def _key() -> str:
    """Hash of all that decides how a kernel is compiled but the kernel itself."""
    digest = hashlib.sha256(
        repr((native.FORMAT, FLAGS, RUNTIME_FLAGS, toolchain.compiler())).encode()
    )
    for part in PARTS:
        digest.update((HERE / part).read_bytes())
    return digest.hexdigest()[:12]


def _runtime() -> Path:
    """The library all kernels share, compiled now if it is not there yet."""
    path = paths.cached("emulator", f"runtime-{_key()}.so")
    if not path.is_file():
        name = (
            ["-install_name", f"@rpath/{path.name}"]
            if sys.platform == "darwin"
            else [f"-Wl,-soname,{path.name}"]
        )
        with native.atomic(path) as temporary:
            toolchain.run_compiler(
                [*RUNTIME_FLAGS, *name, str(HERE / "runtime.cc"), "-ldl"], temporary
            )
            sealed.seal(temporary, {})
    return path


@functools.cache
def _loaded() -> ctypes.CDLL:
    """That library in this process, once: a kernel finds the first one of its name, whatever folder
    the kernel itself lies in.
    """
    path = _runtime()
    return sealed.loaded(path, lambda: ctypes.CDLL(str(path)))


def _compiled(source: str) -> Path:
    """The library of a kernel.

    Raises:
        EmulatorError: it does not compile.
    """
    code = translate(source)
    path = paths.cached(
        "emulator", f"kernel-{_key()}-{hashlib.sha256(code.encode()).hexdigest()[:16]}.so"
    )
    if path.is_file():
        return path
    runtime = _runtime()
    # With no default libraries the sanitizer's own stays out: the runtime stands in its place.
    darwin = sys.platform == "darwin"
    rest = (
        ["-Wl,-rpath,@loader_path", "-lSystem"]
        if darwin
        else ["-Wl,-rpath,$ORIGIN", "-lm", "-lc", "-lgcc"]
    )
    libraries = ["-nodefaultlibs", str(runtime), *rest]
    with native.atomic(path) as temporary:
        text = temporary.with_suffix(".cc")
        try:
            text.write_text(code, encoding="utf-8")
            toolchain.run_compiler(
                [*FLAGS, "-fsanitize=thread", f"-I{HERE}", str(text), *libraries], temporary
            )
            sealed.seal(temporary, {})
        except ToolchainError:
            raise
        except BuildError as e:
            wrong = [
                line for line in str(e).splitlines() if "error:" in line or "undefined" in line
            ] or str(e).splitlines()[1:]
            raise EmulatorError(
                "the kernel does not compile: " + " | ".join(line.strip() for line in wrong[:3])
            ) from None
        finally:
            text.unlink(missing_ok=True)
    return path


def compile(source: str) -> Program:
    """Compile CUDA C++; cached on disk by content.

    Raises:
        EmulatorError: the source has no kernel, or does not compile.
        ToolchainError: there is no C++ compiler.
    """
    path, kernels = _compiled(source), kernels_of(source)
    try:
        return sealed.loaded(path, lambda: Program(path, kernels))
    except (DamagedError, OSError):
        for damaged in (path, _runtime()):
            damaged.unlink(missing_ok=True)
        return Program(_compiled(source), kernels)


class Program:
    """A compiled source and its kernels."""

    def __init__(self, path: Path, kernels: dict[str, Kernel]) -> None:
        self.kernels = kernels
        self._runtime = _loaded()
        self._library = ctypes.CDLL(str(path))

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[torch.Tensor | int | float],
        shared: int = 0,
        order: str = "forward",
        pending: Collection[str] | None = None,
    ) -> Traffic:
        """Run a kernel on contiguous tensors of the CPU, which it changes in place, and count its
        traffic by parameter.

        `shared` is the size in bytes of the dynamic shared memory; `order` is the one in which
        blocks, and threads between barriers, take their turns. A kernel that is right gives the
        same result in every order. Tensors that share their memory must share all of it. `pending`
        are the tensors that the kernel before this one, which has not ended yet, may still be
        writing; None: it has ended. Until a thread has waited for that it is a race to load from
        these or to store anything.

        Raises:
            InputError: the arguments do not fit the kernel.
            BoundsError, MisalignedError, RaceError, BarrierError: what the kernel does wrong; the
            tensors are as before.
        """
        if kernel not in self.kernels:
            raise InputError(
                got_expected("kernel", repr(kernel), f"one of {', '.join(self.kernels)}")
            )
        signature = self.kernels[kernel]
        _check_shape(signature, grid, block, shared, order)
        if len(arguments) != len(signature.parameters):
            names = ", ".join(p.name for p in signature.parameters)
            raise InputError(
                got_expected(
                    f"arguments of {kernel}",
                    len(arguments),
                    f"{len(signature.parameters)} ({names})",
                )
            )
        buffers: list[_Buffer] = []
        numbers: list[int | None] = []
        values = bytearray()
        for wanted, got in zip(signature.parameters, arguments, strict=True):
            number = _buffer(wanted, got, buffers) if wanted.pointer else None
            numbers.append(number)
            values += struct.pack("<q", number) if number is not None else _scalar(wanted, got)
            if number is not None and wanted.name in (pending or ()):
                buffers[number].pending = 1
        early = pending is not None
        return self._run(signature, grid, block, shared, order, early, buffers, numbers, values)

    def _run(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared: int,
        order: str,
        early: bool,
        buffers: list[_Buffer],
        numbers: list[int | None],
        values: bytearray,
    ) -> Traffic:
        """Launch with prepared arguments."""
        count = len(numbers)
        listed = (_Buffer * max(len(buffers), 1))(*buffers)
        if not buffers:
            listed[0].granule = 1
        stored = (ctypes.c_uint8 * max(len(values), 1)).from_buffer(values or bytearray(1))
        pointers = (ctypes.c_void_p * max(count, 1))(
            *(ctypes.addressof(stored) + 8 * i for i in range(count))
        )
        flags = (ctypes.c_uint8 * max(count, 1))(*(number is not None for number in numbers))
        text = ctypes.create_string_buffer(1024)
        call = getattr(self._library, f"lnt_call_{kernel.name}")
        arrays = ctypes.c_byte.in_dll(self._library, "lnt_arrays")
        with _one_launch:
            failure = self._runtime.lnt_launch(
                call, ctypes.byref(arrays), listed, len(listed), pointers, flags, count,
                (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block), ctypes.c_uint64(shared),
                ORDERS.index(order), early, text, ctypes.c_uint64(len(text)),
            )  # fmt: skip
        if failure:
            raise ERRORS[failure](f"{kernel.name}, {text.value.decode()}")
        moved = [Moved(b.loaded, b.stored, b.loads, b.stores, b.widest) for b in listed]
        return Traffic(
            {
                p.name: moved[n]
                for p, n in zip(kernel.parameters, numbers, strict=True)
                if n is not None
            }
        )


def _check_shape(
    kernel: Kernel, grid: tuple[int, int, int], block: tuple[int, int, int], shared: int, order: str
) -> None:
    """InputError for a launch that a GPU refuses."""
    for name, got, limits in (("grid", grid, MAX_GRID), ("block", block, MAX_BLOCK)):
        if len(got) != len(limits) or not all(
            1 <= n <= limit for n, limit in zip(got, limits, strict=True)
        ):
            raise InputError(got_expected(name, got, f"three numbers from 1 to {limits}"))
    if (threads := block[0] * block[1] * block[2]) > min(kernel.bound, MAX_THREADS):
        raise InputError(
            got_expected(
                "block",
                f"{block}, which are {threads} threads",
                f"at most {kernel.bound} for {kernel.name}",
            )
        )
    if not 0 <= shared <= SHARED_LIMIT:
        raise InputError(got_expected("shared", shared, f"0 to {SHARED_LIMIT} bytes"))
    if order not in ORDERS:
        raise InputError(got_expected("order", repr(order), f"one of {', '.join(ORDERS)}"))


def _buffer(wanted: Parameter, got: torch.Tensor | int | float, buffers: list[_Buffer]) -> int:
    """The number in `buffers` of a tensor's memory, added if it is new."""
    import torch

    dtypes = TYPES[wanted.type][1] if wanted.type in TYPES else ()
    if not isinstance(got, torch.Tensor):
        raise InputError(
            got_expected(f"argument {wanted.name}", repr(got), f"a tensor ({wanted.type}*)")
        )
    dtype = str(got.dtype).removeprefix("torch.")
    if dtypes and dtype not in dtypes:
        raise InputError(
            got_expected(
                f"argument {wanted.name}",
                f"a tensor of {dtype}",
                f"{' or '.join(dtypes)} ({wanted.type}*)",
            )
        )
    if got.device.type != "cpu" or not got[:1].is_contiguous():
        description = f"a tensor on {got.device} with strides {got.stride()}"
        raise InputError(
            got_expected(
                f"argument {wanted.name}",
                description,
                "one on the CPU that is contiguous, but for gaps between rows",
            )
        )
    span = (
        1 + sum((n - 1) * stride for n, stride in zip(got.shape, got.stride(), strict=True))
        if got.numel()
        else 0
    )
    data, size = got.data_ptr(), span * got.element_size()
    for number, other in enumerate(buffers):
        begin = other.data or 0
        if size and (begin, other.bytes) == (data, size):
            return number
        if data < begin + other.bytes and begin < data + size:
            names = f"arguments {other.name.decode()} and {wanted.name}"
            raise InputError(
                got_expected(
                    names, "tensors that overlap in part", "the same memory or none in common"
                )
            )
    buffers.append(
        _Buffer(
            name=wanted.name.encode(), data=data, bytes=size, granule=min(got.element_size(), 4)
        )
    )
    return len(buffers) - 1


def _scalar(wanted: Parameter, got: torch.Tensor | int | float) -> bytes:
    """Eight bytes that hold a number in the parameter's type."""
    number = (
        isinstance(got, int)
        if TYPES.get(wanted.type, ("q",))[0] not in ("f", "d", "e", "")
        else isinstance(got, int | float)
    )
    if wanted.type not in TYPES or not number:
        raise InputError(
            got_expected(f"argument {wanted.name}", repr(got), f"a number ({wanted.type})")
        )
    code = TYPES[wanted.type][0]
    try:
        return (struct.pack(f"<{code}", got) if code else _bfloat16(float(got))).ljust(8, b"\0")
    except (struct.error, OverflowError) as e:
        raise InputError(
            got_expected(f"argument {wanted.name}", got, f"a number that {wanted.type} holds")
        ) from e


def _bfloat16(value: float) -> bytes:
    """The two bytes of a number rounded to bfloat16."""
    import torch

    return int(torch.tensor(value, dtype=torch.bfloat16).view(torch.int16).item()).to_bytes(
        2, "little", signed=True
    )
