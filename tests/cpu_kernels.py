"""The CPU's schedules, the cases they are tested in, and their kernels, which one test builds for
another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from lntune import check, ops
from lntune import device as device_module
from lntune.case import DTYPES, Case
from lntune.device import Device
from lntune.kernels import compiler
from lntune.schedule import all_schedules, get

DEVICE = device_module.current()
PLANS = {name: s for name, s in all_schedules().items() if s.kind == DEVICE.kind and not s.propose}
LAYER_NORMS = [name for name, s in PLANS.items() if s.op == "layer_norm"]

# Below a vector; primes; exactly one vector and several; a tail of every width (100 = 64 + 32 + 4,
# 1000 = 7 x 128 + 64 + 32 + 8); one more than a power of two. They cost a build each.
SHORT = (1, 2, 3, 7, 31, 64, 100, 769, 1000, 1024, 4097)
# float16 differs from bfloat16 in the conversions alone: a row below a vector, whole vectors,
# tails, a long one.
SHORT_HALF = (1, 3, 64, 100, 1000, 4097)
# The steps of an LSTM take longer to build and are made of the same loops.
STEP_SIZES = {"float32": (1, 7, 100, 1000), "bfloat16": (7, 100, 1000), "float16": (1, 1000)}
# A long row costs seconds of float64 reference and takes no other path than a short one, but
# offsets and sums are larger: the longest, and a vocabulary's odd one, each in one dtype.
LONG = ((50257, "float32"), (65536, "bfloat16"), (50257, "float16"))

Kernel = Callable[..., Any]


def cases(op: str, sizes: tuple[tuple[int, str], ...], rows: int = 512) -> list[Case]:
    """A case for each (hidden, dtype)."""
    return [Case(op, hidden, dtype, rows) for hidden, dtype in sizes]


def schedule_cases(
    dtypes: tuple[str, ...] = tuple(DTYPES),
    short: tuple[int, ...] = SHORT,
    long: tuple[tuple[int, str], ...] = LONG,
) -> list[Any]:
    """(schedule, case) for all that have valid knobs, with readable ids."""
    parameters = []
    for name, plan in PLANS.items():
        every = STEP_SIZES if plan.op.startswith("lnlstm") else {"float16": SHORT_HALF}
        for case in cases(
            plan.op,
            (
                *(
                    (h, d)
                    for d in dtypes
                    for h in (every.get(d, short) if short is SHORT else short)
                ),
                *long,
            ),
        ):
            if plan.reason_invalid(plan.default(case, DEVICE), case, DEVICE) is None:
                parameters.append(pytest.param(name, case, id=f"{name}-{case.dtype}-{case.hidden}"))
    return parameters


@functools.lru_cache(maxsize=256)
def built(name: str, case: Case, device: Device = DEVICE) -> Kernel:
    """The kernel of a schedule's default knobs."""
    plan = get(name)
    return compiler.in_memory(case, plan, plan.default(case, device), device)


def assert_right(case: Case, kernel: Kernel) -> None:
    """The kernel passes the check that every candidate of a tuning run has to pass."""
    verdict = check.verify(case, kernel)
    assert verdict.ok, verdict.message
    assert set(verdict.errors) == {
        a.name for a in ops.get(case.op).arguments(case) if a.role in ("out", "sum")
    }
    assert all(error <= 1 for error in verdict.errors.values())
