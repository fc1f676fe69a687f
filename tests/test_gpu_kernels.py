"""GPU kernels on the CPU: every GPU schedule's CUDA source, run by the emulator, against float64
mathematics.
"""

from __future__ import annotations

import functools
from typing import Any

import msgspec
import pytest
import torch
from grids import covered, each, exhaustive, pairwise, product, thinned
from kernel_arguments import arguments, by_row, inputs, row_slice, written
from knob_samples import sample

from lntune import check, ops
from lntune.backends import device_of
from lntune.backends.cuda.device_code import Program
from lntune.backends.emulated import calls as emulated
from lntune.backends.emulated.emulator import Traffic
from lntune.case import DTYPES, MAX_HIDDEN, TYPICAL_ROWS, Case
from lntune.device import Device
from lntune.kernels import compiler
from lntune.schedule import all_schedules, get

DEVICE = device_of("cuda:sm_90")
# The same with few multiprocessors: where blocks share out the rows, the 21 of a check are several
# to some of them, and there are not a thousand blocks without any, whose threads the
# emulator runs all the same.
SMALL = msgspec.structs.replace(DEVICE, cores=3)
PLANS = {name: s for name, s in all_schedules().items() if s.kind == "gpu"}
# One element; an odd few; a prime of several vectors a thread; a ragged row of wide vectors; a
# whole one. A row of gates is four times as long.
SIZES = (1, 7, 97, 1000, 1024)
OF_GATES = (1, 7, 97, 200)
LONG = ((8192, "float32"), (12288, "bfloat16"), (5003, "float16"))
LONG_OF_GATES = ((4096, "bfloat16"), (1250, "float16"))


def of_gates(op: str) -> bool:
    """Whether an operator's rows are gates."""
    return op.startswith("lnlstm")


def sums_of(op: str) -> list[str]:
    """The names of an operator's sums over rows that are kept from call to call."""
    return [a.name for a in ops.get(op).arguments(Case(op, 8, "float32", 8)) if a.role == "sum"]


def case_of(op: str, hidden: int, dtype: str, variant: str = "") -> Case:
    """A case of many rows; where sums are kept from call to call of a few, so that the check's 21
    rows are several to a block.
    """
    return Case(op, hidden, dtype, 8 if sums_of(op) else 512, variant)


@functools.lru_cache(maxsize=64)
def program(name: str, case: Case, setting: Any = None, device: Device = DEVICE) -> Program:
    """The program of a schedule, with its default knobs where none are given."""
    plan = get(name)
    return compiler.program(case, plan, setting or plan.default(case, device), device)


def cases(sizes: tuple[int, ...] = (), long: bool = True) -> list[Any]:
    """(schedule, case) for every GPU schedule, with readable ids; `sizes` empty: those of the
    schedule's operator.
    """
    parameters = []
    for name, plan in PLANS.items():
        wide = of_gates(plan.op)
        ones = [(h, d) for d in DTYPES for h in sizes or (OF_GATES if wide else SIZES)]
        for hidden, dtype in [*ones, *((LONG_OF_GATES if wide else LONG) if long else ())]:
            parameters.append(
                pytest.param(name, case_of(plan.op, hidden, dtype), id=f"{name}-{dtype}-{hidden}")
            )
    return parameters


def assert_right(
    case: Case, compiled: Program, order: str = "forward", device: Device = DEVICE
) -> None:
    """The program passes the check that every candidate of a tuning run has to pass."""
    verdict = check.verify(
        case, emulated.kernel(case, compiled, order), check.ALIGNED, device=device
    )
    assert verdict.ok, verdict.message


def facts(parameter: Any) -> set[Any]:
    """What is to occur in every run: each dtype of each schedule, and each size."""
    name, case = parameter.values
    return {(name, case.dtype), (of_gates(case.op), case.hidden)}


@pytest.mark.parametrize(("name", "case"), covered(cases(), facts))
def test_default_knobs_are_right(name: str, case: Case) -> None:
    """With default knobs every size and dtype is right on every style of input, whatever the order
    the threads run in.
    """
    device = DEVICE if case.hidden <= 1024 else SMALL
    assert_right(case, program(name, case, device=device), "shuffled", device)


