"""Kernels of a time loop that begin before the product before them has ended: what they read before
they wait, when they are launched so, and that results are right however late the product ends.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
from fake_gpu import FakeGpu
from grids import exhaustive, thinned
from test_lnlstm_sequence import check as check_sequence
from test_lnlstm_sequence import make_arguments

from lntune import check, schedule
from lntune.backends import cuda, device_of
from lntune.backends.cuda import driver, launcher
from lntune.backends.cuda.device_code import Argument, Binary, Launch, Program
from lntune.backends.emulated import calls as emulated
from lntune.backends.emulated.emulator import BarrierError, RaceError
from lntune.case import DTYPES, Case
from lntune.errors import LaunchError
from lntune.kernels import compiler
from lntune.torch import devices, dispatch, lnlstm_loops
from lntune.transforms.gpu import early_start

DEVICE = msgspec.structs.replace(device_of("cuda:sm_90"), cores=3)
LATE = {"gated_row": ("gates_h", "c"), "gated_row_backward": ("dh", "dc_new", "c")}
"""What a kernel may not read before it has waited."""
needs_compiler = pytest.mark.skipif(
    bool(cuda.available()), reason=f"no CUDA compiler: {cuda.available()}"
)
every_schedule = pytest.mark.parametrize("name", LATE)


def case_of(name: str, dtype: str = "float32", hidden: int = 200, variant: str = "") -> Case:
    """A case of a schedule."""
    return Case(schedule.get(name).op, hidden, dtype, 32, variant)


def program_of(case: Case, name: str, device: Any = DEVICE, **changed: Any) -> Program:
    """The program of default knobs, or some changed."""
    plan = schedule.get(name)
    setting = dataclasses.replace(plan.default(case, device), **changed)
    assert plan.reason_invalid(setting, case, device) is None
    return compiler.program(case, plan, setting, device)


def body(program: Program) -> str:
    """The source of the program's kernel."""
    return program.source[program.source.index(" main_kernel(") :]


# ---- The kernels ----


@pytest.mark.parametrize(
    ("name", "dtype", "changed"),
    [
        *thinned((name, dtype, {}) for name in LATE for dtype in DTYPES),
        exhaustive(("gated_row", "float32", {"row_storage": "reload", "exchange": "one_barrier"})),
        ("gated_row_backward", "float32", {"prefetch": False, "exchange": "one_barrier"}),
        ("gated_row_backward", "bfloat16", {"partial_sums": "shared", "intermediates": "shared"}),
    ],
)
def test_nothing_late_is_read_early(name: str, dtype: str, changed: dict[str, Any]) -> None:
    """With the kernel before them still running, kernels are right on every style of input: before
    they wait they read nothing of what it writes, and write nothing.
    """
    case = case_of(name, dtype)
    narrow = {"prefetch": True, "threads_per_row": 64, "vector_width": 4}
    program = program_of(case, name, **{**narrow, **changed})
    assert program.launches[0].waits
    run = emulated.kernel(case, program, "shuffled", pending=LATE[name])
    verdict = check.verify(case, run, check.ALIGNED, device=DEVICE)
    assert verdict.ok, verdict.message


@every_schedule
def test_waiting_too_late_is_a_race(name: str) -> None:
    """The emulator finds a kernel that waits behind its first barrier, one that never waits, and a
    block that ends without.
    """
    case = case_of(name)
    program = program_of(case, name, threads_per_row=64)
    wait = f"{early_start.WAIT}();"
    macros, kernel = program.source.split(" main_kernel(", 1)
    line = next(at for at in kernel.splitlines(keepends=True) if wait in at)
    barrier = next(at for at in kernel.splitlines(keepends=True) if "__syncthreads()" in at)

    def run(text: str, pending: tuple[str, ...] = LATE[name]) -> None:
        changed = msgspec.structs.replace(program, source=f"{macros} main_kernel({text}")
        values = arguments_of(case)
        emulated.kernel(case, changed, pending=pending)(*values)

    run(kernel)
    with pytest.raises(RaceError, match=r"load of .* races with the kernel before this one"):
        run(kernel.replace(line, "").replace(barrier, barrier + line, 1))
    with pytest.raises(RaceError, match=r"store of .* races with the kernel before this one"):
        run(kernel.replace(line, ""), ())
    nothing = kernel[: kernel.index("{") + 1] + " if (blockIdx.x == 0) return;\n"
    with pytest.raises(BarrierError, match="has ended and not waited"):
        run(kernel.replace(kernel[: kernel.index("{") + 1], nothing))


