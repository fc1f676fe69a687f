"""Rows loaded a step ahead of a grid-stride loop: right, each once, and under way before the sums
are exchanged.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from grids import product
from kernel_arguments import arguments, written

from lntune import check
from lntune.backends import cuda, device_of
from lntune.backends.cuda import compiler as cuda_compiler
from lntune.backends.cuda.device_code import Program
from lntune.backends.emulated import calls as emulated
from lntune.backends.emulated.emulator import Traffic
from lntune.case import DTYPES, Case
from lntune.kernels import compiler
from lntune.schedule import get
from lntune.transforms.gpu import row_prefetch

DEVICE = msgspec.structs.replace(device_of("cuda:sm_90"), cores=3)
"""With so few multiprocessors that the 21 rows of a check are several to each block."""
PLAN = get("shared_row_backward")

needs_compiler = pytest.mark.skipif(
    bool(cuda.available()), reason=f"no CUDA compiler: {cuda.available()}"
)


def program_of(case: Case, **changed: Any) -> Program:
    """The program of default knobs with the next row loaded ahead, and others changed."""
    setting = PLAN.default(case, DEVICE)
    rest = {"rows_per_block": 1, "blocks_per_sm": 1, "prefetch": True}
    setting = type(setting)(**{**vars(setting), **rest, **changed})
    assert PLAN.reason_invalid(setting, case, DEVICE) is None
    return compiler.program(case, PLAN, setting, DEVICE)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    product(((97, 32), (1000, 128), (1024, 64), (5003, 512)), tuple(DTYPES)),
    ids=str,
)
def test_rows_loaded_ahead_are_right(shape: tuple[int, int], dtype: str) -> None:
    """One row, and seven to a block of threads, ragged rows and whole ones: right on every style of
    input, whatever order the threads run in.
    """
    hidden, threads = shape
    case = Case("layer_norm_backward", hidden, dtype, 32)
    program = program_of(case, threads_per_row=threads)
    assert program.launches[0].blocks(21) == (DEVICE.cores, 1, 1)
    run = emulated.kernel(case, program, "shuffled")
    verdict = check.verify(case, run, check.ALIGNED, device=DEVICE)
    assert verdict.ok, verdict.message


@pytest.mark.parametrize("variant", ["dx+dbeta", "weight+dx+dgamma", "weight32+dx+dgamma32+dbeta"])
def test_variants(variant: str) -> None:
    """What a sum over rows does not need, and a weight of another dtype, make no difference."""
    case = Case("layer_norm_backward", 100, "float16", 32, variant)
    run = emulated.kernel(case, program_of(case, threads_per_row=32), "backward")
    verdict = check.verify(case, run, check.ALIGNED, device=DEVICE)
    assert verdict.ok, verdict.message


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 21])
def test_every_row_is_read_once(rows: int) -> None:
    """The last row of a block has none behind it that would be loaded, nor has a block without
    rows.
    """
    case = Case("layer_norm_backward", 256, "float32", 32)
    values, seen = arguments(case, rows), list[Traffic]()
    emulated.kernel(case, program_of(case, threads_per_row=64), seen=seen)(*values.values())
    for name in ("x", "dy"):
        assert sum(t[name].loaded for t in seen if name in t) == values[name].nbytes
    for name in ("mean", "rstd"):  # by the first lane of each of two warps
        assert sum(t[name].loaded for t in seen if name in t) == 2 * values[name].nbytes


def test_no_rows_give_sums_of_zero() -> None:
    """Blocks without a row load nothing."""
    case = Case("layer_norm_backward", 256, "float32", 32)
    values = arguments(case, 0, output=7.0)
    emulated.kernel(case, program_of(case, threads_per_row=64))(*values.values())
    assert not any(value.count_nonzero() for value in written(case, values).values())


def test_hints_and_row_strides_go_with_it() -> None:
    """What is loaded ahead has the cache hint that is asked for, and every access of a matrix."""
    uncached = msgspec.structs.replace(DEVICE, l2=0)
    case = Case("layer_norm_backward", 256, "bfloat16", 512)
    setting = PLAN.default(case, uncached)
    setting = type(setting)(
        **{**vars(setting), "rows_per_block": 1, "threads_per_row": 32}
        | {"prefetch": True, "cache_hints": True}
    )
    assert PLAN.reason_invalid(setting, case, uncached) is None
    source = compiler.program(case, PLAN, setting, uncached).source
    body = source[source.rindex(" main_kernel(") :].split("\n}\n")[0]
    body = body[body.index("{") :]
    for name in ("x", "dy"):
        uses = len(re.findall(rf"\b{name}_ptr\b", body))
        assert uses == len(re.findall(rf"__ldcs\(\(\w+\*\)\({name}_ptr\b", body)) > 0


@needs_compiler
@pytest.mark.parametrize(
    ("exchange", "dtype"), product(("two_barriers", "one_barrier"), ("bfloat16", "float32"))
)
def test_loads_come_before_the_exchange(dtype: str, exchange: str) -> None:
    """The compiler leaves the loads where they are: all are made before the first barrier, in the
    order of the code, and not where they are used.
    """
    case = Case("layer_norm_backward", 4096, dtype, 512, "dx+dbeta")
    program = program_of(case, threads_per_row=256, exchange=exchange)
    ptx = cuda_compiler.to_cubin(program.source, "sm_90").ptx
    kernel = ptx[ptx.index(".entry main_kernel(") :]
    kernel = kernel[: kernel.index("\n}")]
    loads = [m.start() for m in re.finditer(r"ld\.global[\w.:]*\.v4", kernel)]
    each = 2 * 4096 // (256 * (16 // case.itemsize))
    assert len(loads) == 2 * each
    assert max(loads) < kernel.index("bar.sync") < kernel.index("st.global")


def test_a_loop_without_copies_is_refused() -> None:
    """Where nothing is copied to registers there is nothing to load ahead."""
    import tvm
    from tvm import s_tir, te

    x = te.placeholder((8, 8), "float32", name="x")
    y = te.compute((8, 8), lambda i, k: x[i, k] + 1.0, name="y")
    sch = s_tir.Schedule(tvm.IRModule({"main": te.create_prim_func([x, y])}))
    sch.annotate(sch.get_loops(sch.get_sblock("y"))[0], row_prefetch.ANNOTATION, 1)
    with pytest.raises(RuntimeError, match="copies nothing"):
        row_prefetch.next_row(sch.mod)
