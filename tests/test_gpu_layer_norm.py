"""Layer norm forward on GPUs: what is its own beside the tests of all GPU schedules."""

from __future__ import annotations

import re
from typing import Any

import pytest
from grids import exhaustive, product

from lntune import check
from lntune.backends import cuda, device_of
from lntune.backends.cuda import compiler as cuda_compiler
from lntune.backends.cuda import row_counts
from lntune.backends.cuda.device_code import Program
from lntune.backends.emulated import calls as emulated
from lntune.case import DTYPES, Case
from lntune.commands import inspect as inspection
from lntune.kernels import compiler
from lntune.schedule import get

DEVICE = device_of("cuda:sm_90")
PLAN = get("shared_row")

needs_compiler = pytest.mark.skipif(
    bool(cuda.available()), reason=f"no CUDA compiler: {cuda.available()}"
)


def program_of(case: Case, **changed: Any) -> Program:
    """The program of default knobs with some changed; they must fit."""
    setting = PLAN.default(case, DEVICE)
    return compiler.program(case, PLAN, type(setting)(**{**vars(setting), **changed}), DEVICE)


@pytest.mark.parametrize("row_storage", ["shared", "reload"])
def test_vectors_in_a_rolled_loop(row_storage: str) -> None:
    """A ragged row whose vectors are a rolled loop is right, and its code is as long for many as
    for a few.
    """
    rolled = {"threads_per_row": 32, "vector_width": 4, "row_storage": row_storage, "rolled": True}
    case = Case("layer_norm", 1004, "bfloat16", 32)
    verdict = check.verify(
        case, emulated.kernel(case, program_of(case, **rolled), "shuffled"), check.ALIGNED
    )
    assert verdict.ok, verdict.message
    lengths = {
        r: [
            len(program_of(Case("layer_norm", h, "bfloat16", 32), **{**rolled, "rolled": r}).source)
            for h in (512, 2048)
        ]
        for r in (True, False)
    }
    assert lengths[True][1] < 1.1 * lengths[True][0]
    assert lengths[False][1] > 1.5 * lengths[False][0]


ROW_GUARD = re.compile(r"^( *)if \(.*< rows.*\) \{\n((?:\1 .*\n)*)\1\}", re.MULTILINE)


@pytest.mark.parametrize(("dtype", "hidden"), product(("float32", "bfloat16"), (1024, 1000)))
def test_rows_that_share_a_block_are_guarded_where_they_are_stored(dtype: str, hidden: int) -> None:
    """Whether there is a row is asked before something of it is stored, and nowhere else; what is
    computed of a row that is not there stays in registers. It is right for every number of rows.
    """
    case = Case("layer_norm", hidden, dtype, 512, "weight+bias+stats")
    program = program_of(case, threads_per_row=32, rows_per_block=4)
    guarded = [body.strip() for _, body in ROW_GUARD.findall(program.source)]
    assert guarded
    stores = r"(__stwb\(\(\w+\*\)\(y_ptr \+ .*\);|(mean|rstd)_ptr\[.*\] = .*;)"
    assert [body for body in guarded if not re.fullmatch(stores, body)] == []
    assert program.source.count("< rows") == len(guarded)
    kernel = emulated.kernel(case, program, "shuffled")
    verdict = check.verify(case, kernel, check.ALIGNED, more_rows=row_counts.of(kernel))
    assert verdict.ok, verdict.message


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_one_warp_holds(dtype: str) -> None:
    """Four rows of 1024 elements to a block, each of a warp's: no barrier, no spills, no stack
    frame; and the knobs fit, so that a search finds them.
    """
    case = Case("layer_norm", 1024, dtype, 4096)
    changed = {"threads_per_row": 32, "rows_per_block": 4}
    setting = PLAN.default(case, DEVICE)
    setting = type(setting)(**{**vars(setting), **changed})
    assert setting in PLAN.space(case, DEVICE)
    program = program_of(case, **changed)
    assert "__syncthreads" not in program.source
    found = cuda.inspect_kernel(program.source, "sm_90", program.launches[0].threads)
    assert found.problems == ()
    assert found.resources.spill_store_bytes == found.resources.stack_bytes == 0
    assert found.code.barriers == 0