# Ragged rows and whole ones, short and long, in both dtypes together; default knobs have all sizes
# in all dtypes.
SPREAD = ((96, "float32"), (1000, "bfloat16"), (2048, "bfloat16"))
SPREAD_OF_GATES = ((96, "float32"), (520, "bfloat16"))


def spread() -> list[Any]:
    """(schedule, hidden, dtype): for every run one size of each schedule, of a backward, whose
    programs are long, the shortest.
    """
    parameters = []
    for name, plan in PLANS.items():
        sizes = SPREAD_OF_GATES if of_gates(plan.op) else SPREAD
        for at, which in enumerate(sizes):
            one = (name, *which)
            parameters.append(one if at == (not plan.op.endswith("backward")) else exhaustive(one))
    return parameters


@pytest.mark.parametrize(("name", "hidden", "dtype"), spread())
def test_a_spread_of_knobs_is_right(name: str, hidden: int, dtype: str) -> None:
    """Every value of every knob that fits is right, in some combination."""
    case = case_of(PLANS[name].op, hidden, dtype)
    for setting in sample(PLANS[name], case, SMALL):
        assert_right(case, program(name, case, setting, SMALL), "backward", SMALL)


@pytest.mark.parametrize(("name", "hidden"), product(tuple(PLANS), (1, 2)))
def test_knobs_of_the_shortest_rows_can_be_built(name: str, hidden: int) -> None:
    """Whatever is valid for rows that are shorter than a vector can be built, where TVM has its
    own ideas of arrays of one element.
    """
    case = case_of(PLANS[name].op, hidden, "bfloat16")
    for setting in sample(PLANS[name], case, SMALL):
        program(name, case, setting, SMALL)


@pytest.mark.parametrize("part", ["few", exhaustive("others")])
@pytest.mark.parametrize("name", PLANS)
def test_every_variant_is_right(name: str, part: str) -> None:
    """Whatever is there or not there beside the input, in whatever dtype; in every run each option
    with and without the others, and of layer norm's any two in all combinations.

    Of the many of an LSTM's step only every third, with all combinations of any two options, and of
    its backward those with an even number of options, with all combinations of any but one;
    test_kernel_options.py has more of the definition.
    """
    op = ops.get(PLANS[name].op)
    chosen = op.variants[:: 3 if op.name == "lnlstm_step" else 1]
    if op.name == "lnlstm_step_backward":
        chosen = tuple(
            variant
            for variant in chosen
            if len(set(variant.split("+")) - {"plain"}) % 2 == 0 or variant in op.checked
        )
    few = each if of_gates(op.name) else pairwise
    numbers = few([frozenset(variant.split("+")) - {"plain"} for variant in chosen])
    for number, variant in enumerate(chosen):
        if (number in numbers) != (part == "few"):
            continue
        case = case_of(op.name, 24 if of_gates(op.name) else 100, "float16", variant)
        assert_right(case, program(name, case, device=SMALL), device=SMALL)


