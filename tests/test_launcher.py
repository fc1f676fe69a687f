"""Built GPU kernels as functions: what launcher.c checks, launches and says, with a driver that is imagined (see fake_gpu.py)."""

from __future__ import annotations

import concurrent.futures
import ctypes
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import tvm_ffi
from fake_gpu import FakeGpu

from lntune import artifact, check, device_code, direct, ops, schedule
from lntune.case import DTYPES, Case
from lntune.cuda import driver, launcher
from lntune.device_code import Argument, Binary, Launch, Scratch
from lntune.errors import BuildError, InputError, LaunchError, ToolchainError

CASE = Case("layer_norm", 96, "float32", 8, "weight+bias")
PLAN = next(iter(schedule.for_op("layer_norm", "gpu").values()))


def kernel_of(case: Case = CASE, **changed: Any) -> Any:
    """The kernel of a case by the first schedule, with its default knobs or some of them changed."""
    device = launcher.device(0)
    setting = PLAN.default(case.typical, device)
    return artifact.kernel(case, PLAN, type(setting)(**{**vars(setting), **changed}), device)


def tensors(rows: int = 5, case: Case = CASE) -> dict[str, Any]:
    """Arguments by name, in the order of the operator's."""
    given = ops.get(case.op).inputs(case, rows, "normal", 0)
    listed = ops.get(case.op).arguments(case)
    made = {a.name: torch.full(a.sizes(rows, case.hidden), torch.nan, dtype=getattr(torch, a.dtype)) for a in listed if a.role == "out"}
    return {a.name: {**given, **made}[a.name] for a in listed}


def right(values: dict[str, Any]) -> bool:
    """True when y is the layer norm of x."""
    truth = torch.nn.functional.layer_norm(values["x"], values["x"].shape[1:], values["weight"], values["bias"], values["eps"])
    return torch.allclose(values["y"], truth, atol=1e-5)


def launches(fake_gpu: FakeGpu) -> int:
    """Launches since the log was read last."""
    return sum(line.startswith("cuLaunchKernel") for line in fake_gpu.log())


# What is launched.


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_are_right(fake_gpu: FakeGpu, dtype: str) -> None:
    """Through the cache and the launcher a kernel passes the check that every candidate has to pass, in every dtype."""
    case = Case("layer_norm", 100, dtype, 512, "weight+stats")
    verdict = check.verify(case, kernel_of(case), check.ALIGNED)
    assert verdict.ok, verdict.message


@pytest.mark.parametrize("name", [n for n, s in schedule.all_schedules().items() if s.kind == "gpu"])
def test_every_schedule_goes_through_the_launcher(fake_gpu: FakeGpu, name: str) -> None:
    """A kernel of every GPU schedule is stored, loaded, launched and right; scratch and several kernels included."""
    plan, device = schedule.get(name), launcher.device(0)
    case = Case(plan.op, 64, "float32", 8)
    verdict = check.verify(case, artifact.kernel(case, plan, plan.default(case, device), device), check.ALIGNED, cores=device.cores)
    assert verdict.ok, verdict.message


def test_no_rows_launch_nothing(fake_gpu: FakeGpu) -> None:
    """An empty batch is no error and no launch."""
    kernel = kernel_of()
    fake_gpu.log()
    kernel(*tensors(0).values())
    assert fake_gpu.log() == []


def test_tensors_of_tvm_ffi_are_taken(fake_gpu: FakeGpu) -> None:
    """Arguments may be tensors of tvm_ffi, and numbers whole."""
    values = tensors()
    values["eps"] = 0
    given = [tvm_ffi.from_dlpack(v) if isinstance(v, torch.Tensor) else v for v in values.values()]
    kernel_of()(*given)
    assert right(values)


def test_dimensions_of_one_have_any_stride(fake_gpu: FakeGpu) -> None:
    """A single row of a wider matrix is contiguous, whatever its row stride says."""
    values = tensors(1)
    values["x"] = torch.randn(7, 200)[2:3, :96]
    values["y"] = torch.empty_strided((1, 96), (1000, 1))
    kernel_of(access=1)(*values.values())
    assert right(values)


