"""A GPU that is imagined: everything above the driver runs as on a machine with one, and kernels
run in the emulator on CPU tensors.

    def test_something(fake_gpu: FakeGpu) -> None:
        device = launcher.device(0)  # an sm_90 with 132 multiprocessors
        kernel = artifact.kernel(case, schedule, setting, device)
        kernel(*tensors_of_the_cpu)  # launched through launcher.c, run by the emulator

In the test `launcher.count()` is 1; kernels are built without a CUDA compiler (device code is the
CUDA source itself) and stored in the cache under names of their own. `fake_gpu.log()` has the
driver's calls, `fake_gpu.fail(function, status)` makes one fail, `fake_gpu.setup(count=2)` imagines
more. What the emulator finds wrong with a kernel (a race, an access out of bounds) is a launch
error, and fails the test when it ends, unless the test takes it out of `fake_gpu.errors`. Processes
that the test starts have the GPU too.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import host_gpu
import msgspec
import pytest

from lntune.backends import cuda
from lntune.backends.cuda import Compiled, driver, launcher, sizes
from lntune.backends.cuda import timing as device_timing
from lntune.backends.cuda.device_code import Binary, Launch
from lntune.backends.emulated import emulator
from lntune.system import native, paths, toolchain

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "fake_driver.c"
LAUNCH_FAILED = 719
SITE = f"""
import sys
sys.path.append({str(HERE)!r})
import fake_gpu
fake_gpu.FakeGpu().install(setattr)
"""
_LAUNCHED = ctypes.CFUNCTYPE(
    ctypes.c_int,  # the result
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_int,
)
"""`Launched` of fake_driver.c."""


def library(without: str = "") -> Path:
    """The fake driver, compiled once for each cache folder; `without` some of its functions, see
    there.
    """
    name = f"fake_driver{without.lower()}-{native.source_hash(SOURCE)}.so"
    path = paths.cache_dir() / "runtime" / name
    if not path.is_file():
        options = ["-O1", "-shared", "-fPIC", *([f"-DWITHOUT{without}"] if without else [])]
        with native.atomic(path) as temporary:
            toolchain.run_compiler([*options, str(SOURCE), "-lpthread"], temporary)
    return path


def to_cubin(source: str, arch: str) -> Compiled:
    """The source in the place of device code, with a log and PTX in which each kernel takes 32
    registers and loads and stores 16 bytes.
    """
    cuda.architecture(arch)
    names = re.findall(r"__global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\(", source)
    used = (
        "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nUsed 32 registers, used 1"
        " barriers\n"
    )
    log = "".join(f"Compiling entry function '{name}' for '{arch}'\n{used}" for name in names)
    body = (
        "{\nld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd1];\nst.global.v4.f32 [%rd1], {%f1, %f2,"
        " %f3, %f4};\n}\n"
    )
    return Compiled(
        source.encode() + b"\0", log, "".join(f".visible .entry {name}()\n{body}" for name in names)
    )


class FakeGpu:
    """The imagined machine; see above."""

    def __init__(self, without: str = "") -> None:
        self.path = library(without)
        self.calls = ctypes.CDLL(str(self.path))
        self.calls.fake_log.restype = ctypes.c_char_p
        self.errors: list[Exception] = []
        self.order = "forward"
        self.pending: list[tuple[int, int]] = []
        """Memory (address, bytes) that was written since the last ordinary launch."""
        self._launched = _LAUNCHED(self._launch)
        self._known: dict[tuple[str, str], tuple[Binary, Launch]] = {}

    def setup(
        self, count: int = 1, version: int = 13000, capabilities: tuple[tuple[int, int], ...] = ()
    ) -> None:
        """Another machine from now on: GPUs, the CUDA release their driver is for, compute
        capabilities (9.0 where not given).
        """
        self.calls.fake_set(version, count, self._launched)
        for i, (major, minor) in enumerate(capabilities):
            self.calls.fake_capability(i, major, minor)
        driver._opened.pop((str(self.path), driver.CPU), None)

    def fail(self, function: str = "", status: int = 0) -> None:
        """Every call of one of the driver's functions gives this CUresult from now on; without
        arguments none does.
        """
        self.calls.fake_fail(function.encode(), status)

    def log(self) -> list[str]:
        """Calls of the driver since it was asked last: function, kernel, number."""
        lines = self.calls.fake_log().decode().splitlines()
        self.calls.fake_forget()
        return [" ".join(line.split()) for line in lines]

    def current(self, device: int | None) -> None:
        """Make a GPU's context current in this thread, or none."""
        self.calls.fake_current(-1 if device is None else device)

    @property
    def depth(self) -> int:
        """Contexts on this thread's stack."""
        return int(self.calls.fake_depth())

    def install(self, put: Callable[[Any, str, Any], None]) -> None:
        """Take the place of the driver and of the CUDA compiler; `put` is setattr, or a
        monkeypatch's.
        """
        load = launcher.load

        def known(binary: Binary) -> Callable[..., None]:
            """The kernel, whose launches are told the number of rows and their strides: sizes of
            buffers follow from these.
            """
            for launch in binary.launches:
                for image in binary.images.values():
                    self._known[image.rstrip(b"\0").decode(), launch.kernel] = binary, launch
            numbers = ("rows", *(a.stride for a in binary.arguments if a.stride))
            launches = tuple(
                msgspec.structs.replace(launch, arguments=(*launch.arguments, *numbers))
                for launch in binary.launches
            )
            return load(msgspec.structs.replace(binary, launches=launches))

        put(launcher, "load", known)
        put(cuda, "to_cubin", to_cubin)
        put(cuda, "identity", lambda: "no compiler: the source itself")
        put(cuda, "stamp", lambda: "fake")
        put(cuda, "available", lambda: "")
        put(driver, "_chosen", (str(self.path), driver.CPU))
        put(device_timing, "Cuda", host_gpu.HostGpu)
        put(device_timing, "FEW", 2)
        host_gpu.broken.clear()
        self.setup()

    def _launch(
        self,
        _device: int,
        image: bytes,
        kernel: bytes,
        sizes: Any,
        shared: int,
        _stream: int,
        parameters: Any,
        early: int,
    ) -> int:
        """A launch, run by the emulator on the memory that its parameters point to; an early one
        finds that what was written since the last ordinary one may be on its way still.
        """
        try:
            source = image.decode()
            binary, launch = self._known[source, kernel.decode()]
            count, strided = len(launch.arguments), sum(bool(a.stride) for a in binary.arguments)
            rows, *distances = (
                ctypes.cast(parameters[i], ctypes.POINTER(ctypes.c_int64))[0]
                for i in range(count, count + 1 + strided)
            )
            strides = dict(
                zip((a.stride for a in binary.arguments if a.stride), distances, strict=True)
            )
            values = [
                self._value(binary, name, rows, strides, parameters[i])
                for i, name in enumerate(launch.arguments)
            ]
            got = list(sizes[0:6])
            named = dict(zip(launch.arguments, values, strict=True))
            if not early:
                self.pending.clear()
            pending = [name for name, value in named.items() if self._is_pending(value)]
            emulator.compile(source).launch(
                kernel.decode(),
                tuple(got[:3]),
                tuple(got[3:]),
                values,
                shared,
                self.order,
                pending if early else None,
            )
            for argument in binary.arguments:
                if argument.role in ("out", "sum") and argument.name in named:
                    self.wrote(named[argument.name])
            return 0
        except Exception as e:
            self.errors.append(e)
            host_gpu.broken.append("unspecified launch failure")
            return LAUNCH_FAILED

    def wrote(self, tensor: Any) -> None:
        """Somebody put work before the next launch that writes a tensor."""
        if tensor.numel():
            self.pending.append((tensor.data_ptr(), tensor.numel() * tensor.element_size()))

    def _is_pending(self, value: Any) -> bool:
        """Whether a tensor's memory has a part that may not be written yet."""
        if not hasattr(value, "data_ptr") or not value.numel():
            return False
        begin = value.data_ptr()
        end = begin + value.numel() * value.element_size()
        return any(begin < at + size and at < end for at, size in self.pending)

    @staticmethod
    def _value(binary: Binary, name: str, rows: int, strides: dict[str, int], at: int) -> Any:
        """A parameter as the emulator takes it: a tensor of the memory a pointer leads to, or a
        number.
        """
        import torch

        argument = next((a for a in (*binary.arguments, *binary.scratch) if a.name == name), None)
        if argument is None:
            number = ctypes.cast(at, ctypes.POINTER(ctypes.c_int64))[0]
            assert number == sizes.number(name, rows, strides), (
                f"{name} of {rows} rows, {strides}: {number}"
            )
            return number
        if getattr(argument, "role", "") == "scalar":
            kind = {
                "float32": ctypes.c_float,
                "float64": ctypes.c_double,
                "int32": ctypes.c_int32,
                "int64": ctypes.c_int64,
            }[argument.dtype]
            return ctypes.cast(at, ctypes.POINTER(kind))[0]
        pointer = ctypes.cast(at, ctypes.POINTER(ctypes.c_void_p))[0]
        shape = [sizes.number(size, rows) for size in argument.shape]
        dtype = getattr(torch, argument.dtype)
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype)
        stride = strides.get(getattr(argument, "stride", ""), math.prod(shape[1:]))
        span = (shape[0] - 1) * stride + math.prod(shape[1:]) if shape else 1
        memory = (ctypes.c_char * (span * dtype.itemsize)).from_address(pointer)
        whole = torch.frombuffer(memory, dtype=dtype)
        return (
            whole.as_strided(shape, (stride, *torch.empty(shape[1:], device="meta").stride()))
            if shape
            else whole.reshape(shape)
        )


@pytest.fixture
def fake_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FakeGpu]:
    """A machine with one imagined sm_90, whose kernels run on tensors of the CPU; see the
    module.
    """
    machine = FakeGpu()
    machine.install(monkeypatch.setattr)
    # the emulator takes seconds for the rows of a first check
    monkeypatch.setenv("LNTUNE_CHECK", "0")
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(SITE)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    )
    yield machine
    machine.fail()
    assert not machine.errors, machine.errors
    assert machine.depth == 0
