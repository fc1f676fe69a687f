"""Calls on a device: which one serves them, and knobs for tensors that are aligned badly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from grids import product
from on_gpu import Here, here
from torch import Tensor

import lntune
from lntune import knobs
from lntune.backends import device_of
from lntune.case import DTYPES, Case
from lntune.schedule import all_schedules, get
from lntune.torch import devices, dispatch
from lntune.torch.vector_width import VECTOR_WIDTH, narrowed

__all__ = ["here"]

pytestmark = pytest.mark.filterwarnings("ignore::lntune.UntunedWarning")
GPU = device_of("cuda:sm_90")
PLANS = {name: plan for name, plan in all_schedules().items() if plan.kind == "gpu"}


@pytest.mark.parametrize(
    ("name", "dtype", "widest"), product(tuple(PLANS), tuple(DTYPES), (1, 2, 4))
)
def test_narrowed_knobs_fit(name: str, dtype: str, widest: int) -> None:
    """Every GPU schedule has knobs for any alignment, valid ones, and as wide as it lets them
    be.
    """
    plan = PLANS[name]
    case = Case(plan.op, 1024, dtype, 512)
    setting = narrowed(plan.default(case, GPU), plan, case, GPU, widest)
    assert setting is not None
    assert plan.reason_invalid(setting, case, GPU) is None
    assert knobs.to_dict(setting)[VECTOR_WIDTH] == widest


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
    """In elements, of the first element and from row to row; where a kernel gets a copy it does not
    matter. CPUs do not mind.
    """
    whole = torch.empty(64)
    half = torch.empty(64, dtype=torch.float16)

    def widest(*tensors: Tensor, hidden: int = 8) -> int:
        layout = devices.layout(GPU, tensors, hidden)
        assert not layout.strided
        return layout.widest

    assert widest(whole, whole, hidden=64) == devices.ANY
    # a vector in float32 narrows no access of low precision
    assert widest(half, whole, hidden=64) == devices.ANY
    assert widest(whole, whole[1:33]) == 1
    assert widest(whole[2:], whole) == 2
    assert widest(half[4:]) == 4
    assert widest(whole.view(8, 8)[:, ::2], hidden=4) == devices.ANY
    cpu = devices.of(torch.device("cpu"))
    assert cpu is not None
    assert devices.layout(cpu, [whole[1:33]], 8) == (devices.ANY, False)
    assert devices.layout(cpu, [whole[1:33].view(4, 8)[:, :3]], 3) == (devices.ANY, True)


def test_strided_rows() -> None:
    """Evenly strided rows ask for a kernel that takes their distance, and their distance is a
    matter of alignment as well.
    """
    whole = torch.empty(16, 12)
    vector = torch.empty(4)
    odd = whole.view(-1)[: 16 * 11].view(16, 11)
    for view, widest in (
        (whole[:, :4], devices.ANY),
        (whole[:, 2:6], 2),
        (whole[::3, 4:8], devices.ANY),
        (odd[:, :4], 1),
    ):
        assert devices.layout(GPU, [view, vector], 4) == (widest, True)
    assert devices.layout(GPU, [whole[:1, :4], vector], 4) == (devices.ANY, False)  # one row
    # gates, four times hidden, and a cell that is part of wider rows
    assert devices.layout(GPU, [whole, whole[:, :3]], 3) == (devices.ANY, True)


ROWS: dict[str, tuple[Callable[[], Tensor], int, int | None]] = {
    "contiguous": (lambda: torch.rand(3, 5, 8), 8, 8),
    "contiguous, two axes to a row": (lambda: torch.rand(3, 5, 8), 40, 40),
    "one row": (lambda: torch.rand(1, 16)[:, :8], 8, 8),
    "part of wider rows": (lambda: torch.rand(3, 5, 12)[..., :8], 8, 12),
    "every other row": (lambda: torch.rand(6, 8)[::2], 8, 16),
    "one step of a batch of sequences": (lambda: torch.rand(3, 5, 8)[:, 2], 8, 40),
    "some steps of a batch of sequences": (lambda: torch.rand(3, 5, 8)[:, 1:3], 8, None),
    "the same row again and again": (lambda: torch.rand(1, 8).expand(4, 8), 8, 0),
    "the same number again and again": (lambda: torch.rand(1, 1).expand(4, 8), 8, None),
    "transposed": (lambda: torch.rand(8, 3).t(), 8, None),
    "axes of rows exchanged": (lambda: torch.rand(3, 5, 8).transpose(0, 1), 8, None),
    "axes of a row exchanged": (lambda: torch.rand(3, 5, 8).transpose(1, 2), 40, None),
    "every other element": (lambda: torch.rand(3, 16)[:, ::2], 8, None),
    "rows of one element": (lambda: torch.rand(3, 4)[:, 1:2], 1, 4),
    "part of wider rows of two axes": (lambda: torch.rand(3, 5, 8)[:, :4], 32, 40),
    "axes of size one": (lambda: torch.rand(3, 5, 12)[:, None, :, None, :8], 8, 12),
}


@pytest.mark.parametrize(("make", "length", "stride"), ROWS.values(), ids=ROWS)
def test_where_rows_lie(
    here: Here, make: Callable[[], Tensor], length: int, stride: int | None
) -> None:
    """The distance of evenly strided rows is found whatever their axes, and they stay where they
    are; other tensors are copied.
    """
    tensor = make().to(here.name)
    assert devices.row_stride(tensor, length) == stride
    taken = devices.matrix(tensor, length)
    assert taken.shape == (tensor.numel() // length, length)
    assert torch.equal(taken.flatten(), tensor.flatten())
    assert (taken.data_ptr() == tensor.data_ptr()) == (stride is not None)


def test_a_device_without_kernels_is_none() -> None:
    """What is neither a CPU nor a GPU that can be used has no device of lntune's, and kernels serve
    nothing there.
    """
    assert devices.of(torch.device("meta")) is None
    y = lntune.layer_norm(torch.empty(2, 8, device="meta"), (8,))
    assert y.shape == (2, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_misaligned_views_are_served(here: Here, dtype: torch.dtype) -> None:
    """On a GPU a misaligned view, of input, weight or gradient, goes to a kernel with narrower
    accesses and gives what eager gives.
    """
    hidden, shift = 256, 3
    buffer = torch.randn(4 * hidden + shift, dtype=dtype, device=here.name)
    x = buffer[shift:].view(4, hidden)
    weight = torch.randn(hidden + 1, dtype=dtype, device=here.name)[1:]
    bias = torch.randn(hidden, dtype=dtype, device=here.name)
    here.launches()
    given = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = lntune.layer_norm(given[0], (hidden,), *given[1:])
    grads = torch.autograd.grad(
        y, given, torch.ones(4 * hidden + 1, dtype=dtype, device=here.name)[1:].view(4, hidden)
    )
    assert here.launches() >= 1
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    truth = torch.nn.functional.layer_norm(wide[0], (hidden,), *wide[1:])
    expected = torch.autograd.grad(truth.sum(), wide)
    tolerance: dict[str, Any] = (
        {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    )
    for ours, theirs in zip((y, *grads), (truth, *expected), strict=True):
        torch.testing.assert_close(ours.double(), theirs, **tolerance)


def test_decisions_are_per_device(here: Here) -> None:
    """The CPU and a GPU of one process have choices of their own, by their own schedules."""
    case = Case("layer_norm", 512, "float32", 512)
    assert get(dispatch.choose(case, here.device).schedule).kind == "gpu"
    assert get(dispatch.choose(case).schedule).kind == "cpu"
    assert "--target cuda" not in str(lntune.explain(case.op, case.hidden, case.dtype, case.rows))