def test_a_direct_table_calls_it(fake_gpu: FakeGpu) -> None:
    """The handle of a kernel serves a table of direct calls like a CPU kernel's."""
    table, values = direct.Table("tnoof"), tensors(3)
    call = (values["x"], (96,), values["weight"], values["bias"], 1e-5)
    names = ("x", "normalized_shape", "weight", "bias", "eps")
    assert table.remember(kernel_of(), ops.get("layer_norm").arguments(CASE), names, (1, 10), call, CASE)
    fake_gpu.log()
    values["y"] = table.call(*call)
    assert right(values)
    assert launches(fake_gpu) == 1


def test_threads_call_at_once(fake_gpu: FakeGpu) -> None:
    """One kernel called from eight threads with rows of their own is right in each."""
    kernel = kernel_of()

    def work(rows: int) -> bool:
        done = []
        for _ in range(5):
            values = tensors(rows)
            kernel(*values.values())
            done.append(right(values))
        return all(done)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(1, 9)))


def test_shared_memory_is_opted_into(fake_gpu: FakeGpu) -> None:
    """More than 48 KB of dynamic shared memory is asked for before the launch, which would fail without."""
    case = Case("layer_norm", 16384, "float32", 8)
    kernel = kernel_of(case, keep="shared", threads=256, rows=1)
    values = tensors(1, case)
    kernel(*values.values())
    assert [line for line in fake_gpu.log() if line.startswith("cuKernelSetAttribute")] == ["cuKernelSetAttribute main_kernel 65536"]
    torch.testing.assert_close(values["y"], torch.nn.functional.layer_norm(values["x"], (16384,), values["weight"], values["bias"]))


# Programs of several kernels, by hand.

TWO = """
extern "C" __global__ void first(float* x, float* part, float* total, int64_t many) {
  if (threadIdx.x == 0) part[blockIdx.x] = x[blockIdx.x * 2] + x[blockIdx.x * 2 + 1];
  if (threadIdx.x == 0 && blockIdx.x == 0) total[0] = (float)many;
}
extern "C" __global__ void second(float* part, float* total, float factor, float* y) {
  y[blockIdx.x] = factor * part[blockIdx.x] + total[0];
}
"""
X, FACTOR, Y = Argument("x", "in", "float32", ("rows", "2")), Argument("factor", "scalar", "float32", ()), Argument("y", "out", "float32", ("rows",))


def two(**changed: Any) -> Binary:
    """y = factor times the sums of rows of two, plus a number, in two kernels with scratch between them."""
    made = Binary(
        title="two kernels",
        arguments=(X, FACTOR, Y),
        access=1,
        launches=(
            Launch("first", ("x", "part", "total", "((rows + 3) // 4)"), ("rows", "1", "1"), (32, 1, 1)),
            Launch("second", ("part", "total", "factor", "y"), ("rows", "1", "1"), (1, 1, 1)),
        ),
        scratch=(Scratch("part", ("rows",), "float32"), Scratch("total", ("1",), "float32")),
        images={"sm_90": TWO.encode() + b"\0"},
        ptx="",
        compiler="none",
    )
    return Binary(**{**{f: getattr(made, f) for f in made.__struct_fields__}, **changed})


