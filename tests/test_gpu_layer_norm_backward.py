"""Layer norm backward on GPUs: what is its own beside the tests of all GPU schedules."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import msgspec
import pytest
import torch
from grids import exhaustive, product
from kernel_arguments import arguments, written

from lntune import check, ops
from lntune.backends import cuda, device_of
from lntune.backends.cuda import row_counts
from lntune.backends.cuda.device_code import Program
from lntune.backends.emulated import calls as emulated
from lntune.backends.emulated.emulator import Traffic
from lntune.case import Case
from lntune.kernels import compiler
from lntune.schedule import get
from lntune.transforms.gpu import guards, threads

DEVICE = device_of("cuda:sm_90")
PLAN = get("shared_row_backward")

needs_compiler = pytest.mark.skipif(
    bool(cuda.available()), reason=f"no CUDA compiler: {cuda.available()}"
)


def program_of(case: Case, **changed: Any) -> Program:
    """The program of default knobs with some changed; they must fit."""
    setting = PLAN.default(case, DEVICE)
    return compiler.program(case, PLAN, type(setting)(**{**vars(setting), **changed}), DEVICE)


@pytest.mark.parametrize(
    ("variant", "rows"),
    product(("weight+dx+dgamma+dbeta", "dgamma32+dbeta32", "dbeta"), (1, 8)),
)
def test_separate_sums_are_right(variant: str, rows: int) -> None:
    """Partial sums in a kernel of their own are right for one row at a time and several, with more
    blocks than rows, and ragged columns.
    """
    case = Case("layer_norm_backward", 100, "bfloat16", 32, variant)
    program = program_of(
        case, threads_per_row=32, rows_per_block=rows, partial_sums="separate_kernel"
    )
    assert any(launch.grid[1] != "1" for launch in program.launches)  # blocks of rows
    verdict = check.verify(case, emulated.kernel(case, program, "shuffled"), check.ALIGNED)
    assert verdict.ok, verdict.message


@pytest.mark.parametrize(
    ("of", "prefetch"),
    product(
        ((1000, "bfloat16", ""), (100, "float16", "weight32+dx+dbeta"), (97, "float32", "")),
        (True, False),
    ),
    ids=str,
)
def test_a_weight_in_registers(of: tuple[int, str, str], prefetch: bool) -> None:
    """Kept from a block's first row to its last, the weight is loaded once a block, and all is
    right over several rows.
    """
    hidden, dtype, variant = of
    case = Case("layer_norm_backward", hidden, dtype, 32, variant)
    few = msgspec.structs.replace(DEVICE, cores=3)
    setting = PLAN.default(case, few)
    changed = {"threads_per_row": 32, "rows_per_block": 1, "blocks_per_sm": 1}
    changed |= {"weight_storage": "registers", "prefetch": prefetch}
    program = compiler.program(case, PLAN, type(setting)(**{**vars(setting), **changed}), few)
    run = emulated.kernel(case, program, "shuffled")
    verdict = check.verify(case, run, check.ALIGNED, device=few)
    assert verdict.ok, verdict.message
    values, seen = arguments(case, 21), list[Traffic]()
    emulated.kernel(case, program, seen=seen)(*values.values())
    assert seen[0]["weight"].loaded == 3 * values["weight"].nbytes


@pytest.mark.parametrize("rows", [1, 4])
def test_sums_have_the_same_bits_in_every_order(rows: int) -> None:
    """dgamma and dbeta do not depend on which block or thread comes first."""
    case = Case("layer_norm_backward", 96, "float32", 32)
    program, results = program_of(case, threads_per_row=32, rows_per_block=rows), []
    for order in ("forward", "backward", "shuffled"):
        values = arguments(case, 200)
        emulated.kernel(case, program, order)(*values.values())
        results.append(written(case, values))
    for other in results[1:]:
        assert all(torch.equal(output, other[name]) for name, output in results[0].items())


@pytest.mark.parametrize("sums", ["registers", "separate_kernel"])
def test_no_rows_give_sums_of_zero(sums: str) -> None:
    """An empty batch has gradients of its weight and bias: zeros, whatever the kernels keep partial
    sums in.
    """
    case = Case("layer_norm_backward", 100, "float16", 32)
    values = arguments(case, 0, output=7.0)
    program = program_of(case, threads_per_row=32, rows_per_block=1, partial_sums=sums)
    emulated.kernel(case, program)(*values.values())
    assert not values["dgamma"].count_nonzero()
    assert not values["dbeta"].count_nonzero()


@pytest.mark.parametrize("hidden", [97, 1024, 2112, 4096, 16384])
def test_totals_have_blocks_for_the_device(hidden: int) -> None:
    """The kernel of totals has a block for each multiprocessor where 8 columns to a block are so
    many, none of fewer, and no more than 32 columns; its threads have all partial sums on the way,
    in vectors where whole blocks of columns have so many of them.
    """
    case = Case("layer_norm_backward", hidden, "float32", 4096)
    program = program_of(case)
    totals = program.launches[1]
    x, y, _ = totals.block
    blocks = totals.blocks(4096)[0]
    parts = program.launches[0].blocks(4096)[0]
    in_vectors = hidden % 8 == 0 and parts >= 128
    columns, sharing = (y, 128) if in_vectors else (x, y)
    assert in_vectors == ("float4" in program.source.split(f" {totals.kernel}(")[-1])
    assert blocks == -(-hidden // columns)
    assert 8 <= columns <= 32
    assert columns == 8 or blocks >= DEVICE.cores
    assert columns == 32 or -(-hidden // (2 * columns)) < DEVICE.cores
    assert sharing <= max(16, 2 * parts)
    assert x * y <= (1024 if in_vectors else 512)


@pytest.mark.parametrize(("cores", "parts"), product((3, 20, 40), (1, 16, 3)))
def test_totals_of_few_and_many_columns(cores: int, parts: int) -> None:
    """8, 16 and 32 columns to a block, more threads to a column than there are partial sums and
    fewer, a last block that is not full: right.
    """
    few = msgspec.structs.replace(DEVICE, cores=cores)
    case = Case("layer_norm_backward", 323, "float16", 512)
    setting = PLAN.default(case, few)
    changed = {"threads_per_row": 64, "rows_per_block": 1, "blocks_per_sm": parts}
    program = compiler.program(case, PLAN, type(setting)(**{**vars(setting), **changed}), few)
    assert program.launches[1].block[0] == {3: 32, 20: 16, 40: 8}[cores]
    run = emulated.kernel(case, program, "shuffled")
    verdict = check.verify(case, run, check.ALIGNED, device=few)
    assert verdict.ok, verdict.message


@pytest.mark.parametrize(("cores", "columns"), [(20, 16), *map(exhaustive, ((8, 32), (40, 8)))])
def test_totals_in_vectors(cores: int, columns: int) -> None:
    """8, 16 and 32 columns to a block whose threads load 16 bytes at a time; as many partial sums
    as threads for them, and several times as many with and without a rest: right.
    """
    few = msgspec.structs.replace(DEVICE, cores=cores)
    case = Case("layer_norm_backward", 320, "float16", 512)
    setting = dataclasses.replace(
        PLAN.default(case, few), threads_per_row=32, rows_per_block=1, blocks_per_sm=16
    )
    program = compiler.program(case, PLAN, setting, few)
    assert program.launches[0].blocks(512)[0] == 16 * cores
    assert program.launches[1].block == (32, columns, 1)
    run = emulated.kernel(case, program, "shuffled")
    verdict = check.verify(case, run, check.ALIGNED, device=few)
    assert verdict.ok, verdict.message


@pytest.mark.parametrize("dtype", ["bfloat16", *map(exhaustive, ("float32", "float16"))])
def test_blocks_fill_the_device_and_not_more(dtype: str) -> None:
    """By default every multiprocessor has a block where there are rows for it, and a few rows do
    not get a thousand partial sums.
    """
    for hidden in (256, 4096, 12288):
        for rows, most in ((1, 1), (8, 16), (32, 64), (4096, 16 * DEVICE.cores)):
            case = Case("layer_norm_backward", hidden, dtype, rows)
            x = program_of(case).launches[0].blocks(rows)[0]
            assert x <= most
            assert x >= min(DEVICE.cores, rows // 4)


@pytest.mark.parametrize(
    ("hidden", "dtype", "rows", "ahead", "weight"),
    [
        (8192, "bfloat16", 32768, True, "reload"),
        (5003, "bfloat16", 32768, True, "registers"),
        (5003, "float32", 4096, True, "registers"),
        (8192, "float32", 32768, False, "reload"),
        (4096, "bfloat16", 32768, False, "reload"),
        (8192, "bfloat16", 8, False, "reload"),
    ],
)
def test_a_block_that_is_alone_has_its_next_row_on_the_way(
    hidden: int, dtype: str, rows: int, ahead: bool, weight: str
) -> None:
    """By default, where a multiprocessor holds one block, which has several rows and is not bound
    by memory as it is.
    """
    case = Case("layer_norm_backward", hidden, dtype, rows)
    setting = PLAN.default(case, device_of("nvidia/nvidia-h200"))
    assert (setting.prefetch, setting.weight_storage) == (ahead, weight)
    assert setting.exchange == ("one_barrier" if ahead else "two_barriers")


@pytest.mark.parametrize(("hidden", "sums"), [(256, "registers"), (200, "separate_kernel")])
def test_rows_that_share_a_block_are_right(hidden: int, sums: str) -> None:
    """Rows that are not there have no part in anything, however many of a block are; no load of dy
    and x waits for being asked whether there are any rows at all.
    """
    case = Case("layer_norm_backward", hidden, "float32", 32)
    program = program_of(case, threads_per_row=32, rows_per_block=4, partial_sums=sums)
    assert sums != "registers" or "(int64_t)1 <= rows" not in program.source
    kernel = emulated.kernel(case, program, "shuffled")
    verdict = check.verify(
        case, kernel, check.ALIGNED, device=DEVICE, more_rows=row_counts.of(kernel)
    )
    assert verdict.ok, verdict.message


def row_guards(program: Program, kernel: int) -> list[str]:
    """What one of a program's kernels asks about rows, one for each place where it does."""
    name = program.launches[kernel].kernel
    source = program.source.split(f" {name}(")[-1].split("\n}\n")[0]
    return [line for line in source.splitlines() if "if (" in line and "rows" in line]


