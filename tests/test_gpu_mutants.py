"""Deliberately wrong CUDA kernels, in the emulator: none passes the check of what serves calls."""

from __future__ import annotations

import functools

import pytest
from grids import thinned
from wrong_gpu_kernels import CASES, FAULTS, kernel

from lntune import check
from lntune.backends import device_of
from lntune.backends.cuda import row_counts
from lntune.backends.emulated.emulator import EmulatorError

DEVICE = device_of("emulated:sm_90")


@functools.cache
def said(op: str, fault: int) -> str:
    """Why a kernel is refused, empty where it is accepted."""
    called = kernel(op, fault)
    more, every = row_counts.thorough(CASES[op], called)
    try:
        verdict = check.verify(CASES[op], called, check.ALIGNED, "cpu", DEVICE, more, True, every)
    except EmulatorError as e:
        return str(e)
    return verdict.message


@pytest.mark.parametrize("op", CASES)
def test_the_right_ones_are_accepted(op: str) -> None:
    """The kernels below without their faults are right."""
    assert not said(op, 0)


@pytest.mark.parametrize(
    ("op", "fault"),
    thinned([(op, fault) for op, count in FAULTS.items() for fault in range(1, count + 1)]),
)
def test_wrong_ones_are_not(op: str, fault: int) -> None:
    """Barriers left out, rows or sums left out, wrong from a turn of the loop on, wrong tails,
    accesses outside, special values taken for others: each is refused.
    """
    assert said(op, fault)