@pytest.mark.parametrize("rows", [1, 4, 5, 300])
def test_scratch_between_kernels(fake_gpu: FakeGpu, rows: int) -> None:
    """Kernels are launched in order, and hand each other memory that is sized by the number of rows."""
    x, y = torch.randn(rows, 2), torch.empty(rows)
    launcher.load(two())(x, 2.5, y)
    torch.testing.assert_close(y, 2.5 * x.sum(1) + (rows + 3) // 4)
    assert launches(fake_gpu) == 2


NUMBERS = """
extern "C" __global__ void numbers(int64_t* out, int64_t a, int64_t b, int64_t c, int64_t d, int64_t e, int64_t f) {
  if (threadIdx.x == 0 && blockIdx.x == 0) { out[0] = a; out[1] = b; out[2] = c; out[3] = d; out[4] = e; out[5] = f; }
}
"""


@pytest.mark.parametrize("rows", [1, 2, 7, 1000])
def test_sizes_are_pythons(fake_gpu: FakeGpu, rows: int) -> None:
    """Numbers in rows are what Python makes of the expression: division and remainder round down, below zero too."""
    texts = ("rows", "((rows + 127) // 128)", "((3 - (rows * 5)) // 4)", "((3 - (rows * 5)) % 4)", "(rows % (0 - 3))", "-(rows - 12345678901)")
    out = Argument("out", "out", "int64", ("6",))
    launch = Launch("numbers", ("out", *texts), ("(rows // rows)", "1", "1"), (1, 1, 1))
    kernel = launcher.load(two(arguments=(X, out), launches=(launch,), scratch=(), images={"sm_90": NUMBERS.encode() + b"\0"}))
    found = torch.zeros(6, dtype=torch.int64)
    kernel(torch.zeros(rows, 2), found)
    assert found.tolist() == [device_code.number(text, rows) for text in texts]


@pytest.mark.parametrize("text", ["len(rows)", "rows ** 2", "rows / 2", "x", "rows.real", "1.5", "rows if rows else 1", "(", "+" * 3])
def test_other_expressions_are_refused(fake_gpu: FakeGpu, text: str) -> None:
    """What is not made of rows, whole numbers and arithmetic is no size of a launch."""
    with pytest.raises(BuildError, match="form that is not known"):
        launcher.load(two(launches=(Launch("first", ("x",), (text, "1", "1"), (1, 1, 1)),)))


def test_too_much_of_anything_is_refused(fake_gpu: FakeGpu) -> None:
    """More than the launcher's tables hold, or what it does not know, is told when a kernel is loaded."""
    for changed in (
        {"arguments": tuple(Argument(f"a{i}", "in", "float32", ("rows",)) for i in range(33))},
        {"scratch": tuple(Scratch(f"s{i}", ("rows",), "float32") for i in range(9))},
        {"launches": two().launches * 5},
        {"arguments": (Argument("x", "in", "float8", ("rows",)),)},
        {"arguments": (Argument("x", "in", "float32", ("rows",) * 5),)},
        {"arguments": (Argument("x", "in", "float32", ("3",)),), "launches": ()},
        {"launches": (Launch("first", ("x",) * 49, ("1", "1", "1"), (1, 1, 1)),)},
    ):
        with pytest.raises(BuildError, match="two kernels"):
            launcher.load(two(**changed))


# What is refused.

REFUSED: dict[str, tuple[str, Any, str]] = {
    "None": ("x", None, "argument x: got None, expected a tensor"),
    "a number": ("x", 3.0, "argument x: got a number, expected a tensor"),
    "text": ("weight", "w", "argument weight: got something else, expected a tensor"),
    "dtype": ("x", torch.randn(5, 96).half(), "argument x: got float16, expected float32"),
    "dtype of a weight": ("weight", torch.randn(96).bfloat16(), "argument weight: got bfloat16, expected float32"),
    "dimensions": ("x", torch.randn(5, 1, 96), r"argument x: got shape \(5, 1, 96\), expected \(rows, 96\)"),
    "shape": ("bias", torch.randn(3), r"argument bias: got shape \(3,\), expected \(96,\)"),
    "hidden": ("x", torch.randn(5, 97), r"argument x: got shape \(5, 97\), expected \(rows, 96\)"),
    "rows": ("y", torch.randn(4, 96), "argument y: got 4 rows, expected 5 as x has"),
    "strided rows": ("x", torch.randn(5, 200)[:, :96], r"argument x: got strides \(200, 1\), expected a contiguous tensor"),
    "transposed": ("x", torch.randn(96, 5).t(), r"argument x: got strides \(1, 5\), expected a contiguous tensor"),
    "alignment": ("x", torch.randn(5 * 96 + 1)[1:].view(5, 96), "argument x: got memory at a multiple of 4 bytes, expected one of 16"),
    "eps a tensor": ("eps", torch.tensor(1e-5), "argument eps: got a tensor, expected a number"),
    "eps None": ("eps", None, "argument eps: got None, expected a number"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_arguments_that_do_not_fit(fake_gpu: FakeGpu, what: str) -> None:
    """The error names operator, case, argument, what was got and expected; nothing is launched, and the next call works."""
    name, value, message = REFUSED[what]
    kernel, values = kernel_of(), tensors()
    fake_gpu.log()
    with pytest.raises(InputError, match=rf"^layer_norm of hidden size 96, float32, weight\+bias \({PLAN.name}\).*{message}"):
        kernel(*{**values, name: value}.values())
    assert launches(fake_gpu) == 0
    kernel(*values.values())
    assert right(values)


@pytest.mark.parametrize("count", [0, 4, 6])
def test_the_number_of_arguments(fake_gpu: FakeGpu, count: int) -> None:
    """Too few and too many are told with both numbers."""
    with pytest.raises(InputError, match=f"got {count} arguments, expected 5"):
        kernel_of()(*[*tensors().values(), 1.0][:count])


def test_whole_numbers_are_not_cut(fake_gpu: FakeGpu) -> None:
    """A fraction for an argument that is whole is refused."""
    number = Argument("number", "scalar", "int64", ())
    kernel = launcher.load(two(arguments=(X, number, Y), launches=(), scratch=()))
    with pytest.raises(InputError, match="argument number: got a number, expected a whole number"):
        kernel(torch.zeros(1, 2), 1.5, torch.zeros(1))


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


def raw(data: torch.Tensor | None, shape: tuple[int, ...], device: tuple[int, int] = (1, 0), offset: int = 0) -> Tensor:
    """A DLTensor of float32 made by hand, without strides."""
    dims = (ctypes.c_int64 * len(shape))(*shape)
    dtype = (ctypes.c_ubyte * 4)(2, 32, 1, 0)
    pointer = data.data_ptr() - offset if data is not None else 0
    return Tensor(pointer, (ctypes.c_int * 2)(*device), len(shape), dtype, ctypes.cast(dims, ctypes.POINTER(ctypes.c_int64)), None, offset)


def call(kernel: Any, *values: Tensor | float) -> str:
    """Call a kernel as C does; its error's text, empty where there is none."""
    ffi = ctypes.CDLL(tvm_ffi.libinfo.find_libtvm_ffi())
    packed = (AnyView * len(values))()
    for one, value in zip(packed, values, strict=True):
        one.type = 3 if isinstance(value, float) else 7
        one.value = int.from_bytes(ctypes.c_double(value), "little") if isinstance(value, float) else ctypes.addressof(value)
    if not ffi.TVMFFIFunctionCall(ctypes.c_void_p(kernel.__chandle__()), packed, len(values), ctypes.byref(AnyView())):
        return ""
    error = ctypes.c_void_p()
    ffi.TVMFFIErrorMoveFromRaised(ctypes.byref(error))
    size = ctypes.cast((error.value or 0) + 24 + 24, ctypes.POINTER(ctypes.c_size_t))[0]
    return ctypes.string_at(ctypes.cast((error.value or 0) + 24 + 16, ctypes.POINTER(ctypes.c_void_p))[0], size).decode()


def test_tensors_as_c_passes_them(fake_gpu: FakeGpu) -> None:
    """Without strides, and with a byte offset, a tensor is read rightly."""
    x, y = torch.randn(3, 2), torch.empty(3)
    assert call(launcher.load(two()), raw(x, (3, 2), offset=64), 2.0, raw(y, (3,), offset=16)) == ""
    torch.testing.assert_close(y, 2 * x.sum(1) + 1)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ((2, 0), (1, 0), "argument x: got a tensor on cuda:0, expected one on a GPU"),
        ((1, 0), (2, 3), "argument y: got a tensor on cuda:3, expected cpu"),
        ((1, 1), (1, 0), "argument y: got a tensor on cpu, expected cpu"),
        ((10, 0), (1, 0), "argument x: got a tensor on device (10, 0), expected one on a GPU"),
        ((1, 5), (1, 5), "got tensors on cuda:5, expected a GPU of the architecture the kernel was built for"),
    ],
)
def test_devices(fake_gpu: FakeGpu, first: tuple[int, int], second: tuple[int, int], message: str) -> None:
    """Tensors elsewhere than on one GPU the kernel is for are refused; under the imagined driver the CPU is the GPU."""
    x, y = torch.randn(3, 2), torch.empty(3)
    assert message in call(launcher.load(two()), raw(x, (3, 2), first), 2.0, raw(y, (3,), second))
    assert launches(fake_gpu) == 0


@pytest.mark.parametrize(("rows", "message"), [(2**31, "at most 2147483647 blocks on axis x"), (2**62, "at most 2147483647 blocks on axis x")])
def test_grid_limits(fake_gpu: FakeGpu, rows: int, message: str) -> None:
    """More blocks than a launch can have are refused, not cut to 32 bits; so is scratch memory beyond 64 bits."""
    assert message in call(launcher.load(two()), raw(None, (rows, 2)), 2.0, raw(None, (rows,)))
    tall = Launch("second", ("part", "total", "factor", "y"), ("1", "rows", "1"), (1, 1, 1))
    assert "at most 65535 blocks on axis y" in call(launcher.load(two(launches=(tall,))), raw(None, (65536, 2)), 2.0, raw(None, (65536,)))
    huge = two(scratch=(Scratch("part", ("rows", "rows", "rows"), "float32"), two().scratch[1]))
    one = Launch("first", ("x", "part", "total", "rows"), ("1", "1", "1"), (32, 1, 1))
    assert "scratch memory would be too large" in call(
        launcher.load(two(launches=(one,), scratch=huge.scratch)), raw(None, (2**31, 2)), 2.0, raw(None, (2**31,))
    )


# What the driver refuses.


@pytest.mark.parametrize(
    ("function", "status", "message"),
    [
        ("cuLaunchKernel", 1, r"the launch of main_kernel on cuda:0 failed: CUDA_ERROR_INVALID_VALUE \(error 1, invalid argument\)"),
        ("cuLaunchKernel", 701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES.*more registers or shared memory"),
        ("cuLaunchKernel", 700, "CUDA_ERROR_ILLEGAL_ADDRESS.*a kernel before this one failed"),
        ("cuLaunchKernel", 12345, r"an unknown error \(error 12345\)"),
        ("cuCtxPushCurrent_v2", 3, "making the GPU current on cuda:0 failed: CUDA_ERROR_NOT_INITIALIZED.*forked"),
        ("cuKernelGetFunction", 900, "loading main_kernel on cuda:0 failed.*captured in a CUDA graph"),
        ("cuKernelGetFunction", 209, "loading main_kernel on cuda:0 failed: CUDA_ERROR_NO_BINARY_FOR_GPU.*older than the compiler"),
    ],
)
def test_launch_errors(fake_gpu: FakeGpu, function: str, status: int, message: str) -> None:
    """The driver's error comes as an exception with its name, operator and case, and what it likely means; the next call works."""
    kernel, values = kernel_of(), tensors()
    fake_gpu.fail(function, status)
    with pytest.raises(LaunchError, match=rf"^layer_norm of hidden size 96, float32, weight\+bias .*{message}"):
        kernel(*values.values())
    assert fake_gpu.depth == 0
    fake_gpu.fail()
    kernel(*values.values())
    assert right(values)


def test_what_the_emulator_finds_is_a_launch_error(fake_gpu: FakeGpu) -> None:
    """A kernel that writes out of bounds under the imagined driver fails like one on a device, and the test is told why."""
    bad = TWO.replace("y[blockIdx.x]", "y[blockIdx.x + 1]")
    with pytest.raises(LaunchError, match="the launch of second"):
        launcher.load(two(images={"sm_90": bad.encode() + b"\0"}))(torch.zeros(2, 2), 1.0, torch.zeros(2))
    assert "second" in str(fake_gpu.errors.pop())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"images": {"sm_90": b"not a kernel\0"}},
            r"two kernels \(sm_90, made by none, for a driver of CUDA 13.0\).*load the image: CUDA_ERROR_INVALID_IMAGE",
        ),
        ({"launches": (Launch("third", ("x",), ("rows", "1", "1"), (1, 1, 1)),)}, "cannot load third: CUDA_ERROR_NOT_FOUND"),
        ({"images": {"sm_80": b""}}, "two kernels is built for sm_80; the GPUs here are sm_90"),
        ({"images": {"sm_100": b""}, "ptx": "__global__"}, "two kernels is built for sm_100; the GPUs here are sm_90"),
    ],
)
def test_load_errors(fake_gpu: FakeGpu, changed: dict[str, Any], message: str) -> None:
    """What the driver cannot load, and what is for other GPUs, is told when the kernel is loaded, with what made it."""
    with pytest.raises(BuildError, match=message):
        launcher.load(two(**changed))


