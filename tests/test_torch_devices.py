"""Calls on a device: which one serves them, and knobs for tensors that are aligned badly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from on_gpu import Here, here

import lntune
from lntune import knobs
from lntune.case import DTYPES, Case
from lntune.cuda.targets import device_of
from lntune.schedule import all_schedules, get
from lntune.torch import devices, dispatch
from lntune.torch.narrow import ACCESS, narrowed

__all__ = ["here"]

pytestmark = pytest.mark.filterwarnings("ignore::lntune.UntunedWarning")
GPU = device_of("cuda:sm_90")
PLANS = {name: plan for name, plan in all_schedules().items() if plan.kind == "gpu"}


@pytest.mark.parametrize("widest", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PLANS)
def test_narrowed_knobs_fit(name: str, dtype: str, widest: int) -> None:
    """Every GPU schedule has knobs for any alignment, valid ones, and as wide as it lets them be."""
    plan = PLANS[name]
    case = Case(plan.op, 1024, dtype, 512)
    found = narrowed(plan.default(case, GPU), plan, case, GPU, widest)
    assert found is not None
    assert plan.reason_invalid(found, case, GPU) is None
    assert knobs.to_dict(found)[ACCESS] == widest


def test_knobs_that_fit_stay() -> None:
    """Where the accesses are narrow enough, or the device is a CPU, the knobs are left alone."""
    plan = get("shared_row")
    case = Case("layer_norm", 1024, "float32", 512)
    setting = plan.default(case, GPU)
    assert narrowed(setting, plan, case, GPU, 4) is setting
    cpu = get("cached_rows")
    here = devices.of(torch.device("cpu"))
    assert here is not None
    assert narrowed(cpu.default(case, here), cpu, case, here, 1) == cpu.default(case, here)


def test_alignment_is_that_of_the_worst_tensor() -> None:
    """In elements, of contiguous tensors only: of others a kernel gets copies. CPUs do not mind."""
    whole = torch.empty(64)
    assert devices.widest(GPU, [whole, whole]) == devices.ANY
    assert devices.widest(GPU, [whole, whole[1:33]]) == 1
    assert devices.widest(GPU, [whole[2:], whole]) == 2
    assert devices.widest(GPU, [torch.empty(64, dtype=torch.float16)[4:]]) == 4
    assert devices.widest(GPU, [whole.view(8, 8)[:, 1:]]) == devices.ANY
    assert devices.widest(devices.of(torch.device("cpu")), [whole[1:]]) == devices.ANY  # type: ignore[arg-type]


def test_a_device_without_kernels_is_none() -> None:
    """What is neither a CPU nor a GPU that can be used has no device of lntune's, and kernels serve nothing there."""
    assert devices.of(torch.device("meta")) is None
    y = lntune.layer_norm(torch.empty(2, 8, device="meta"), (8,))
    assert y.shape == (2, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_misaligned_views_are_served(here: Here, dtype: torch.dtype) -> None:
    """On a GPU a misaligned view, of input, weight or gradient, goes to a kernel with narrower accesses and gives what eager gives."""
    hidden, shift = 256, 3
    buffer = torch.randn(4 * hidden + shift, dtype=dtype, device=here.name)
    x = buffer[shift:].view(4, hidden)
    weight = torch.randn(hidden + 1, dtype=dtype, device=here.name)[1:]
    bias = torch.randn(hidden, dtype=dtype, device=here.name)
    here.launches()
    given = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = lntune.layer_norm(given[0], (hidden,), *given[1:])
    made = torch.autograd.grad(y, given, torch.ones(4 * hidden + 1, dtype=dtype, device=here.name)[1:].view(4, hidden))
    assert here.launches() >= 1
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    truth = torch.nn.functional.layer_norm(wide[0], (hidden,), *wide[1:])
    expected = torch.autograd.grad(truth.sum(), wide)
    tolerance: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    for ours, theirs in zip((y, *made), (truth, *expected), strict=True):
        torch.testing.assert_close(ours.double(), theirs, **tolerance)


def test_decisions_are_per_device(here: Here) -> None:
    """The CPU and a GPU of one process have choices of their own, by their own schedules."""
    case = Case("layer_norm", 512, "float32", 512)
    assert get(dispatch.choose(case, here.device).schedule).kind == "gpu"
    assert get(dispatch.choose(case).schedule).kind == "cpu"
    assert "--target cuda" not in str(dispatch.describe(case))
