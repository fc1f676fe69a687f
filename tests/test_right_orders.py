"""However a kernel sums and rounds in float32, where that is right it is accepted, at small sizes,
too, where eager mode's own error is a matter of luck; and tolerances with room for it have none for
what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lntune import ops
from lntune.case import Case
from lntune.check import problems
from lntune.check.judging import judge
from lntune.check.problems import Problem
from lntune.check.rounding import Moving
from lntune.ops.op import STYLES

SIZES = (2, 5, 8, 12, 24, 100)
ORDERS = 4
TOLD = [style for style in STYLES if style not in ("constant", "shifted")]
"""Not those in which a rounding of a mean is a sigma or a good part of it: there PyTorch's own
formulas, in another order, are not right enough.
"""


def cases(op: str) -> list[Case]:
    """Small cases of the variants that PyTorch calls most, in float32."""
    return [
        Case(op, n, "float32", 21, variant) for n in SIZES for variant in ops.get(op).called("")
    ]


def every(op: str) -> Iterator[Any]:
    """(case, style) of an operator."""
    styles = [*TOLD, *ops.get(op).styles[len(STYLES) :]]
    return ((case, style) for case in cases(op) for style in styles)


def ordered(case: Case, named: dict[str, Any], order: torch.Tensor) -> dict[str, Any]:
    """Named tensors with the elements of a row in another order, each gate by itself."""
    shapes = {a.name: a.shape for a in ops.get(case.op).arguments(case)}
    gates = torch.cat([order + n * case.hidden for n in range(4)])
    orders = {"hidden": order, "gates": gates}
    return {
        name: value[..., orders[shapes[name][-1]]]
        if isinstance(value, torch.Tensor) and shapes[name][-1] in orders
        else value
        for name, value in named.items()
    }


def outputs(case: Case, made: dict[str, Any]) -> dict[str, Any]:
    """What a kernel gives, in the dtypes that it has."""
    arguments = [a for a in ops.get(case.op).arguments(case) if a.role in ("out", "sum")]
    return {a.name: made[a.name].to(getattr(torch, a.dtype)) for a in arguments}


def in_another_order(case: Case, problem: Problem, seed: int) -> dict[str, Any]:
    """Eager mode's outputs where it sums a row's elements in a random order."""
    order = torch.randperm(case.hidden, generator=torch.Generator().manual_seed(seed))
    given = ordered(case, problem.given, order)
    return ordered(case, outputs(case, ops.get(case.op).eager(case, given)), order.argsort())


def rounded_otherwise(case: Case, problem: Problem, seed: int) -> dict[str, Any]:
    """The reference's outputs where every operation errs by a rounding of float32, up or down."""
    with Moving(1, seed).all_results():
        return outputs(case, ops.get(case.op).reference(case, problem.given))


@pytest.mark.parametrize("op", ops.OPS)
def test_every_right_order_is_accepted(op: str) -> None:
    """No order of a row's elements, and no way to round, has outputs beyond the tolerance."""
    for case, style in every(op):
        problem = problems.of_style(case, style, case.rows)
        for seed in range(ORDERS):
            for how in (in_another_order, rounded_otherwise):
                message, _, _ = judge(how(case, problem, seed), problem)
                assert not message, f"{case}, {how.__name__}, {seed}: {message}"


@pytest.mark.parametrize("op", ops.OPS)
@pytest.mark.parametrize("style", ["normal", "special"])
def test_a_ten_thousandth_is_wrong(op: str, style: str) -> None:
    """An output that is off by a ten thousandth of itself is rejected at every size from FEW on; a
    mean is near 0 and carries the rounding of the numbers that it is of.
    """
    for case in cases(op):
        problem = problems.of_style(case, style, case.rows)
        for name in problem.tolerance:
            truth = problem.truth[name]
            message, _, _ = judge({name: truth * (1 + 1e-4)}, problem)
            told = case.hidden >= problems.FEW and not name.startswith("mean")
            if told and problems.largest(truth):
                assert message, f"{case}: {name}"
