"""Sums that warps exchange with one barrier: the same bits as with two, no barrier more than said,
and no part overwritten that somebody has yet to read.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import msgspec
import pytest
import torch
from grids import exhaustive, product, thinned
from kernel_arguments import arguments, written

from lntune import check
from lntune.backends import device_of
from lntune.backends.cuda.device_code import Program
from lntune.backends.emulated import calls as emulated
from lntune.backends.emulated.emulator import RaceError
from lntune.case import DTYPES, Case
from lntune.kernels import compiler
from lntune.schedule import all_schedules, get

DEVICE = msgspec.structs.replace(device_of("cuda:sm_90"), cores=3)
"""With so few multiprocessors that blocks that loop over rows have several."""
PLANS = {name: s for name, s in all_schedules().items() if s.kind == "gpu"}
BARRIERS = {
    "shared_row": 2,
    "shared_row_backward": 1,
    "gated_row": 4,
    "gated_row_backward": 2,
}
"""Sums that are exchanged one after another for a row."""


def case_of(name: str, dtype: str = "float32", hidden: int = 500) -> Case:
    """A row of whole vectors that no number of threads shares evenly; where sums are kept from call
    to call, few rows.
    """
    op = PLANS[name].op
    return Case(op, hidden, dtype, 8 if name == "gated_row_backward" else 32)


def program_of(case: Case, name: str, exchange: str, **changed: Any) -> Program:
    """A program of narrow vectors, 128 threads a row, with this way to exchange sums."""
    plan = get(name)
    setting = plan.default(case, DEVICE)
    fields = {f.name for f in dataclasses.fields(setting)}
    rest = {"threads_per_row": 128, "vector_width": 2, "rows_per_block": 1, "blocks_per_sm": 1}
    rest = {key: value for key, value in rest.items() if key in fields}
    setting = dataclasses.replace(setting, exchange=exchange, **{**rest, **changed})
    assert plan.reason_invalid(setting, case, DEVICE) is None
    return compiler.program(case, plan, setting, DEVICE)


def main_kernel(program: Program) -> str:
    """The source of a program's first kernel."""
    return program.source[program.source.rindex(" main_kernel(") :].split("\n}\n")[0]


@pytest.mark.parametrize("name", thinned(PLANS))
def test_one_barrier_for_each_exchange(name: str) -> None:
    """A row costs a barrier for each sum that needs the one before, half of TVM's; and every
    shuffle names all lanes of the warp.
    """
    one, two = (
        main_kernel(program_of(case_of(name), name, way)) for way in ("one_barrier", "two_barriers")
    )
    assert one.count("__syncthreads()") == BARRIERS[name]
    assert two.count("__syncthreads()") >= 2 * BARRIERS[name]
    assert set(re.findall(r"__shfl_\w+\(([^,]*),", one)) == {"(uint)4294967295"}


@pytest.mark.parametrize(("name", "dtype"), product(tuple(PLANS), tuple(DTYPES)))
def test_sums_are_right(name: str, dtype: str) -> None:
    """On every style of input, over several rows to a block where blocks loop over them."""
    case = case_of(name, dtype)
    run = emulated.kernel(case, program_of(case, name, "one_barrier"), "shuffled")
    verdict = check.verify(case, run, check.ALIGNED, device=DEVICE)
    assert verdict.ok, verdict.message


@pytest.mark.parametrize(
    ("name", "threads"),
    [
        *product(tuple(PLANS), (64, 256, 512)),
        exhaustive(("shared_row", 1024)),
        exhaustive(("shared_row_backward", 1024)),
    ],
)
def test_the_same_bits_in_every_order(name: str, threads: int) -> None:
    """Two warps and as many as a block has come to the bits of TVM's exchange, whichever thread or
    block is first.
    """
    case = case_of(name, hidden=2 * threads - 20)
    results = []
    for way, order in (
        ("two_barriers", "forward"),
        ("one_barrier", "forward"),
        ("one_barrier", "backward"),
        ("one_barrier", "shuffled"),
    ):
        program = program_of(case, name, way, threads_per_row=threads)
        values = arguments(case, 10, device=DEVICE)
        emulated.kernel(case, program, order)(*values.values())
        results.append(written(case, values))
    for other in results[1:]:
        assert all(torch.equal(value, other[key]) for key, value in results[0].items())


@pytest.mark.parametrize("name", ["shared_row", "shared_row_backward"])
def test_rows_that_share_a_block(name: str) -> None:
    """Each of several rows of a block has parts of its own; the last group of rows is not full."""
    case = case_of(name)
    program = program_of(case, name, "one_barrier", threads_per_row=64, rows_per_block=4)
    assert program.launches[0].block == (64, 4, 1)
    run = emulated.kernel(case, program, "backward")
    verdict = check.verify(case, run, check.ALIGNED, device=DEVICE)
    assert verdict.ok, verdict.message


@pytest.mark.parametrize("name", thinned(PLANS))
def test_parts_must_lie_in_two_places_by_turns(name: str) -> None:
    """With all parts in one place a warp that is ahead overwrites what another has yet to read, and
    the emulator finds it: what it finds nothing in does alternate.
    """
    case = case_of(name)
    program = program_of(case, name, "one_barrier")
    place = int(re.findall(r"float warp_sums_ptr\[(\d+)\];", program.source)[0]) // 2
    broken, count = re.subn(
        r"(?<!float )warp_sums_ptr\[(.+?)\](?= =|;)",
        lambda m: f"warp_sums_ptr[({m[1]}) % {place}]",
        program.source,
    )
    assert count
    values = arguments(case, 10, device=DEVICE)
    run = emulated.kernel(case, msgspec.structs.replace(program, source=broken), "shuffled")
    with pytest.raises(RaceError, match="warp_sums"):
        run(*values.values())
