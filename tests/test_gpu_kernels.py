"""GPU kernels on the CPU: every GPU schedule's CUDA source, run by the emulator, against float64 mathematics."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch

from lntune import build, check, emulated, knobs, ops
from lntune.case import DTYPES, TYPICAL_ROWS, Case
from lntune.cuda.targets import device_of
from lntune.device_code import Program
from lntune.emulator import Traffic
from lntune.schedule import Schedule, all_schedules, get

DEVICE = device_of("cuda:sm_90")
PLANS = {name: s for name, s in all_schedules().items() if s.kind == "gpu"}
# One element; an odd few; a prime of several turns; ragged turns of wide accesses; whole ones.
SIZES = (1, 7, 97, 1000, 1024)
LONG = ((8192, "float32"), (12288, "bfloat16"), (5003, "float16"))


@functools.lru_cache(maxsize=64)
def program(name: str, case: Case, setting: Any = None) -> Program:
    """The program of a schedule, with its default knobs where none are given."""
    plan = get(name)
    return build.program(case, plan, setting or plan.default(case, DEVICE), DEVICE)


def cases(sizes: tuple[int, ...] = SIZES, long: tuple[tuple[int, str], ...] = LONG) -> list[Any]:
    """(schedule, case) for every GPU schedule, with readable ids."""
    return [
        pytest.param(name, Case(plan.op, hidden, dtype, 512), id=f"{name}-{dtype}-{hidden}")
        for name, plan in PLANS.items()
        for hidden, dtype in [*((h, d) for d in DTYPES for h in sizes), *long]
    ]


def sample(plan: Schedule, case: Case, count: int) -> list[Any]:
    """Some of the valid knobs, the same every time; each value of each knob at least once where there are so many."""
    space = plan.space(case, DEVICE)
    random.Random(f"{plan.name} {case}").shuffle(space)
    chosen: list[Any] = []
    seen: set[tuple[str, Any]] = set()
    for setting in space:
        new = set(knobs.to_dict(setting).items()) - seen
        if new:
            chosen.append(setting)
            seen |= new
    rest = [s for s in space if s not in chosen]
    return (chosen + rest)[: max(count, len(chosen))]


def assert_right(case: Case, made: Program, order: str = "forward") -> None:
    """The program passes the check that every candidate of a tuning run has to pass."""
    verdict = check.verify(case, emulated.kernel(case, made, order), check.ALIGNED)
    assert verdict.ok, verdict.message


@pytest.mark.parametrize(("name", "case"), cases())
def test_default_knobs_are_right(name: str, case: Case) -> None:
    """With default knobs every size and dtype is right on every style of input, whatever the order the threads run in."""
    assert_right(case, program(name, case), "shuffled")


@pytest.mark.parametrize("hidden", [96, 1000, 2048])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PLANS)
def test_a_spread_of_knobs_is_right(name: str, dtype: str, hidden: int) -> None:
    """Every value of every knob that fits is right, in some combination."""
    case = Case(PLANS[name].op, hidden, dtype, 512)
    for setting in sample(PLANS[name], case, 4):
        assert_right(case, program(name, case, setting), "backward")


@pytest.mark.parametrize("name", PLANS)
def test_every_variant_is_right(name: str) -> None:
    """Whatever is there or not there beside the input, in whatever dtype."""
    op = ops.get(PLANS[name].op)
    for variant in op.variants:
        case = Case(op.name, 100, "float16", 512, variant)
        assert_right(case, program(name, case))


@pytest.mark.parametrize(("name", "case"), cases((256, 1000), ()))
def test_global_memory_is_read_once(name: str, case: Case) -> None:
    """With default knobs x is read once and y written once, in accesses of 16 bytes."""
    if PLANS[name].op != "layer_norm":
        pytest.skip("the figures are layer norm's")
    rows, seen = 32, list[Traffic]()  # a whole number of blocks
    given = ops.get(case.op).inputs(case, rows, "normal", 0)
    arguments = ops.get(case.op).arguments(case)
    values = [given[a.name] if a.role != "out" else torch.empty(a.sizes(rows, case.hidden), dtype=getattr(torch, a.dtype)) for a in arguments]
    emulated.kernel(case, program(name, case), seen=seen)(*values)
    (traffic,) = seen
    size = rows * case.hidden * case.itemsize
    assert traffic["x"].loaded == size
    assert traffic["y"].stored == size
    assert traffic["x"].loads == traffic["y"].stores == size // 16


@pytest.mark.parametrize("name", PLANS)
def test_a_row_does_not_depend_on_the_number_of_rows(name: str) -> None:
    """The bits of a row are the same alone and among others."""
    case = Case(PLANS[name].op, 1000, "float32", 512)
    op = ops.get(case.op)
    run = emulated.kernel(case, program(name, case))
    given = op.inputs(case, 5, "normal", 0)
    outputs = []
    for rows in (1, 5):
        out: dict[str, Any] = {
            a.name: torch.empty(a.sizes(rows, case.hidden), dtype=getattr(torch, a.dtype)) for a in op.arguments(case) if a.role == "out"
        }
        take = {a.name: given[a.name][:rows] if a.shape[:1] == ("rows",) else given[a.name] for a in op.arguments(case) if a.role != "out"}
        run(*({**take, **out}[a.name] for a in op.arguments(case)))
        outputs.append(out)
    for name_, first in outputs[0].items():
        assert torch.equal(first[0], outputs[1][name_][0])


@pytest.mark.parametrize("name", PLANS)
def test_no_rows_launch_nothing(name: str) -> None:
    """An empty batch has an empty grid, which is not launched."""
    case = Case(PLANS[name].op, 64, "float32", 512)
    for launch in program(name, case).launches:
        assert 0 in launch.blocks(0)


@pytest.mark.parametrize("name", PLANS)
def test_offsets_are_64_bit(name: str) -> None:
    """More than 2^31 elements: no offset is computed in 32 bits, and the grid stays within what a launch can have."""
    case = Case(PLANS[name].op, 4096, "float32", 512)
    made = program(name, case)
    assert "int64_t rows" in made.source
    assert "(int)blockIdx" not in made.source
    rows = 2**31 // 64
    for launch in made.launches:
        x, y, z = launch.blocks(rows)
        assert x < 2**31
        assert max(y, z) < 2**16


@pytest.mark.parametrize("rows", TYPICAL_ROWS)
@pytest.mark.parametrize("arch", ["sm_75", "sm_86", "sm_90", "sm_120"])
@pytest.mark.parametrize("name", PLANS)
def test_default_knobs_are_valid(name: str, arch: str, rows: int) -> None:
    """There are default knobs for every size, dtype and row bucket on every architecture."""
    plan, device = PLANS[name], device_of(f"cuda:{arch}")
    for hidden in (1, 2, 3, 8, 31, 96, 97, 768, 1000, 4096, 5003, 12288, 16384, 32768, 50257, 65521, 65536):
        for dtype in DTYPES:
            case = Case(plan.op, hidden, dtype, rows)
            assert plan.reason_invalid(plan.default(case, device), case, device) is None, f"{case} on {arch}"
