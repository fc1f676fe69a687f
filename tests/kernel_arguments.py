"""The arguments that tests call a kernel with: an operator's own inputs, outputs nobody has written
yet, sums to add to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lntune import ops
from lntune.case import Case
from lntune.device import Device, current


def inputs(case: Case, rows: int | None = None, style: str = "normal", seed: int = 0) -> Any:
    """The operator's own inputs by name; as many rows as the case's where none are given."""
    return ops.get(case.op).inputs(case, case.rows if rows is None else rows, style, seed)


def arguments(
    case: Case,
    rows: int,
    given: Mapping[str, Any] | None = None,
    *,
    device: Device | None = None,
    place: str = "cpu",
    output: float = torch.nan,
    total: float = 0.0,
) -> dict[str, Any]:
    """All arguments of a kernel by name, in its order: inputs, or those `given`; outputs full of
    `output`, unless given too; sums that are `total` before, for a device (this
    machine's CPU). On PyTorch's device `place`.
    """
    given = inputs(case, rows) if given is None else given
    blocks = case.blocks(device or current())
    values: dict[str, Any] = {}
    for a in ops.get(case.op).arguments(case):
        if a.role == "sum" or (a.role == "out" and a.name not in given):
            fill = total if a.role == "sum" else output
            sizes, dtype = a.sizes(rows, case.hidden, blocks), getattr(torch, a.dtype)
            values[a.name] = torch.full(sizes, fill, dtype=dtype, device=place)
        else:
            value = given[a.name]
            values[a.name] = value.to(place) if isinstance(value, torch.Tensor) else value
    return values


def written(case: Case, values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Those of the arguments that the kernel writes: outputs and sums."""
    listed = ops.get(case.op).arguments(case)
    return {a.name: values[a.name] for a in listed if a.role in ("out", "sum")}


def by_row(case: Case) -> set[str]:
    """The names of the arguments that have something for each row."""
    return {a.name for a in ops.get(case.op).arguments(case) if a.shape[:1] == ("rows",)}


def row_slice(case: Case, given: Mapping[str, Any], rows: Any) -> dict[str, Any]:
    """Inputs of some of the rows: a slice, or their numbers."""
    sliced = by_row(case)
    return {name: value[rows] if name in sliced else value for name, value in given.items()}
