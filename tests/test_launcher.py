"""Built GPU kernels as functions: what launcher.c checks, launches and says, with a driver that is
imagined (see fake_gpu.py).
"""

from __future__ import annotations

import concurrent.futures
from typing import Any

import pytest
import torch
import tvm_ffi
from fake_gpu import FakeGpu
from launches import CASE, PLAN, X, Y, call, kernel_of, launches, raw, right, tensors, two

from lntune import check, ops, schedule
from lntune.backends.cuda import launcher, sizes
from lntune.backends.cuda.device_code import Argument, Launch, Scratch
from lntune.case import DTYPES, Case
from lntune.errors import BuildError, InputError
from lntune.kernels import cache, direct

# What is launched.


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_are_right(fake_gpu: FakeGpu, dtype: str) -> None:
    """Through the cache and the launcher a kernel passes the check that every candidate has to
    pass, in every dtype.
    """
    case = Case("layer_norm", 100, dtype, 512, "weight+stats")
    verdict = check.verify(case, kernel_of(case), check.ALIGNED)
    assert verdict.ok, verdict.message


@pytest.mark.parametrize(
    "name", [n for n, s in schedule.all_schedules().items() if s.kind == "gpu"]
)
def test_every_schedule_goes_through_the_launcher(fake_gpu: FakeGpu, name: str) -> None:
    """A kernel of every GPU schedule is stored, loaded, launched and right; scratch and several
    kernels included.
    """
    plan, device = schedule.get(name), launcher.device(0)
    case = Case(plan.op, 64, "float32", 8)
    verdict = check.verify(
        case,
        cache.kernel(case, plan, plan.default(case, device), device),
        check.ALIGNED,
        device=device,
    )
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
    kernel_of(vector_width=1)(*values.values())
    assert right(values)


def test_a_direct_table_calls_it(fake_gpu: FakeGpu) -> None:
    """The handle of a kernel serves a table of direct calls like a CPU kernel's."""
    table, values = direct.Table("tnoof"), tensors(3)
    call = (values["x"], (96,), values["weight"], values["bias"], 1e-5)
    names = ("x", "normalized_shape", "weight", "bias", "eps")
    assert table.remember(
        kernel_of(), ops.get("layer_norm").arguments(CASE), names, (1, 10), call, CASE
    )
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
    """More than 48 KB of dynamic shared memory is asked for before the launch, which would fail
    without.
    """
    case = Case("layer_norm", 16384, "float32", 8)
    kernel = kernel_of(case, row_storage="shared", threads_per_row=256, rows_per_block=1)
    values = tensors(1, case)
    kernel(*values.values())
    assert [line for line in fake_gpu.log() if line.startswith("cuKernelSetAttribute")] == [
        "cuKernelSetAttribute main_kernel 65536"
    ]
    torch.testing.assert_close(
        values["y"],
        torch.nn.functional.layer_norm(values["x"], (16384,), values["weight"], values["bias"]),
    )


# Programs of several kernels, by hand.