@pytest.mark.parametrize(("dtype", "hidden"), product(("float32", "bfloat16"), (1024, 1000)))
def test_rows_that_share_a_block_are_guarded_once(dtype: str, hidden: int) -> None:
    """Whether there is a row is asked once, before its dx is stored and it is added to the sums,
    not for each element of these; of dx alone, once before each vector that is stored; of sums
    alone, once a vector.
    """
    changed = {"threads_per_row": 32, "rows_per_block": 4, "blocks_per_sm": 1}
    both = program_of(Case("layer_norm_backward", hidden, dtype, 512), **changed)
    (guard,) = row_guards(both, 0)
    behind = both.source.split(guard)[1]
    indent = guard[: guard.index("if")]
    body = behind[: behind.index(f"\n{indent}}}\n")]
    vectors = -(-hidden // (32 * threads.widest(Case("layer_norm", hidden, dtype, 1))))
    assert body.count("(dx_ptr + ") == both.source.count("(dx_ptr + ") == vectors
    assert re.search(r"blocks_v0_rf_local_ptr\[.*\] = \(blocks_v0_rf_local_ptr\[.*\] \+ ", body)
    alone = program_of(Case("layer_norm_backward", hidden, dtype, 512, "weight+dx"), **changed)
    assert len(row_guards(alone, 0)) == vectors
    case = Case("layer_norm_backward", hidden, dtype, 512, "dgamma+dbeta")
    sums = program_of(case, **changed, partial_sums="separate_kernel")
    assert len(row_guards(sums, 0)) == 1


@pytest.mark.parametrize(
    ("variant", "row"),
    product(
        ("", "weight+dx", "weight32+dx+dgamma32", "dgamma+dbeta"),
        ((200, 32), (37, 8)),
    ),
)
def test_every_number_of_rows_that_share_a_block(variant: str, row: tuple[int, int]) -> None:
    """Blocks whose last rows are not all there are right, warps whose threads have several rows
    among them.
    """
    hidden, per_row = row
    case = Case("layer_norm_backward", hidden, "bfloat16", 32, variant)
    few = msgspec.structs.replace(DEVICE, cores=3)
    setting = dataclasses.replace(
        PLAN.default(case, few), threads_per_row=per_row, rows_per_block=4, blocks_per_sm=1
    )
    assert PLAN.reason_invalid(setting, case, few) is None
    kernel = emulated.kernel(case, compiler.program(case, PLAN, setting, few), "shuffled")
    verdict = check.verify(case, kernel, check.ALIGNED, device=few, more_rows=row_counts.of(kernel))
    assert verdict.ok, verdict.message


@pytest.mark.parametrize("loop", ["of no row", "of many rows"])
def test_a_guard_is_for_one_row(loop: str) -> None:
    """A loop that asks for no row, or over rows themselves, gets no guard around it: an error."""
    from tvm import s_tir

    case = Case("layer_norm_backward", 64, "float32", 32)
    sch = s_tir.Schedule(ops.get(case.op).define(case, threads.row_sum, 4, 3))
    sums = sch.get_loops(sch.get_sblock("blocks"))
    if loop == "of no row":
        sch.decompose_reduction(sch.get_sblock("blocks"), sums[2])
    block = sch.get_sblock("blocks_init" if loop == "of no row" else "blocks")
    sch.annotate(sch.get_loops(block)[0], guards.OF_ONE_ROW, 1)
    with pytest.raises(RuntimeError, match="is not of one row"):
        guards.once_a_row(sch.mod)


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_that_share_a_block_leave_registers(dtype: str) -> None:
    """Rows of 256 elements, four to a block and each of a warp's, take no more than 64 registers,
    with which a multiprocessor holds half of the threads that it can.
    """
    case = Case("layer_norm_backward", 256, dtype, 4096)
    launch = (program := program_of(case, threads_per_row=32, rows_per_block=4)).launches[0]
    found = cuda.inspect_kernel(
        program.source, "sm_90", launch.threads, launch.shared, launch.kernel, machine=False
    )
    assert found.problems == ()
    assert found.resources.registers <= 64


@pytest.mark.parametrize(("hidden", "kept"), [(3001, True), (2049, False), (3000, False)])
def test_single_elements_keep_the_weight(hidden: int, kept: bool) -> None:
    """Rows that are loaded element by element have the weight in registers and one barrier by
    default, where that costs no block; rows of vectors have not.
    """
    case = Case("layer_norm_backward", hidden, "bfloat16", 32768)
    setting = PLAN.default(case, DEVICE)
    assert (setting.weight_storage == "registers") == kept
    assert (setting.exchange == "one_barrier") == kept


@pytest.mark.parametrize(
    ("variant", "storage"), product(("dx+dbeta", "weight+dx+dbeta"), ("shared", "reload"))
)
def test_sums_of_dy_alone(variant: str, storage: str) -> None:
    """A trainable beta beside a frozen gamma, of rows that are not kept in registers: sums read no
    x.
    """
    case = Case("layer_norm_backward", 96, "float32", 32, variant)
    few = msgspec.structs.replace(DEVICE, cores=3)
    setting = dataclasses.replace(
        PLAN.default(case, few), threads_per_row=32, rows_per_block=1, row_storage=storage
    )
    assert PLAN.reason_invalid(setting, case, few) is None
    run = emulated.kernel(case, compiler.program(case, PLAN, setting, few), "shuffled")
    verdict = check.verify(case, run, check.ALIGNED, device=few)
    assert verdict.ok, verdict.message
