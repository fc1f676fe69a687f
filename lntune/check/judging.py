"""How a kernel's outputs are judged beside a problem's truth."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lntune.check import problems
from lntune.check.problems import Problem, largest
from lntune.ops.op import SATURATED, STYLES
from lntune.words import counted

if TYPE_CHECKING:
    import torch


def _wrong_kinds(out: torch.Tensor, problem: Problem, name: str) -> str:
    """What is said of elements that are NaN, infinite or finite where they should not be."""
    if problem.kinds[name] is None:
        wrong = out.numel() - int(out.isfinite().sum())
    else:
        kind = problems.kinds(out)
        eager, truth = problem.kinds[name]
        # Where float32 overflows and float64 does not, either may be right; and a NaN says no less
        # than an infinity, which it is in algorithms that take infinities from each other.
        same = (kind == eager) | (kind == truth) | (kind == problems.NAN)
        if problem.of_any_kind:
            same |= kind != 0
        wrong = int((~same | ((kind == 0) != (eager == 0))).sum())
    if not wrong:
        return ""
    which = "or the other way round, or of another kind of infinity or NaN"
    return f"{name}: {counted(wrong, 'element')} finite where eager has none, {which}"


def at(problem: Problem) -> str:
    """Which inputs a problem has, in words."""
    which = f"{problem.style} inputs" if problem.style in (*STYLES, SATURATED) else problem.style
    return f"{which}, {counted(problem.rows, 'row')}"


def judge(
    outputs: Mapping[str, Any], problem: Problem
) -> tuple[str, dict[str, float], dict[str, float]]:
    """(What is wrong first, empty where nothing is; the largest errors as shares of the tolerances;
    and divided by eager's own where the input is plain random.) Where a problem has parts, these
    are judged instead. `outputs` lie where the problem's
    truth does.
    """
    message = ""
    errors: dict[str, float] = {}
    versus: dict[str, float] = {}
    for name, out in problems.split(outputs, problem.parts).items():
        finite, truth = problem.finite[name], problem.truth[name]
        if (wrong := _wrong_kinds(out, problem, name)) and not message:
            message = f"{wrong} ({at(problem)})"
        error = largest(out.double() - truth, finite & out.isfinite() & truth.isfinite())
        tolerance = problem.tolerance[name]
        # JSON has no infinity
        share = error / tolerance if tolerance else (0.0 if error == 0 else sys.float_info.max)
        whole = problem.parts[name][0] if name in problem.parts else name
        errors[whole] = max(errors.get(whole, 0.0), share)
        if share > 1 and not message:
            allowed = f"{share:.3g} times what is allowed, {tolerance:.3g}"
            message = (
                f"{name}: error {error:.3g} is {allowed} ({at(problem)}; eager's own error is"
                f" {problem.eager_error[name]:.3g})"
            )
        if problem.style == "normal" and problem.eager_error[name]:
            versus[name] = error / problem.eager_error[name]
    return message, errors, versus