@pytest.mark.parametrize("rows", [1, 4, 5, 300])
def test_scratch_between_kernels(fake_gpu: FakeGpu, rows: int) -> None:
    """Kernels are launched in order, and hand each other memory that is sized by the number of
    rows.
    """
    x, y = torch.randn(rows, 2), torch.empty(rows)
    launcher.load(two())(x, 2.5, y)
    torch.testing.assert_close(y, 2.5 * x.sum(1) + (rows + 3) // 4)
    assert launches(fake_gpu) == 2


NUMBERS = """
extern "C" __global__ void numbers(
    int64_t* out, int64_t a, int64_t b, int64_t c, int64_t d, int64_t e, int64_t f) {
  if (threadIdx.x || blockIdx.x) return;
  out[0] = a; out[1] = b; out[2] = c; out[3] = d; out[4] = e; out[5] = f;
}
"""


@pytest.mark.parametrize("rows", [1, 2, 7, 1000])
def test_sizes_are_pythons(fake_gpu: FakeGpu, rows: int) -> None:
    """Numbers in rows are what Python makes of the expression: division and remainder round down,
    below zero too.
    """
    texts = (
        "rows",
        "((rows + 127) // 128)",
        "((3 - (rows * 5)) // 4)",
        "((3 - (rows * 5)) % 4)",
        "(rows % (0 - 3))",
        "-(rows - 12345678901)",
    )
    out = Argument("out", "out", "int64", ("6",))
    launch = Launch("numbers", ("out", *texts), ("(rows // rows)", "1", "1"), (1, 1, 1))
    kernel = launcher.load(
        two(
            arguments=(X, out),
            launches=(launch,),
            scratch=(),
            images={"sm_90": NUMBERS.encode() + b"\0"},
        )
    )
    computed = torch.zeros(6, dtype=torch.int64)
    kernel(torch.zeros(rows, 2), computed)
    assert computed.tolist() == [sizes.number(text, rows) for text in texts]


@pytest.mark.parametrize(
    "text",
    [
        "len(rows)",
        "rows ** 2",
        "rows / 2",
        "x",
        "rows.real",
        "1.5",
        "rows if rows else 1",
        "(",
        "+" * 3,
    ],
)
def test_other_expressions_are_refused(fake_gpu: FakeGpu, text: str) -> None:
    """What is not made of rows, whole numbers and arithmetic is no size of a launch."""
    with pytest.raises(BuildError, match="form that is not known"):
        launcher.load(two(launches=(Launch("first", ("x",), (text, "1", "1"), (1, 1, 1)),)))


def test_too_much_of_anything_is_refused(fake_gpu: FakeGpu) -> None:
    """More than the launcher's tables hold, or what it does not know, is told when a kernel is
    loaded.
    """
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
    "dtype of a weight": (
        "weight",
        torch.randn(96).bfloat16(),
        "argument weight: got bfloat16, expected float32",
    ),
    "dimensions": (
        "x",
        torch.randn(5, 1, 96),
        r"argument x: got shape \(5, 1, 96\), expected \(rows, 96\)",
    ),
    "shape": ("bias", torch.randn(3), r"argument bias: got shape \(3,\), expected \(96,\)"),
    "hidden": ("x", torch.randn(5, 97), r"argument x: got shape \(5, 97\), expected \(rows, 96\)"),
    "rows": ("y", torch.randn(4, 96), "argument y: got 4 rows, expected 5 as x has"),
    "strided rows": (
        "x",
        torch.randn(5, 200)[:, :96],
        r"argument x: got strides \(200, 1\), expected a contiguous tensor",
    ),
    "transposed": (
        "x",
        torch.randn(96, 5).t(),
        r"argument x: got strides \(1, 5\), expected a contiguous tensor",
    ),
    "alignment": (
        "x",
        torch.randn(5 * 96 + 1)[1:].view(5, 96),
        "argument x: got memory at a multiple of 4 bytes, expected one of 16",
    ),
    "eps a tensor": ("eps", torch.tensor(1e-5), "argument eps: got a tensor, expected a number"),
    "eps None": ("eps", None, "argument eps: got None, expected a number"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_arguments_that_do_not_fit(fake_gpu: FakeGpu, what: str) -> None:
    """The error names operator, case, argument, what was got and expected; nothing is launched, and
    the next call works.
    """
    name, value, message = REFUSED[what]
    kernel, values = kernel_of(), tensors()
    fake_gpu.log()
    with pytest.raises(
        InputError,
        match=rf"^layer_norm of hidden size 96, float32, weight\+bias \({PLAN.name}\).*{message}",
    ):
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
        (
            (1, 5),
            (1, 5),
            "got tensors on cuda:5, expected a GPU of the architecture the kernel was built for",
        ),
    ],
)
def test_devices(
    fake_gpu: FakeGpu, first: tuple[int, int], second: tuple[int, int], message: str
) -> None:
    """Tensors elsewhere than on one GPU the kernel is for are refused; under the imagined driver
    the CPU is the GPU.
    """
    x, y = torch.randn(3, 2), torch.empty(3)
    assert message in call(launcher.load(two()), raw(x, (3, 2), first), 2.0, raw(y, (3,), second))
    assert launches(fake_gpu) == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (2**31, "at most 2147483647 blocks on axis x"),
        (2**62, "at most 2147483647 blocks on axis x"),
    ],
)
def test_grid_limits(fake_gpu: FakeGpu, rows: int, message: str) -> None:
    """More blocks than a launch can have are refused, not cut to 32 bits; so is scratch memory
    beyond 64 bits.
    """
    assert message in call(launcher.load(two()), raw(None, (rows, 2)), 2.0, raw(None, (rows,)))
    tall = Launch("second", ("part", "total", "factor", "y"), ("1", "rows", "1"), (1, 1, 1))
    assert "at most 65535 blocks on axis y" in call(
        launcher.load(two(launches=(tall,))), raw(None, (65536, 2)), 2.0, raw(None, (65536,))
    )
    huge = two(scratch=(Scratch("part", ("rows", "rows", "rows"), "float32"), two().scratch[1]))
    one = Launch("first", ("x", "part", "total", "rows"), ("1", "1", "1"), (32, 1, 1))
    assert "scratch memory would be too large" in call(
        launcher.load(two(launches=(one,), scratch=huge.scratch)),
        raw(None, (2**31, 2)),
        2.0,
        raw(None, (2**31,)),
    )
