"""The launcher and the driver: errors, several GPUs, and whose streams and memory are used (with a
driver that is imagined).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import tvm_ffi
from fake_gpu import FakeGpu
from launches import TWO, Tensor, call, kernel_of, raw, right, tensors, two

from lntune.backends.cuda import driver, launcher
from lntune.backends.cuda.device_code import Launch
from lntune.errors import BuildError, InputError, LaunchError, ToolchainError

# What the driver refuses.


@pytest.mark.parametrize(
    ("function", "status", "message"),
    [
        (
            "cuLaunchKernel",
            1,
            (
                r"the launch of main_kernel on cuda:0 failed: CUDA_ERROR_INVALID_VALUE \(error 1,"
                r" invalid argument\)"
            ),
        ),
        (
            "cuLaunchKernel",
            701,
            "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES.*more registers or shared memory",
        ),
        ("cuLaunchKernel", 700, "CUDA_ERROR_ILLEGAL_ADDRESS.*a kernel before this one failed"),
        ("cuLaunchKernel", 12345, r"an unknown error \(error 12345\)"),
        (
            "cuCtxPushCurrent_v2",
            3,
            "making the GPU current on cuda:0 failed: CUDA_ERROR_NOT_INITIALIZED.*forked",
        ),
        (
            "cuKernelGetFunction",
            900,
            "loading main_kernel on cuda:0 failed.*captured in a CUDA graph",
        ),
        (
            "cuKernelGetFunction",
            209,
            (
                "loading main_kernel on cuda:0 failed: CUDA_ERROR_NO_BINARY_FOR_GPU.*older than the"
                " compiler"
            ),
        ),
    ],
)
def test_launch_errors(fake_gpu: FakeGpu, function: str, status: int, message: str) -> None:
    """The driver's error comes as an exception with its name, operator and case, and what it likely
    means; the next call works.
    """
    kernel, values = kernel_of(), tensors()
    fake_gpu.fail(function, status)
    with pytest.raises(
        LaunchError, match=rf"^layer_norm of hidden size 96, float32, weight\+bias .*{message}"
    ):
        kernel(*values.values())
    assert fake_gpu.depth == 0
    fake_gpu.fail()
    kernel(*values.values())
    assert right(values)


def test_what_the_emulator_finds_is_a_launch_error(fake_gpu: FakeGpu) -> None:
    """A kernel that writes out of bounds under the imagined driver fails like one on a device, and
    the test is told why.
    """
    bad = TWO.replace("y[blockIdx.x]", "y[blockIdx.x + 1]")
    with pytest.raises(LaunchError, match="the launch of second"):
        launcher.load(two(images={"sm_90": bad.encode() + b"\0"}))(
            torch.zeros(2, 2), 1.0, torch.zeros(2)
        )
    assert "second" in str(fake_gpu.errors.pop())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"images": {"sm_90": b"not a kernel\0"}},
            (
                r"two kernels \(sm_90, made by none, for a driver of CUDA 13.0\).*load the image:"
                r" CUDA_ERROR_INVALID_IMAGE"
            ),
        ),
        (
            {"launches": (Launch("third", ("x",), ("rows", "1", "1"), (1, 1, 1)),)},
            "cannot load third: CUDA_ERROR_NOT_FOUND",
        ),
        ({"images": {"sm_80": b""}}, "two kernels is built for sm_80; the GPUs here are sm_90"),
        (
            {"images": {"sm_100": b""}, "ptx": "__global__"},
            "two kernels is built for sm_100; the GPUs here are sm_90",
        ),
    ],
)
def test_load_errors(fake_gpu: FakeGpu, changed: dict[str, Any], message: str) -> None:
    """What the driver cannot load, and what is for other GPUs, is told when the kernel is loaded,
    with what made it.
    """
    with pytest.raises(BuildError, match=message):
        launcher.load(two(**changed))


# Several GPUs.


def test_another_gpu_is_made_current(fake_gpu: FakeGpu) -> None:
    """A call launches on the GPU of its tensors, whatever was current, which it is again
    afterwards, also after an error.
    """
    fake_gpu.setup(2)
    x, y = torch.randn(3, 2), torch.empty(3)
    for current, device, pushed in (
        (0, 0, []),
        (0, 1, [1]),
        (1, 1, []),
        (1, 0, [0]),
        (None, 0, [0]),
    ):
        fake_gpu.current(current)
        fake_gpu.log()
        single = Launch("second", ("x", "x", "factor", "y"), ("rows", "1", "1"), (1, 1, 1))
        kernel = launcher.load(two(launches=(single,), scratch=()))
        fake_gpu.log()
        assert call(kernel, raw(x, (3, 2), (1, device)), 2.0, raw(y, (3,), (1, device))) == ""
        log = fake_gpu.log()
        assert [int(line.split()[-1]) for line in log if line.startswith("cuCtxPush")] == pushed
        assert [int(line.split()[-1]) for line in log if line.startswith("cuCtxPop")] == pushed
        assert [line for line in log if line.startswith("cuLaunch")] == [
            f"cuLaunchKernel second {device}"
        ]
        assert fake_gpu.depth == (current is not None)
        fake_gpu.fail("cuLaunchKernel", 701)
        assert "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES" in call(
            kernel, raw(x, (3, 2), (1, device)), 2.0, raw(y, (3,), (1, device))
        )
        fake_gpu.fail()
        assert fake_gpu.depth == (current is not None)
    fake_gpu.current(None)


def test_a_primary_context_is_asked_for_once(fake_gpu: FakeGpu) -> None:
    """However many kernels and calls there are; and a GPU nothing uses gets none."""
    fake_gpu.setup(2)
    fake_gpu.log()
    for _ in range(2):
        kernel = launcher.load(two())
        for _ in range(2):
            kernel(torch.randn(3, 2), 2.0, torch.empty(3))
    assert [line for line in fake_gpu.log() if line.startswith("cuDevicePrimaryCtxRetain")] == [
        "cuDevicePrimaryCtxRetain 0"
    ]


def test_functions_are_loaded_before_a_capture(fake_gpu: FakeGpu) -> None:
    """On a GPU in use a kernel's functions are loaded with the kernel, else in its first call;
    later calls only launch.
    """
    fake_gpu.current(0)
    kernel = launcher.load(two())
    assert [line for line in fake_gpu.log() if line.startswith("cuKernelGetFunction")] == [
        "cuKernelGetFunction first 0",
        "cuKernelGetFunction second 0",
    ]
    for _ in range(2):
        kernel(torch.randn(3, 2), 2.0, torch.empty(3))
        assert fake_gpu.log() == ["cuLaunchKernel first 0", "cuLaunchKernel second 0"]
    fake_gpu.current(None)


def test_each_gpu_gets_its_own_image(fake_gpu: FakeGpu) -> None:
    """In one process an sm_90 and an sm_86 run what was built for them; an sm_75, for which nothing
    was, is refused by name.
    """
    fake_gpu.setup(3, capabilities=((9, 0), (8, 6), (7, 5)))
    other = TWO.replace("+ total[0]", "+ total[0] + 100.0f")
    single = Launch("second", ("x", "x", "factor", "y"), ("rows", "1", "1"), (1, 1, 1))
    kernel = launcher.load(
        two(
            images={"sm_80": other.encode() + b"\0", "sm_90": TWO.encode() + b"\0"},
            launches=(single,),
            scratch=(),
        )
    )
    x, results = torch.ones(1, 2), []
    for device in (0, 1):
        y = torch.zeros(1)
        assert call(kernel, raw(x, (1, 2), (1, device)), 2.0, raw(y, (1,), (1, device))) == ""
        results.append(y.item())
    assert results == [3.0, 103.0]
    assert "expected a GPU of the architecture" in call(
        kernel, raw(x, (1, 2), (1, 2)), 2.0, raw(y, (1,), (1, 2))
    )


@pytest.mark.parametrize(
    ("archs", "ptx", "capability", "expected"),
    [
        (("sm_80", "sm_86", "sm_90"), "p", (8, 6), "sm_86"),
        (("sm_80", "sm_86", "sm_90"), "p", (8, 9), "sm_86"),
        (("sm_80", "sm_90"), "p", (8, 0), "sm_80"),
        (("sm_90",), "p", (8, 9), None),
        (("sm_80", "sm_90"), "p", (10, 0), "ptx"),
        (("sm_80", "sm_90"), "", (10, 0), None),
        (("sm_100",), "p", (10, 3), "sm_100"),
        (("sm_100",), "p", (12, 0), "ptx"),
        (("sm_120",), "p", (10, 0), None),
        (("sm_86",), "p", (8, 0), None),
    ],
)
def test_the_image_for_a_gpu(
    archs: tuple[str, ...], ptx: str, capability: tuple[int, int], expected: str | None
) -> None:
    """Its own architecture's, else the nearest below it of its family, else PTX of an older
    architecture, else none.
    """
    assert (
        launcher.image_for(two(images=dict.fromkeys(archs, b""), ptx=ptx), capability) == expected
    )


# PyTorch's stream and memory.


class Exchange(ctypes.Structure):
    """DLPackExchangeAPI: two words of version, a pointer, and six functions."""

    _fields_ = (
        ("version", ctypes.c_uint32 * 2),
        ("previous", ctypes.c_void_p),
        ("functions", ctypes.c_void_p * 5),
    )


class Managed(ctypes.Structure):
    """DLManagedTensorVersioned."""

    _fields_ = (
        ("version", ctypes.c_uint32 * 2),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )


ALLOCATE = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.POINTER(Tensor),
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
    ctypes.c_void_p,
)
SAY = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p)
DELETE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
STREAM = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p))


class Framework:
    """A framework in PyTorch's place, which tells what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.full = False
        self.memory = torch.zeros(1 << 16, dtype=torch.uint8)
        self.managed = Managed()
        self._functions = (
            ALLOCATE(self._allocate),
            STREAM(self._stream),
            DELETE(lambda _: self.asked.append(("free", None))),
        )
        self.managed.deleter = ctypes.cast(self._functions[2], ctypes.c_void_p)
        pointers = [ctypes.cast(f, ctypes.c_void_p).value for f in self._functions[:2]]
        self.table = Exchange(
            (ctypes.c_uint32 * 2)(1, 3),
            None,
            (ctypes.c_void_p * 5)(pointers[0], None, None, None, pointers[1]),
        )

    def _allocate(self, prototype: Any, out: Any, context: int, say: int) -> int:
        shape = prototype[0]
        self.asked.append(
            ("allocate", (tuple(shape.device), shape.shape[0], tuple(shape.dtype)[:2]))
        )
        if self.full:
            SAY(say)(context, b"MemoryError", b"the GPU is full")
            return -1
        self.managed.tensor.data = self.memory.data_ptr()
        out[0] = ctypes.addressof(self.managed)
        return 0

    def _stream(self, kind: int, device: int, out: Any) -> int:
        self.asked.append(("stream", (kind, device)))
        out[0] = 0x5EED
        return 0


