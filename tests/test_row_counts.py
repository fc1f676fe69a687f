"""Which row counts a GPU's kernel is checked with: those that every block of threads takes two
steps of, and those that fill a block in every way.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from lntune.backends import device_of
from lntune.backends.cuda import row_counts, sizes
from lntune.backends.cuda.device_code import Launch
from lntune.case import Case
from lntune.kernels import compiler
from lntune.schedule import get

GPU = device_of("cuda:sm_90")


def launch(grid: tuple[str, str], rows: int = 1, *steps: str, told: bool = True) -> Launch:
    """A launch of blocks with so many rows of threads; `steps` are those of its loops over rows."""
    arguments = ("x", "rows") if told else ("parts",)
    return Launch("main_kernel", arguments, (*grid, "1"), (32, rows, 1), 0, steps)


@pytest.mark.parametrize(
    ("launched", "expected"),
    [
        (launch(("rows", "1")), ()),
        (launch(("((rows + 3) // 4)", "1"), 4), (2, 3, 4, 11)),
        (launch(("8", "((rows + 1) // 2)")), (2, 5)),
        (launch(("132", "1"), 1, "(((rows + 131) - 0) // 132)"), (269,)),
        (launch(("16", "1"), 4, "((rows + 63) >> 6)"), (2, 3, 4, 133)),
        # columns along x: all of its blocks take 2 * 8 rows at a time
        (launch(("64", "2"), 8, "((rows + 15) // 16)"), (2, 3, 4, 5, 6, 7, 8, 37)),
        (launch(("5", "1"), 1, "((rows + 4) // 5)"), (14,)),
        (launch(("1", "1"), 1, "rows"), (3,)),
        # a loop that one step is peeled off
        (launch(("132", "1"), 1, "(((rows + 131) // 132) - 1)"), (269,)),
        # told the rows, and never seen to loop over them
        (launch(("64", "1"), 2), (2, 261)),
        (launch(("8", "1"), 16, told=False), ()),
    ],
    ids=[
        "a block a row",
        "four rows a block",
        "two rows a block along y",
        "132 blocks",
        "16 blocks of four rows",
        "columns",
        "five blocks",
        "one block",
        "peeled",
        "unknown",
        "totals",
    ],
)
def test_from_launches_alone(launched: Launch, expected: tuple[int, ...]) -> None:
    """Two steps of all blocks and a few rows more, where blocks loop; every number of rows that a
    block of several may have; nothing where 1 and 21 rows reach everything.
    """
    assert row_counts.reaching([launched]) == expected


@pytest.mark.parametrize("grid", ["rows", "((rows + 3) // 4)", "7"])
def test_every_number_of_rows_of_a_block_is_reached(grid: str) -> None:
    """Blocks of several rows are seen with each number of these in the last one."""
    steps = ("((rows + 27) // 28)",) if grid == "7" else ()
    rows = 1 if grid == "rows" else 4
    counts = row_counts.reaching([launch((grid, "1"), rows, *steps)])
    assert {count % rows for count in (1, 21, *counts)} == set(range(rows))


SETTINGS: list[tuple[str, Case, dict[str, Any]]] = [
    ("shared_row", Case("layer_norm", 256, "float32", 4096), {}),
    ("shared_row_backward", Case("layer_norm_backward", 256, "bfloat16", 4096), {}),
    ("shared_row_backward", Case("layer_norm_backward", 1000, "float32", 4096), {}),
    ("shared_row_backward", Case("layer_norm_backward", 1024, "float32", 32), {}),
    (
        "shared_row_backward",
        Case("layer_norm_backward", 1024, "float32", 4096),
        {"threads_per_row": 32, "rows_per_block": 8, "partial_sums": "separate_kernel"},
    ),
    (
        "shared_row_backward",
        Case("layer_norm_backward", 96, "float32", 4096, "weight+dx"),
        {},
    ),
    ("gated_row", Case("lnlstm_step", 64, "float32", 128), {}),
    ("gated_row_backward", Case("lnlstm_step_backward", 64, "float32", 128), {}),
    (
        "gated_row_backward",
        Case("lnlstm_step_backward", 64, "float32", 128),
        {
            "row_storage": "reload",
            "partial_sums": "global",
            "prefetch": False,
            "intermediates": "recompute",
        },
    ),
]


@pytest.mark.parametrize(("name", "case", "changed"), SETTINGS)
def test_of_shipped_schedules(name: str, case: Case, changed: dict[str, Any]) -> None:
    """For a GPU of 132 multiprocessors every loop over rows is found, and with the most rows its
    last block goes round it twice or more, while blocks with fewer steps than the first are there.
    """
    plan = get(name)
    setting = plan.default(case, GPU)
    setting = type(setting)(**{**vars(setting), **changed})
    assert plan.valid(setting, case, GPU) is None
    launches = compiler.program(case, plan, setting, GPU).launches
    most = max(row_counts.reaching(launches), default=1)
    loops = [
        (one, step) for one in launches for step in one.steps if sizes.number(step, 1 << 20) > 1
    ]
    sums = "dgamma" in case.variant or (case.op.endswith("backward") and not case.variant)
    assert bool(loops) is sums
    for one, step in loops:
        # the first block's: the last has as many with as many rows less as come before its own
        rows = getattr(setting, "rows_per_block", 1)
        blocks = math.prod(one.blocks(1)) if one.grid[1] == "1" else one.blocks(1)[1]
        assert sizes.number(step, most) == 3
        assert sizes.number(step, most - (blocks - 1) * rows) == 2