# Several GPUs.


def test_another_gpu_is_made_current(fake_gpu: FakeGpu) -> None:
    """A call launches on the GPU of its tensors, whatever was current, which it is again afterwards, also after an error."""
    fake_gpu.setup(2)
    x, y = torch.randn(3, 2), torch.empty(3)
    for current, device, pushed in ((0, 0, []), (0, 1, [1]), (1, 1, []), (1, 0, [0]), (None, 0, [0])):
        fake_gpu.current(current)
        fake_gpu.log()
        single = Launch("second", ("x", "x", "factor", "y"), ("rows", "1", "1"), (1, 1, 1))
        kernel = launcher.load(two(launches=(single,), scratch=()))
        fake_gpu.log()
        assert call(kernel, raw(x, (3, 2), (1, device)), 2.0, raw(y, (3,), (1, device))) == ""
        log = fake_gpu.log()
        assert [int(line.split()[-1]) for line in log if line.startswith("cuCtxPush")] == pushed
        assert [int(line.split()[-1]) for line in log if line.startswith("cuCtxPop")] == pushed
        assert [line for line in log if line.startswith("cuLaunch")] == [f"cuLaunchKernel second {device}"]
        assert fake_gpu.depth == (current is not None)
        fake_gpu.fail("cuLaunchKernel", 701)
        assert "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES" in call(kernel, raw(x, (3, 2), (1, device)), 2.0, raw(y, (3,), (1, device)))
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
    assert [line for line in fake_gpu.log() if line.startswith("cuDevicePrimaryCtxRetain")] == ["cuDevicePrimaryCtxRetain 0"]