@pytest.fixture
def framework(fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[Framework]:
    """A framework that the launcher asks for streams and memory, and the streams of the launches
    added to what it was asked.
    """
    fake, ffi = Framework(), ctypes.CDLL(tvm_ffi.libinfo.find_libtvm_ffi())
    rest = [
        ctypes.cast(getattr(ffi, name), ctypes.c_void_p)
        for name in ("TVMFFIErrorSetRaisedFromCStr", "TVMFFIFunctionCreate")
    ]
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    real = pointer_of(torch.Tensor.__dlpack_c_exchange_api__, b"dlpack_exchange_api")
    run = fake_gpu._launch

    def launch(
        device: int,
        image: bytes,
        kernel: bytes,
        sizes: Any,
        shared: int,
        stream: int,
        parameters: Any,
        early: int,
    ) -> int:
        fake.asked.append(("launch", stream))
        return run(device, image, kernel, sizes, shared, stream, parameters, early)

    fake_gpu._launched = type(fake_gpu._launched)(launch)
    fake_gpu.setup()
    driver.library().lntune_launcher_init(ctypes.byref(fake.table), *rest)
    yield fake
    driver.library().lntune_launcher_init(ctypes.c_void_p(real), *rest)


def test_streams_and_scratch_are_the_frameworks(framework: Framework, fake_gpu: FakeGpu) -> None:
    """Each call asks for the stream of its tensors' device and launches on it; scratch is one
    piece, freed after the last launch.
    """
    x, y = torch.randn(3, 2), torch.empty(3)
    launcher.load(two())(x, 2.0, y)
    torch.testing.assert_close(y, 2 * x.sum(1) + 1)
    # three floats and one, each from a multiple of 256 bytes
    piece = ("allocate", ((1, 0), 512, (1, 8)))
    assert framework.asked == [
        ("stream", (1, 0)),
        piece,
        ("launch", 0x5EED),
        ("launch", 0x5EED),
        ("free", None),
    ]


def test_scratch_is_freed_after_an_error(framework: Framework, fake_gpu: FakeGpu) -> None:
    """A launch that fails leaves no memory behind, and is the last."""
    kernel = launcher.load(two())
    fake_gpu.fail("cuLaunchKernel", 701)
    with pytest.raises(LaunchError):
        kernel(torch.randn(3, 2), 2.0, torch.empty(3))
    assert [what for what, _ in framework.asked] == ["stream", "allocate", "free"]


def test_no_memory_for_scratch(framework: Framework, fake_gpu: FakeGpu) -> None:
    """The allocator's own words are in the error, and nothing is launched."""
    framework.full = True
    with pytest.raises(
        LaunchError, match=r"two kernels: no memory for the kernels' scratch: the GPU is full"
    ):
        launcher.load(two())(torch.randn(3, 2), 2.0, torch.empty(3))
    assert [what for what, _ in framework.asked] == ["stream", "allocate"]


def test_messages_end_whole(fake_gpu: FakeGpu) -> None:
    """A tensor of very many dimensions does not overrun the message."""
    with pytest.raises(InputError, match=re.escape("got shape (1, 1, 1")):
        launcher.load(two())(torch.zeros([1] * 60), 1.0, torch.zeros(1))


def test_errors_of_the_launcher_are_lntunes() -> None:
    """Both kinds of error are caught as LntuneError, and as what Python has for them."""
    assert issubclass(InputError, ValueError)
    assert issubclass(LaunchError, RuntimeError)
    assert issubclass(ToolchainError, BuildError)
