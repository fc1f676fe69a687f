"""Deliberately wrong CUDA kernels, in the emulator: none passes the check of what serves calls."""

from __future__ import annotations

import functools

import msgspec
import pytest
from grids import thinned
from wrong_gpu_kernels import CASES, FAULTS, kernel

from lntune import check
from lntune.backends import cuda, device_of
from lntune.backends.cuda import row_counts
from lntune.backends.emulated import calls
from lntune.backends.emulated.emulator import EmulatorError
from lntune.case import Case
from lntune.kernels import compiler
from lntune.schedule import get

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


@pytest.mark.slow
@pytest.mark.skipif(bool(cuda.available()), reason=f"no CUDA compiler: {cuda.available()}")
@pytest.mark.parametrize("tanh", ["tanhf", "turned"])
def test_what_is_left_of_saturated_gates(tanh: str) -> None:
    """The backward of a step whose tanh is 1 where less than a millionth is missing is refused; the
    schedule's own is right.
    """
    case, plan = Case("lnlstm_step_backward", 40, "float32", 8), get("gated_row_backward")
    made = compiler.program(case, plan, plan.default(case, DEVICE), DEVICE)
    turned = """
__device__ float turned(float x) {
  float t = tanhf(x);
  return fabsf(t) > 1.0f - 1e-6f ? copysignf(1.0f, t) : t;
}
"""
    head, begins, kernel = made.source.partition('extern "C"')
    source = head + turned + begins + kernel.replace("tanhf(", f"{tanh}(")
    called = calls.kernel(case, msgspec.structs.replace(made, source=source))
    verdict = check.verify(case, called, check.ALIGNED, "cpu", DEVICE)
    assert verdict.ok == (tanh == "tanhf"), verdict.message