@pytest.mark.parametrize("arch", cuda.ARCHITECTURES)
def test_shared_memory_has_room_for_the_sums(arch: str) -> None:
    """A row that fills what a block may have of it leaves none for the sums that threads exchange:
    it is refused, and by default kept elsewhere.
    """
    device = device_of(f"cuda:{arch}")
    for dtype, size in DTYPES.items():
        if (hidden := device.shared_memory // size) <= 65536:
            case = Case("layer_norm", hidden, dtype, 4096)
            setting = PLAN.default(case, device)
            assert setting.row_storage != "shared"
            filled = type(setting)(**{**vars(setting), "row_storage": "shared"})
            assert "of which 1024 are for sums" in str(PLAN.reason_invalid(filled, case, device))


@pytest.mark.parametrize(
    ("hidden", "dtype", "variant", "rows"),
    [
        (1000, "bfloat16", "", 1),
        (97, "float16", "weight32", 4),
        (516, "float32", "bias+stats", 2),
    ],
)
def test_weight_and_bias_loaded_early(hidden: int, dtype: str, variant: str, rows: int) -> None:
    """Ragged rows, several to a block, either vector alone: right with weight and bias in registers
    before the first sum.
    """
    case = Case("layer_norm", hidden, dtype, 32, variant)
    program = program_of(case, threads_per_row=32, rows_per_block=rows, prefetch=True)
    verdict = check.verify(case, emulated.kernel(case, program, "shuffled"), check.ALIGNED)
    assert verdict.ok, verdict.message


@needs_compiler
def test_early_loads_stay_early() -> None:
    """The compiler leaves the loads of weight and bias before the first barrier, where it has the
    row's own, and by default behind the last.
    """
    case = Case("layer_norm", 4096, "float32", 512)
    for prefetch in (True, False):
        program = program_of(case, threads_per_row=256, prefetch=prefetch)
        ptx = cuda_compiler.to_cubin(program.source, "sm_90").ptx
        loads = [m.start() for m in re.finditer(r"ld\.global[\w.:]*\.v4", ptx)]
        assert len(loads) == 12
        assert (max(loads) < ptx.index("bar.sync")) == prefetch
        assert prefetch or loads[4] > ptx.rindex("bar.sync")


def test_nothing_is_loaded_early_that_is_not_there() -> None:
    """Without weight and bias, or without registers for them, the knob has no place; nor has a
    barrier spared where one warp has the row.
    """
    plain = Case("layer_norm", 256, "float32", 32, "plain")
    case = Case("layer_norm", 256, "float32", 32)
    knobs = PLAN.default(case, DEVICE)
    for which, changed in (
        (plain, {"prefetch": True}),
        (case, {"prefetch": True, "row_storage": "shared", "rows_per_block": 1}),
        (case, {"exchange": "one_barrier", "threads_per_row": 32, "rows_per_block": 1}),
    ):
        assert PLAN.reason_invalid(type(knobs)(**{**vars(knobs), **changed}), which, DEVICE)


@needs_compiler
@pytest.mark.parametrize(
    ("hidden", "dtype"),
    [
        (40960, "bfloat16"),
        exhaustive((58112, "float32")),
        (65521, "float32"),
        exhaustive((65532, "float16")),
        (65536, "bfloat16"),
    ],
)
def test_long_rows_do_not_spill(hidden: int, dtype: str) -> None:
    """With default knobs rows that registers do not hold take no stack frame, and can be
    launched.
    """
    program = program_of(Case("layer_norm", hidden, dtype, 4096))
    (launch,) = program.launches
    assert (
        cuda.inspect_kernel(
            program.source, "sm_90", launch.threads, launch.shared, launch.kernel, machine=False
        ).problems
        == ()
    )


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("name", "dtype", "hidden"),
    product(
        ("shared_row", "shared_row_backward"), tuple(DTYPES), (12288, 1024, 4096, 8192, 2048, 768)
    ),
)
def test_what_kernels_are_to_reach_without_a_gpu(name: str, dtype: str, hidden: int) -> None:
    """For sm_90, hidden 768 to 12288, default knobs: no spills, no stack frame, matrices in
    accesses of 16 bytes, each read or written once, and within 5 % of the least bytes.
    """
    plan = get(name)
    case = Case(plan.op, hidden, dtype, 4096)
    inspected = inspection.inspect_case(case, plan, plan.default(case, DEVICE), DEVICE)
    assert inspected.problems == ()
    assert all(times == 1 for times in (*inspected.read.values(), *inspected.written.values()))
    assert inspected.extra < 0.05
    code = inspected.kernels[0].code  # the second one adds partial sums
    assert set(code.global_stores) == {128}
    # a row's mean and rstd
    assert set(code.global_loads) - {128} == (set() if name == "shared_row" else {32})
