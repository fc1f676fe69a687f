"""bfloat16 taken in pairs on CPUs: which rows that is for, NaNs of any bits, the first mean of a
part of a row, and rows that do not begin where a pair does.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from lntune import backends, device, ops, schedule
from lntune.case import Case
from lntune.kernels import compiler

HERE = device.current()
PLANS = {
    name: schedule.get(plan, name)
    for name, plan in (("layer_norm", "cached_rows"), ("layer_norm_backward", "blocked_rows"))
}


def built(case: Case, strided: bool = False, **changed: Any) -> Any:
    """A kernel of the default knobs but for those changed."""
    plan = PLANS[case.op]
    setting = dataclasses.replace(plan.default(case, HERE), **changed)
    return compiler.in_memory(case, plan, setting, HERE, strided)


@pytest.mark.parametrize("op", PLANS)
def test_pairs_are_for_whole_pairs_of_bfloat16(op: str) -> None:
    """They are the default where they fit, and refused where they do not."""
    for dtype, hidden, fits in (
        ("bfloat16", 1000, True),
        ("bfloat16", 1001, False),
        ("float16", 1000, False),
        ("float32", 1000, False),
    ):
        case = Case(op, hidden, dtype, 512)
        setting = PLANS[op].default(case, HERE)
        assert setting.pairs == fits
        refused = PLANS[op].valid(dataclasses.replace(setting, pairs=True), case, HERE)
        assert (refused is None) == fits, refused


@pytest.mark.parametrize(
    ("op", "variant"),
    [
        ("layer_norm", "weight32+bias32+stats"),
        ("layer_norm_backward", "weight32+dx+dgamma32+dbeta32"),
        ("layer_norm_backward", "dgamma+dbeta"),
    ],
)
def test_pairs_beside_float32(op: str, variant: str) -> None:
    """Weights and gradients in float32, which are taken apart and woven together, and gradients
    without dx; of rows that vectors do not divide.
    """
    case = Case(op, 90, "bfloat16", 64, variant)
    assert PLANS[op].default(case, HERE).pairs
    verdict = backends.of(HERE).verify(case, HERE, built(case), thoroughly=True)
    assert verdict.ok, verdict.message


def test_any_nan_stays_one() -> None:
    """A NaN whose bits are all set, as filled memory has them, overflows into 0 when it is rounded
    like a number.
    """
    case = Case("layer_norm", 64, "bfloat16", 4, "weight32+bias32")
    weight = torch.ones(64)
    weight.view(torch.int32)[3:5] = -1
    weight.view(torch.int32)[6] = 0x7FFFFFFF
    y = torch.empty(4, 64, dtype=torch.bfloat16)
    built(case)(torch.randn(4, 64).bfloat16(), weight, torch.zeros(64), 1e-5, y)
    assert y.isnan()[:, [3, 4, 6]].all()
    assert int(y.isnan().sum()) == 12


@pytest.mark.parametrize("hidden", [64, 1024, 4096])
def test_the_mean_of_a_part_costs_no_more_than_it_may(hidden: int) -> None:
    """Rows whose first fourth, which the first mean is of, is of another size than the rest, by
    much or by all: the statistics are as exact as the bound in ops/moments.py says.
    """
    case = Case("layer_norm", hidden, "bfloat16", 64, "weight+bias+stats")
    generator = torch.Generator().manual_seed(hidden)
    noise = torch.randn(16, hidden, generator=generator)
    first = torch.arange(hidden) < hidden // 4
    rows = [noise * 0.01 + 1000 * first, noise * 0.01 + 1 - 1001 * first, noise + 1e4 * first]
    op = ops.get("layer_norm")
    given = op.inputs(case, 48, "normal", 0) | {"x": torch.cat(rows).bfloat16()}
    truth = op.reference(case, given)
    errors = []
    for sample in (False, True):
        y = torch.empty(48, hidden, dtype=torch.bfloat16)
        mean, rstd = torch.empty(48), torch.empty(48)
        built(case, sample=sample)(
            *(given[name] for name in ("x", "weight", "bias", "eps")), y, mean, rstd
        )
        for name, out in (("mean", mean), ("rstd", rstd)):
            share = ((out.double() - truth[name]) / truth[name]).abs().max()
            assert float(share) < 64 * 2.0**-24, name
        errors.append(float((y.double() - truth["y"]).abs().max()))
    assert errors[1] <= 1.05 * errors[0]


@pytest.mark.parametrize("op", PLANS)
def test_rows_that_begin_inside_a_pair(op: str) -> None:
    """Row-strided views, every other row of which begins with the second element of a pair."""
    case = Case(op, 64, "bfloat16", 16)
    described = ops.get(op)
    given = described.inputs(case, 16, "normal", 0)
    truth = described.reference(case, given)
    values: list[Any] = []
    outputs = {}
    for arg in described.arguments(case):
        if arg.role == "out":
            outputs[arg.name] = torch.empty(arg.sizes(16, 64), dtype=torch.bfloat16)
            values.append(outputs[arg.name])
            continue
        value = given[arg.name]
        if arg.shape == ("rows", "hidden"):
            apart = torch.zeros(16, 67, dtype=value.dtype)[:, 1:65]
            value = apart.copy_(value)
        values.append(value)
    built(case, strided=True)(*values)
    for name, out in outputs.items():
        torch.testing.assert_close(out.double(), truth[name], rtol=0.02, atol=0.05)
