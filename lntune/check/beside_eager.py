"""A kernel's outputs beside eager mode's, on as many rows as it is timed and served with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from lntune import ops
from lntune.case import Case
from lntune.check import problems
from lntune.check.problems import largest
from lntune.device import Device
from lntune.ops.op import Arg, Op
from lntune.words import counted

COARSE = 4.0
"""Times a tolerance that are allowed of many rows: of more numbers the largest error is larger."""
PIECE = 1 << 22
"""Elements that are compared at once: what is made for it is no larger than some of these."""
_latest: list[tuple[Mapping[str, Any], dict[str, Any]]] = []
"""Of the latest inputs what eager mode makes of them: many candidates are compared with that."""
_KEPT = 2


def forget() -> None:
    """Give back the memory of what is kept."""
    _latest.clear()


def _expected(op: Op, case: Case, given: Mapping[str, Any]) -> dict[str, Any]:
    """What eager mode makes of inputs."""
    for seen, outputs in _latest:
        if seen is given:
            return outputs
    _latest[:] = [*_latest[1 - _KEPT :], (given, op.eager(case, given))]
    return _latest[-1][1]


def compare_with_eager(
    case: Case, kernel: Callable[..., Any], given: Mapping[str, Any], device: Device
) -> str:
    """What is wrong with a kernel on a case's inputs on the CPU, however large: its outputs next
    to eager mode's; empty where nothing is. What float64 would show was looked for on fewer rows:
    here it is rows that are left out or mixed up.
    """
    import torch

    op = ops.get(case.op)
    case = msgspec.structs.replace(case, variant=op.check_variant(case.variant))
    usual = problems.usual(case)
    values: list[Any] = []
    outputs: dict[Arg, Any] = {}
    for arg in op.arguments(case):
        if arg.role in ("in", "scalar"):
            values.append(given[arg.name])
            continue
        sizes = arg.sizes(case.rows, case.hidden, case.blocks(device))
        start = 0.0 if arg.role == "sum" else math.nan
        outputs[arg] = torch.full(sizes, start, dtype=getattr(torch, arg.dtype))
        values.append(outputs[arg])
    kernel(*values)
    expected = _expected(op, case, given)
    for arg, out in outputs.items():
        if "rows" not in arg.shape:
            continue  # of a sum over many rows eager mode's own error is too large to tell
        name = arg.name
        allowed = COARSE * (usual.tolerance[name] + usual.eager_error[name])
        axis = arg.shape.index("rows")
        at_once = max(1, PIECE * case.rows // max(out.numel(), 1))
        pieces = zip(out.split(at_once, axis), expected[name].split(at_once, axis), strict=True)
        for number, (piece, of_eager) in enumerate(pieces):
            error = largest(piece.float() - of_eager.float())
            if not bool(piece.isfinite().all()) or error > allowed:
                first = number * at_once
                return (
                    f"{name}: {error:.3g} from eager's, {allowed:.3g} is allowed, or not finite"
                    f" (plain random inputs, {counted(case.rows, 'row')}; from row {first} on)"
                )
    return ""