@every_schedule
def test_a_state_that_is_loaded_early_is_a_race(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cell, which the step before has written, is no less late than the product."""
    case, plan = case_of(name), schedule.get(name)
    late = tuple(one for one in LATE[name] if one != "c")
    monkeypatch.setattr(sys.modules[plan.apply.__module__], "LATE", late)
    program = program_of(case, name, threads_per_row=64)
    emulated.kernel(case, program, pending=late)(*arguments_of(case))
    with pytest.raises(RaceError, match=r"load of .* of c races"):
        emulated.kernel(case, program, pending=LATE[name])(*arguments_of(case))


def arguments_of(case: Case) -> list[Any]:
    """A call's arguments, five rows."""
    from kernel_arguments import arguments

    return list(arguments(case, 5, device=DEVICE).values())


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "variant"),
    [exhaustive(("float32", "raw+bias+bias_c")), ("bfloat16", "bias+bias_c")],
)
@every_schedule
def test_machine_code_keeps_the_order(name: str, dtype: str, variant: str) -> None:
    """The compiler leaves exactly the loads that may be early before the wait, and all others
    behind it; without a word it moves the former (of what a kernel never writes) as it likes.
    """
    case = case_of(name, dtype, 1024, variant)
    program = program_of(case, name)
    (launch,) = program.launches
    code = cuda.inspect_kernel(program.source, "sm_90", launch.threads, launch.shared).code
    width = schedule.get(name).default(case, DEVICE).vector_width
    vectors = 1024 // (launch.block[0] * width)
    matrices = {"gated_row": (4, 5), "gated_row_backward": (8, 3)}[name]
    raw = "raw" in variant
    of_vectors = 4 * (2 + raw) + 2
    statistics = 0 if name == "gated_row" else 4 + 2 * raw
    early = vectors * (matrices[0] + of_vectors) + statistics
    assert code.early == {"LDG" if code.machine else "ld.global": early}
    late = sum(code.global_loads.values()) - early
    assert late >= vectors * matrices[1]
    assert not code.generic


@pytest.mark.parametrize(
    ("target", "changed"), [("cuda:sm_80", {}), ("cuda:sm_90", {"prefetch": False})]
)
def test_where_it_cannot_be(target: str, changed: dict[str, Any]) -> None:
    """Kernels for older architectures, and those that load nothing first, are as without."""
    case, device = case_of("gated_row"), device_of(target)
    program = program_of(case, "gated_row", device, **changed)
    assert not program.launches[0].waits
    assert program == program_of(case, "gated_row", device, **changed, early_start=False)


@every_schedule
def test_no_search_decides_on_it(name: str) -> None:
    """Steps are measured one by one, which does not show what it gains."""
    plan, case = schedule.get(name), case_of(name)
    assert all(setting.early_start for setting in plan.space(case, DEVICE))
    assert plan.default(case, DEVICE).early_start


# ---- Launches ----

SOURCE = """
extern "C" __global__ void waiting(float* x, float* offset, float* y) {
  float early = offset[0];
  cudaGridDependencySynchronize();
  y[blockIdx.x] = x[blockIdx.x] + early;
}
extern "C" __global__ void hasty(float* x, float* offset, float* y) {
  float early = x[blockIdx.x];
  cudaGridDependencySynchronize();
  y[blockIdx.x] = early + offset[0];
}
"""


def binary(kernel: str = "waiting", arch: str = "sm_90", **changed: Any) -> Binary:
    """y = x + offset, by a kernel that waits after it has read the offset, or x."""
    names = ("x", "offset", "y")
    launch = Launch(kernel, names, ("rows", "1", "1"), (1, 1, 1), waits=True)
    return Binary(
        title="waiting",
        arguments=(
            Argument("x", "in", "float32", ("rows",)),
            Argument("offset", "in", "float32", ("1",)),
            Argument("y", "out", "float32", ("rows",)),
        ),
        vector_width=1,
        launches=changed.get("launches", (launch,)),
        scratch=(),
        images={arch: SOURCE.encode() + b"\0"},
        ptx=changed.get("ptx", ""),
        compiler="none",
    )


