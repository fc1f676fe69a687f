"""Kernels on a GPU: every operator, dtype and variant against float64, empty and huge tensors, the
same bits every time, errors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grids import product, thinned
from kernel_arguments import arguments, by_row, inputs, row_slice, written
from on_gpu import Here, here
from typer.testing import CliRunner

from lntune import backends, ops, schedule
from lntune.case import DTYPES, TYPICAL_ROWS, Case
from lntune.cli import app
from lntune.errors import InputError, LaunchError
from lntune.kernels import cache
from lntune.schedule import Schedule

__all__ = ["here"]

PLANS = [s for s in schedule.all_schedules().values() if s.kind == "gpu"]
every_plan = pytest.mark.parametrize("plan", thinned(PLANS), ids=lambda plan: plan.name)
every_pair = pytest.mark.parametrize(
    ("plan", "dtype"), product(PLANS, tuple(DTYPES)), ids=lambda one: getattr(one, "name", one)
)


def default(plan: Schedule, case: Case, here: Here) -> Callable[..., None]:
    """The kernel of a schedule with its default knobs."""
    return cache.kernel(case, plan, plan.default(case, here.device), here.device)


def assert_right(case: Case, kernel: Callable[..., None], here: Here) -> None:
    """The kernel passes the check that every candidate of a tuning run has to pass: adversarial
    inputs, fences, float64.
    """
    verdict = backends.of(here.device).verify(case, here.device, kernel)
    assert verdict.ok, verdict.message


@every_pair
def test_every_size_is_right(plan: Schedule, dtype: str, here: Here) -> None:
    """One element, odd and prime sizes, whole vectors, long rows: right on every style of input,
    with default knobs.
    """
    sizes = here.pick((1, 7, 97, 768, 1000, 1024, 4096, 5003, 8192, 12288, 16384), (40,))
    for case, kernel in here.kernels((plan, Case(plan.op, hidden, dtype, 512)) for hidden in sizes):
        assert_right(case, kernel, here)


@every_plan
def test_the_longest_rows_are_right(plan: Schedule, here: Here) -> None:
    """The longest rows there are, and a long odd one."""
    sizes = here.pick((65536, 50257) if plan.op.startswith("layer_norm") else (16384, 12289), (96,))
    for case, kernel in here.kernels(
        (plan, Case(plan.op, hidden, "bfloat16", 512)) for hidden in sizes
    ):
        assert_right(case, kernel, here)


@every_plan
def test_every_variant_is_right(plan: Schedule, here: Here) -> None:
    """Whatever is there or not there beside the input, in every dtype."""
    op = ops.get(plan.op)
    every = [
        Case(op.name, here.pick(1000, 24), dtype, 512, variant)
        for variant in op.variants
        for dtype in DTYPES
    ]
    for case, kernel in here.kernels(
        (plan, case) for case in here.pick(every, every[1 :: max(1, len(every) // 2)])
    ):
        assert_right(case, kernel, here)


@every_plan
def test_every_row_bucket_is_right(plan: Schedule, here: Here) -> None:
    """A schedule may look at the number of rows its kernel is for; whichever that is, the kernel is
    right for any.
    """
    hidden = here.pick(1024, 24)
    for case, kernel in here.kernels(
        (plan, Case(plan.op, hidden, "bfloat16", rows)) for rows in here.pick(TYPICAL_ROWS, (1,))
    ):
        assert_right(case, kernel, here)


def on_device(
    case: Case, rows: int, here: Here, given: dict[str, Any] | None = None
) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """(the arguments of a kernel on the GPU, its outputs by name)."""
    values = arguments(case, rows, given, device=here.device, place=here.name)
    return list(values.values()), written(case, values)


@every_pair
def test_the_same_bits_every_time(plan: Schedule, dtype: str, here: Here) -> None:
    """The same call gives the same bits, sums over rows (dgamma, dbeta and their like) among them:
    nothing is added in the order it comes.
    """
    case = Case(plan.op, here.pick(1024, 40), dtype, here.pick(4096, 32))
    kernel = default(plan, case, here)
    first: dict[str, torch.Tensor] = {}
    for _ in range(here.pick(20, 2)):
        values, outputs = on_device(case, case.rows, here)
        kernel(*values)
        here.wait()
        assert not any(out.isnan().any() for out in outputs.values())
        for name, out in outputs.items():
            assert torch.equal(first.setdefault(name, out), out), name


@every_plan
def test_no_rows(plan: Schedule, here: Here) -> None:
    """An empty batch is no launch of anything that has rows, and no error."""
    case = Case(plan.op, 40, "float32", 8)
    values, outputs = on_device(case, 0, here)
    default(plan, case, here)(*values)
    here.wait()
    assert all(out.eq(0).all() for out in outputs.values()), (
        "sums over no rows are 0, and nothing else has elements"
    )


@pytest.mark.parametrize("op", ["layer_norm", "layer_norm_backward"])
def test_more_than_two_to_the_31_elements(op: str, here: Here) -> None:
    """Beyond 2^31 elements every row is still the right one, at the beginning, around 2^31 and at
    the end.
    """
    hidden, elements = here.pick((4096, 2**31 + 2**24), (40, 2**9))
    if here.real:
        free = torch.cuda.mem_get_info(here.name)[0]
        if free < 24 << 30:
            pytest.skip(f"needs 24 GiB of the GPU's memory; {free >> 30} are free")
    case = Case(op, hidden, "bfloat16", 32768)
    plan = next(p for p in PLANS if p.op == op)
    rows = -(-elements // hidden)
    chosen = sorted(
        {*range(4), *range(2**31 // hidden - 2, 2**31 // hidden + 2), *range(rows - 4, rows)}
        & set(range(rows))
    )
    # 64 rows over and over; each block of them scaled differently would need as much memory again
    small, sliced = inputs(case, 64), by_row(case)
    given = dict(small)
    for name in sliced & set(small):
        block = small[name].to(here.name)
        given[name] = block.repeat(-(-rows // 64), *(1 for _ in block.shape[1:]))[:rows]
    values, outputs = on_device(case, rows, here, given)
    default(plan, case, here)(*values)
    here.wait()
    part = Case(op, hidden, "bfloat16", len(chosen))
    chosen_inputs = row_slice(case, small, [row % 64 for row in chosen])
    truth = ops.get(op).reference(part, chosen_inputs)
    for name in sliced & set(outputs):
        off = (outputs[name][chosen].cpu().double() - truth[name]).abs().max().item()
        assert off <= 2.0**-7 * truth[name].abs().max().item(), f"{name}: {off}"


def test_arguments_that_do_not_fit(here: Here) -> None:
    """A tensor of another dtype, shape, layout or alignment, one too many, is an InputError naming
    the operator and the argument, on a GPU also one on the CPU; nothing is launched, and the next
    call works.
    """
    plan = next(p for p in PLANS if p.op == "layer_norm")
    case = Case("layer_norm", 64, "float32", 8)
    kernel = default(plan, case, here)
    values, outputs = on_device(case, 8, here)
    x = values[0]
    wrong = [
        x.double(),
        x[:, :32],
        x.t().contiguous().t(),
        torch.cat([x.flatten(), x[0]])[1 : 1 + x.numel()].view(x.shape),
    ]
    wrong += [x.cpu()] if here.real else []
    here.launches()
    for bad in wrong:
        with pytest.raises(InputError, match=r"layer_norm.*x"):
            kernel(bad, *values[1:])
    with pytest.raises(InputError, match="layer_norm"):
        kernel(*values, x)
    assert outputs["y"].isnan().all()
    kernel(*values)
    here.wait()
    assert outputs["y"].isfinite().all()


def test_a_launch_that_fails(here: Here) -> None:
    """An error of the driver is a LaunchError naming the operator and the case; the process can go
    on where the driver lets it.
    """
    if here.fake is None:
        pytest.skip("a real driver has no launch that fails and leaves the process as it was")
    plan = next(p for p in PLANS if p.op == "layer_norm")
    case = Case("layer_norm", 64, "float32", 8)
    kernel = default(plan, case, here)
    values, outputs = on_device(case, 8, here)
    here.fake.fail("cuLaunchKernel", 701)  # too many resources requested for launch
    with pytest.raises(LaunchError, match=r"layer_norm.*64.*float32"):
        kernel(*values)
    here.fake.fail()
    kernel(*values)
    assert outputs["y"].isfinite().all()


def test_every_operator_has_a_schedule() -> None:
    """Each operator has a schedule for GPUs, so that the tests above leave none out."""
    assert {plan.op for plan in PLANS} == set(ops.OPS)


def test_the_check_command(here: Here) -> None:
    """`lntune check --target cuda` checks what serves calls on the GPU, by the schedules that are
    for it.
    """
    here.launches()
    done = CliRunner().invoke(
        app,
        [
            "check",
            "layer_norm",
            "--hidden",
            "40",
            "--dtype",
            "bfloat16",
            "--rows",
            "24",
            "--target",
            "cuda",
            "--json",
        ],
    )
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)
    assert {r["case"]["variant"] for r in results} == {
        ops.get("layer_norm").variants[0],
        *ops.get("layer_norm").checked,
    }
    assert all(schedule.get(r["schedule"]).kind == "gpu" and r["errors"] for r in results)
    assert here.launches() >= 1
