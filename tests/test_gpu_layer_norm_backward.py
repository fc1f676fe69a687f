"""Layer norm backward on GPUs: what is its own beside the tests of all GPU schedules."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from kernel_arguments import arguments, written

from lntune import check
from lntune.backends import device_of
from lntune.backends.cuda.device_code import Program
from lntune.backends.emulated import calls as emulated
from lntune.backends.emulated.emulator import Traffic
from lntune.case import Case
from lntune.kernels import compiler
from lntune.schedule import get

DEVICE = device_of("cuda:sm_90")
PLAN = get("shared_row_backward")


def program_of(case: Case, **changed: Any) -> Program:
    """The program of default knobs with some changed; they must fit."""
    setting = PLAN.default(case, DEVICE)
    return compiler.program(case, PLAN, type(setting)(**{**vars(setting), **changed}), DEVICE)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("variant", ["weight+dx+dgamma+dbeta", "dgamma32+dbeta32", "dbeta"])
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


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize(
    ("hidden", "dtype", "variant"),
    [(1000, "bfloat16", ""), (100, "float16", "weight32+dx+dbeta"), (97, "float32", "")],
)
def test_a_weight_in_registers(hidden: int, dtype: str, variant: str, prefetch: bool) -> None:
    """Kept from a block's first row to its last, the weight is loaded once a block, and all is
    right over several rows.
    """
    case = Case("layer_norm_backward", hidden, dtype, 32, variant)
    few = msgspec.structs.replace(DEVICE, cores=3)
    setting = PLAN.default(case, few)
    changed = {"threads_per_row": 32, "rows_per_block": 1, "blocks_per_sm": 1}
    changed |= {"weight_storage": "registers", "prefetch": prefetch}
    program = compiler.program(case, PLAN, type(setting)(**{**vars(setting), **changed}), few)
    run = emulated.kernel(case, program, "shuffled")
    verdict = check.verify(case, run, check.ALIGNED, cores=few.cores)
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


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_blocks_fill_the_device_and_not_more(dtype: str) -> None:
    """By default every multiprocessor has a block where there are rows for it, and a few rows do
    not get a thousand partial sums.
    """
    for hidden in (256, 1024, 4096, 12288):
        for rows, most in ((1, 1), (8, 16), (32, 64), (4096, 16 * DEVICE.cores)):
            case = Case("layer_norm_backward", hidden, dtype, rows)
            x = program_of(case).launches[0].blocks(rows)[0]
            assert x <= most
            assert x >= min(DEVICE.cores, rows // 4)