def called(fake_gpu: FakeGpu, kernel: Any) -> list[str]:
    """The launches of a call in an overlapping block, whose result is right."""
    fake_gpu.log()
    x, y = torch.arange(3.0), torch.zeros(3)
    with launcher.overlapping():
        kernel(x, torch.tensor([2.0]), y)
    assert torch.equal(y, x + 2)
    return [line.split()[0] for line in fake_gpu.log() if line.startswith("cuLaunch")]


def test_only_in_an_overlapping_block(fake_gpu: FakeGpu) -> None:
    """A kernel that waits is launched early in the block and nowhere else: not before it, after it,
    after an exception in it, or by another thread.
    """
    from concurrent.futures import ThreadPoolExecutor

    kernel = launcher.load(binary())
    values = torch.zeros(3), torch.zeros(1), torch.zeros(3)

    def plain() -> bool:
        fake_gpu.log()
        kernel(*values)
        return "cuLaunchKernelEx waiting 0" not in fake_gpu.log()

    assert plain()
    assert called(fake_gpu, kernel) == ["cuLaunchKernelEx"]
    assert plain()
    with pytest.raises(KeyError), launcher.overlapping():
        with launcher.overlapping():
            pass
        assert not plain()
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(plain).result()
        raise KeyError
    assert plain()