@pytest.mark.parametrize(("name", "case"), thinned(cases((256, 1000), long=False), 3))
def test_global_memory_is_read_once(name: str, case: Case) -> None:
    """With default knobs every matrix is read or written once, sums read and written once, in
    accesses of whole vectors, or of 16 bytes where these are wider.
    """
    width = get(name).default(case, DEVICE).vector_width
    rows, seen = 32, list[Traffic]()  # a whole number of blocks
    values = arguments(case, rows, device=DEVICE)
    emulated.kernel(case, program(name, case), seen=seen)(*values.values())
    for a in ops.get(case.op).arguments(case):
        if len(a.shape) > 1:
            size, access = values[a.name].nbytes, min(16, width * values[a.name].element_size())
            loaded = [
                sum(getattr(t[a.name], figure) for t in seen if a.name in t)
                for figure in ("loaded", "loads")
            ]
            stored = [
                sum(getattr(t[a.name], figure) for t in seen if a.name in t)
                for figure in ("stored", "stores")
            ]
            assert loaded == ([size, size // access] if a.role in ("in", "sum") else [0, 0]), a.name
            assert stored == ([size, size // access] if a.role in ("out", "sum") else [0, 0]), (
                a.name
            )


@pytest.mark.parametrize(("name", "hidden"), product(tuple(PLANS), (96, 1000)))
def test_a_row_does_not_depend_on_the_number_of_rows(name: str, hidden: int) -> None:
    """The bits of a row are the same alone and among others, wherever it lies: in a block of its
    own, or beside others in one.
    """
    case = case_of(PLANS[name].op, hidden, "float32")
    run = emulated.kernel(case, program(name, case))
    given = inputs(case, 5)

    def outputs(first: int, last: int) -> dict[str, Any]:
        part = row_slice(case, given, slice(first, last))
        values = arguments(case, last - first, part, device=DEVICE)
        run(*values.values())
        rows = by_row(case)
        return {name: out for name, out in written(case, values).items() if name in rows}

    together = outputs(0, 5)
    for row in (0, 2, 4):
        for which, alone in outputs(row, row + 1).items():
            assert torch.equal(alone[0], together[which][row]), f"{which} of row {row}"


@pytest.mark.parametrize("name", [name for name, s in PLANS.items() if sums_of(s.op)])
def test_sums_have_the_same_bits_in_every_order(name: str) -> None:
    """Sums over rows do not depend on which block or thread comes first."""
    case = case_of(PLANS[name].op, 96, "float32")
    results = []
    for order in ("forward", "backward", "shuffled"):
        values = arguments(case, 21, device=DEVICE)
        emulated.kernel(case, program(name, case), order)(*values.values())
        results.append(written(case, values))
    for other in results[1:]:
        assert all(torch.equal(output, other[n]) for n, output in results[0].items())


@pytest.mark.parametrize("name", PLANS)
def test_no_rows_change_nothing(name: str) -> None:
    """An empty batch has an empty grid, which is not launched; or it adds nothing to sums, and
    gives sums of 0.
    """
    case = case_of(PLANS[name].op, 64, "float32")
    compiled = program(name, case)
    if all(0 in launch.blocks(0) for launch in compiled.launches):
        return
    values = arguments(case, 0, device=DEVICE)
    emulated.kernel(case, compiled)(*values.values())
    for output, value in written(case, values).items():
        assert not value.count_nonzero(), output


@pytest.mark.parametrize("name", PLANS)
def test_offsets_are_64_bit(name: str) -> None:
    """More than 2^31 elements: no offset is computed in 32 bits, and the grid stays within what a
    launch can have.
    """
    case = case_of(PLANS[name].op, 4096, "float32")
    compiled = program(name, case)
    assert "int64_t rows" in compiled.source
    rows = 2**31 // 64
    for launch in compiled.launches:
        body = compiled.source.split(f" {launch.kernel}(")[-1].split("__global__")[0]
        assert "rows" not in launch.arguments or "(int)blockIdx" not in body
        x, y, z = launch.blocks(rows)
        assert x < 2**31
        assert max(y, z) < 2**16


@pytest.mark.parametrize("rows", TYPICAL_ROWS)
@pytest.mark.parametrize("arch", ["sm_75", "sm_86", "sm_90", "sm_120"])
@pytest.mark.parametrize("name", PLANS)
def test_default_knobs_are_valid(name: str, arch: str, rows: int) -> None:
    """There are default knobs for every size, dtype and row bucket on every architecture."""
    plan, device = PLANS[name], device_of(f"cuda:{arch}")
    for hidden in (
        1,
        2,
        3,
        8,
        31,
        96,
        97,
        768,
        1000,
        4096,
        5003,
        12288,
        16384,
        32768,
        50257,
        65521,
        65536,
    ):
        if of_gates(plan.op) and 4 * hidden > MAX_HIDDEN:
            continue
        for dtype in DTYPES:
            case = Case(plan.op, hidden, dtype, rows)
            assert plan.reason_invalid(plan.default(case, device), case, device) is None, (
                f"{case} on {arch}"
            )