def test_functions_are_loaded_before_a_capture(fake_gpu: FakeGpu) -> None:
    """On a GPU in use a kernel's functions are loaded with the kernel, else in its first call; later calls only launch."""
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
    """In one process an sm_90 and an sm_86 run what was built for them; an sm_75, for which nothing was, is refused by name."""
    fake_gpu.setup(3, capabilities=((9, 0), (8, 6), (7, 5)))
    other = TWO.replace("+ total[0]", "+ total[0] + 100.0f")
    single = Launch("second", ("x", "x", "factor", "y"), ("rows", "1", "1"), (1, 1, 1))
    kernel = launcher.load(two(images={"sm_80": other.encode() + b"\0", "sm_90": TWO.encode() + b"\0"}, launches=(single,), scratch=()))
    x, found = torch.ones(1, 2), []
    for device in (0, 1):
        y = torch.zeros(1)
        assert call(kernel, raw(x, (1, 2), (1, device)), 2.0, raw(y, (1,), (1, device))) == ""
        found.append(y.item())
    assert found == [3.0, 103.0]
    assert "expected a GPU of the architecture" in call(kernel, raw(x, (1, 2), (1, 2)), 2.0, raw(y, (1,), (1, 2)))


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
def test_the_image_for_a_gpu(archs: tuple[str, ...], ptx: str, capability: tuple[int, int], expected: str | None) -> None:
    """Its own architecture's, else the nearest below it of its family, else PTX of an older architecture, else none."""
    assert launcher.image_for(two(images=dict.fromkeys(archs, b""), ptx=ptx), capability) == expected