def test_an_interrupt_as_soon_as_a_block_begins(
    fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal's handler that raises when the flag was just set finds it put back."""
    library, kernel = driver.library(), launcher.load(binary())
    overlap = library.lntune_overlap

    def interrupted(allowed: int) -> int:
        before = overlap(allowed)
        if allowed > 0:
            raise KeyboardInterrupt
        return int(before)

    monkeypatch.setattr(library, "lntune_overlap", interrupted)
    with pytest.raises(KeyboardInterrupt), launcher.overlapping():
        pass
    assert overlap(-1) == 0
    fake_gpu.log()
    kernel(torch.zeros(3), torch.zeros(1), torch.zeros(3))
    assert "cuLaunchKernelEx waiting 0" not in fake_gpu.log()


@pytest.mark.parametrize("what", ["does not wait", "second kernel", "old code", "old PTX"])
def test_kernels_that_are_launched_as_ever(fake_gpu: FakeGpu, what: str) -> None:
    """One that does not wait, or whose code for this GPU does not; and one behind another of its
    own program.
    """
    (launch,) = binary().launches
    if what == "does not wait":
        changed = binary(launches=(msgspec.structs.replace(launch, waits=False),))
    elif what == "second kernel":
        changed = binary(launches=(msgspec.structs.replace(launch, waits=False), launch))
    else:
        changed = binary(arch="sm_80", ptx=SOURCE if what == "old PTX" else "")
        if what == "old code":
            fake_gpu.setup(capabilities=((8, 0),))
    assert set(called(fake_gpu, launcher.load(changed))) == {"cuLaunchKernel"}


@pytest.mark.parametrize("what", ["old driver", "no such function", "refuses", "refuses here"])
def test_drivers_that_cannot(fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """A driver that is too old, has no such launch, or refuses it once: ordinary launches, right
    results; what was refused is not asked for again.
    """
    if what == "old driver":
        fake_gpu.setup(version=12020)
    elif what == "no such function":
        FakeGpu("_CONFIG").install(monkeypatch.setattr)
    kernel = launcher.load(binary())
    if "refuses" in what:
        fake_gpu.fail("cuLaunchKernelEx", 900 if "here" in what else 801)
        assert called(fake_gpu, kernel) == ["cuLaunchKernelEx", "cuLaunchKernel"]
        fake_gpu.fail()
    assert called(fake_gpu, kernel) in (["cuLaunchKernel"], [])


def test_a_refusal_of_the_launch_itself_is_an_error(fake_gpu: FakeGpu) -> None:
    """What an ordinary launch fails with too is told, and is no reason to do without early ones."""
    (launch,) = binary().launches
    too_large = binary(launches=(msgspec.structs.replace(launch, block=(2048, 1, 1)),))
    with launcher.overlapping(), pytest.raises(LaunchError, match="CUDA_ERROR_INVALID_VALUE"):
        launcher.load(too_large)(torch.zeros(3), torch.zeros(1), torch.zeros(3))
    assert called(fake_gpu, launcher.load(binary())) == ["cuLaunchKernelEx"]


def test_the_imagined_gpu_is_adversarial(fake_gpu: FakeGpu) -> None:
    """A kernel that reads before it waits what was written since the last ordinary launch fails
    where it begins early, and only there.
    """
    hasty, x = launcher.load(binary("hasty")), torch.zeros(3)
    fake_gpu.wrote(x)
    hasty(x, torch.zeros(1), torch.zeros(3))  # an ordinary launch
    with launcher.overlapping():
        hasty(x, torch.zeros(1), torch.zeros(3))
        fake_gpu.wrote(x)
        with pytest.raises(LaunchError, match="the launch of hasty"):
            hasty(x, torch.zeros(1), torch.zeros(3))
    assert "races with the kernel before" in str(fake_gpu.errors.pop())


# ---- The time loop ----


@pytest.fixture
def products(fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """The imagined GPU serves tensors of the CPU; it is told of every product, and of every state
    that a loop puts together.
    """
    gpu = driver.device(0)
    monkeypatch.setattr(devices, "_known", lambda kind, index: gpu)
    monkeypatch.setenv("LNTUNE_CUDA_GRAPHS", "0")
    repeated, before = lnlstm_loops.repeated, lnlstm_loops._before

    def told(*given: Any) -> Any:
        times = repeated(*given)

        def product(*factors: Any) -> Any:
            result = times(*factors)
            fake_gpu.wrote(result)
            return result

        return product

    def put_together(t: Any, n: int, rows: Any, first: Any) -> Any:
        result = before(t, n, rows, first)
        fake_gpu.wrote(result)
        return result

    monkeypatch.setattr(lnlstm_loops, "repeated", told)
    monkeypatch.setattr(lnlstm_loops, "_before", put_together)
    dispatch.reload()
    yield fake_gpu
    dispatch.reload()


@pytest.mark.filterwarnings("ignore::lntune.UntunedWarning")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("sizes", "reverse"), [([2] * 3, False), ([3, 2, 2], False), ([3, 2, 2], True)]
)
def test_steps_behind_the_first_begin_early(
    products: FakeGpu, sizes: list[int], reverse: bool
) -> None:
    """Forward and backward, packed sequences in both directions: each loop's first step is an
    ordinary launch, the others begin early, results are right however late products end, and the
    emulator finds no access that would have to wait.
    """
    given = make_arguments(sizes, hidden=32)
    products.log()
    check_sequence(given, sizes, False, False, reverse)
    launches = [line.split()[0] for line in products.log() if line.startswith("cuLaunch")]
    loop = ["cuLaunchKernel"] + ["cuLaunchKernelEx"] * (len(sizes) - 1)
    assert launches == loop * 4  # forward and backward, twice


@pytest.mark.filterwarnings("ignore::lntune.UntunedWarning")
def test_no_step_begins_early_where_none_shall(
    products: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LNTUNE_EARLY_START=0 makes all launches ordinary ones, from the next call on."""
    monkeypatch.setenv("LNTUNE_EARLY_START", "0")
    products.log()
    check_sequence(make_arguments([2] * 3, hidden=32), [2] * 3, False, False, False)
    launches = {line.split()[0] for line in products.log() if line.startswith("cuLaunch")}
    assert launches == {"cuLaunchKernel"}


@pytest.mark.filterwarnings("ignore::lntune.UntunedWarning")
def test_an_exception_in_a_loop_ends_it(products: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a loop that failed at its third step launches are ordinary ones again."""
    from lntune.torch.lnlstm_sequence import lnlstm_sequence

    given, kernel = make_arguments([2] * 3, hidden=32), launcher.load(binary())
    repeated, calls = lnlstm_loops.repeated, []

    def failing(*options: Any) -> Any:
        times = repeated(*options)

        def product(*factors: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise KeyError("no memory")
            return times(*factors)

        return product

    monkeypatch.setattr(lnlstm_loops, "repeated", failing)
    with pytest.raises(KeyError):
        lnlstm_sequence(*given.values(), [2] * 3, 1e-5, False, False, False)
    assert any(line.startswith("cuLaunchKernelEx") for line in products.log())
    kernel(torch.zeros(3), torch.zeros(1), torch.zeros(3))
    assert not any(line.startswith("cuLaunchKernelEx") for line in products.log())
