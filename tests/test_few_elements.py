"""Rows of a few elements: shipped schedules' kernels are right there, and are accepted as what
serves calls, though two right computations may be far apart in rows that are next to constant.
"""

from __future__ import annotations

from typing import Any

import pytest
from cpu_kernels import DEVICE, PLANS, built
from grids import thinned

from lntune import backends, ops
from lntune.case import DTYPES, Case
from lntune.schedule import get

SIZES = (2, 3, 1, 4, 5, 7, 8)


def cases() -> list[Any]:
    """(schedule, hidden, dtype, variant); in every run some of each operator."""
    every = [
        (name, hidden, dtype, variant)
        for name, plan in PLANS.items()
        for hidden in SIZES
        for dtype in DTYPES
        for variant in ops.get(plan.op).variants
    ]
    return thinned(every, 449)


@pytest.mark.parametrize(("name", "hidden", "dtype", "variant"), cases())
def test_default_knobs_are_accepted(name: str, hidden: int, dtype: str, variant: str) -> None:
    """The default knobs of every schedule pass the thorough check at every small size."""
    plan = get(name)
    case = Case(plan.op, hidden, dtype, 300, variant)
    if plan.reason_invalid(plan.default(case, DEVICE), case, DEVICE) is not None:
        pytest.skip("the schedule is not for such rows")
    kernel = built(name, case)
    verdict = backends.of(DEVICE).verify(case, DEVICE, kernel, thoroughly=True)
    assert verdict.ok, verdict.message
