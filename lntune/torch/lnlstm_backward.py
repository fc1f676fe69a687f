"""The gradients of an LN-LSTM step, on a kernel or by its formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lntune import device
from lntune.case import Case
from lntune.ops import lnlstm_step_backward as op
from lntune.ops.lnlstm_step import TENSORS, formula, statistics, tokens_of, variant
from lntune.torch import dispatch
from lntune.torch.arguments import NAMES

Given = dict[str, Tensor]


def case_of(given: Given, rows: int, carried: bool) -> Case:
    """The backward's case for the forward's tensors that are there."""
    c = given["c"]
    return Case(op.NAME, c.shape[-1], NAMES[c.dtype], rows, variant("weight_x" in given, "bias" in given, "bias_c" in given, carried))


def zero_sums(case: Case, like: Tensor) -> Given:
    """What the kernels of `case` add the gradients of gains and biases to."""
    blocks = case.blocks(device.current().cores)
    return {
        a.name: torch.zeros(a.sizes(case.rows, case.hidden, blocks), dtype=torch.float32, device=like.device)
        for a in op.arguments(case)
        if a.role == "sum"
    }


def accumulate(dh: Tensor, dc_new: Tensor, given: Given, stats: Sequence[Tensor], carried: bool, sums: Given) -> Given:
    """dgates_x, dgates_h and dc; those of gains and biases are added to `sums`, see zero_sums.

    `given` are the forward's tensors that are there, contiguous, of one dtype, matrices (rows, ...); `stats` are as many (rows,) as
    ops.lnlstm_step.statistics names.
    """
    case = case_of(given, given["c"].shape[0], carried)
    made = {name: torch.empty_like(given[name.removeprefix("d")]) for name in ("dgates_x", "dgates_h", "dc")}
    values = {**given, **dict(zip(statistics(tokens_of(case)), stats, strict=True)), **made, **sums, "dh": dh, "dc_new": dc_new}
    if case.rows:
        dispatch.serve(case)(*(values[a.name] for a in op.arguments(case)))
    return made


def step_backward(dh: Tensor, dc_new: Tensor, given: Given, stats: Sequence[Tensor], carried: bool) -> Given:
    """All gradients of one step, by the names of the forward's tensors and in their dtypes; arguments as accumulate's."""
    sums = zero_sums(case_of(given, given["c"].shape[0], carried), dh)
    made = {name.removeprefix("d"): t for name, t in accumulate(dh, dc_new, given, stats, carried, sums).items()}
    return made | {name.removeprefix("d"): t.sum(0).to(given[name.removeprefix("d")].dtype) for name, t in sums.items()}


def recorded_backward(
    tensors: tuple[Tensor | None, ...], grads: tuple[Tensor, Tensor], eps: float, carried: bool, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients for TENSORS, those that are wanted, by a formula that can be differentiated again."""
    with torch.enable_grad():
        made = formula(**dict(zip(TENSORS, tensors, strict=True)), eps=eps, carried=carried)  # type: ignore[arg-type]
        sources: list[Any] = [t for t, want in zip(tensors, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(made, sources, grads, create_graph=True, allow_unused=True))
    return tuple(next(found) if want else None for want in wanted)