# PyTorch's stream and memory.


class Exchange(ctypes.Structure):
    """DLPackExchangeAPI: two words of version, a pointer, and six functions."""

    _fields_ = (("version", ctypes.c_uint32 * 2), ("previous", ctypes.c_void_p), ("functions", ctypes.c_void_p * 5))


class Managed(ctypes.Structure):
    """DLManagedTensorVersioned."""

    _fields_ = (
        ("version", ctypes.c_uint32 * 2), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p), ("flags", ctypes.c_uint64), ("tensor", Tensor),
    )  # fmt: skip


ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Tensor), ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p, ctypes.c_void_p)
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
        self._functions = (ALLOCATE(self._allocate), STREAM(self._stream), DELETE(lambda _: self.asked.append(("free", None))))
        self.managed.deleter = ctypes.cast(self._functions[2], ctypes.c_void_p)
        pointers = [ctypes.cast(f, ctypes.c_void_p).value for f in self._functions[:2]]
        self.table = Exchange((ctypes.c_uint32 * 2)(1, 3), None, (ctypes.c_void_p * 5)(pointers[0], None, None, None, pointers[1]))

    def _allocate(self, prototype: Any, out: Any, context: int, say: int) -> int:
        shape = prototype[0]
        self.asked.append(("allocate", (tuple(shape.device), shape.shape[0], tuple(shape.dtype)[:2])))
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
    """A framework that the launcher asks for streams and memory, and the streams of the launches added to what it was asked."""
    found, ffi = Framework(), ctypes.CDLL(tvm_ffi.libinfo.find_libtvm_ffi())
    rest = [ctypes.cast(getattr(ffi, name), ctypes.c_void_p) for name in ("TVMFFIErrorSetRaisedFromCStr", "TVMFFIFunctionCreate")]
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    real = pointer_of(torch.Tensor.__dlpack_c_exchange_api__, b"dlpack_exchange_api")
    run = fake_gpu._launch

    def launch(device: int, image: bytes, kernel: bytes, sizes: Any, shared: int, stream: int, parameters: Any) -> int:
        found.asked.append(("launch", stream))
        return run(device, image, kernel, sizes, shared, stream, parameters)

    fake_gpu._launched = type(fake_gpu._launched)(launch)
    fake_gpu.setup()
    driver.library().lntune_launcher_init(ctypes.byref(found.table), *rest)
    yield found
    driver.library().lntune_launcher_init(ctypes.c_void_p(real), *rest)


def test_streams_and_scratch_are_the_frameworks(framework: Framework, fake_gpu: FakeGpu) -> None:
    """Each call asks for the stream of its tensors' device and launches on it; scratch is one piece, freed after the last launch."""
    x, y = torch.randn(3, 2), torch.empty(3)
    launcher.load(two())(x, 2.0, y)
    torch.testing.assert_close(y, 2 * x.sum(1) + 1)
    piece = ("allocate", ((1, 0), 512, (1, 8)))  # three floats and one, each from a multiple of 256 bytes
    assert framework.asked == [("stream", (1, 0)), piece, ("launch", 0x5EED), ("launch", 0x5EED), ("free", None)]


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
    with pytest.raises(LaunchError, match=r"two kernels: no memory for the kernels' scratch: the GPU is full"):
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
