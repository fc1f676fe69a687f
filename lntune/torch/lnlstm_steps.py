"""An LSTM with layer normalization over a whole sequence in PyTorch's own operators: in Python, and
as TorchScript, whose loop takes any number of steps.

TorchScript reads the functions here, so they are written in the part of Python that it knows, with
the fields of SequenceTensors and SequenceOptions (lnlstm_arguments.py) one by one.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

Outputs = tuple[Tensor, Tensor, Tensor]
"""h of all steps, h_n and c_n."""
WHOLE_BATCH = [-1]
"""Sizes that stand for the whole batch at each step, as none do: AOTInductor calls an operator with
None for an empty list.
"""


def step_sizes(sizes: list[int], rows: int, batch: int) -> list[int]:
    """How many sequences each step has: `sizes`, or where that is empty or WHOLE_BATCH the
    whole batch.
    """
    if len(sizes) > 0 and sizes[0] >= 0:
        return sizes
    return [batch] * (rows // batch if batch > 0 else 1)


def _norm(gates: Tensor, weight: Tensor, eps: float, per_gate: bool) -> Tensor:
    hidden = gates.shape[-1] // 4
    if not per_gate:
        return torch.nn.functional.layer_norm(gates, [4 * hidden], weight, None, eps)
    return (
        torch.nn.functional.layer_norm(
            gates.unflatten(-1, [4, hidden]), [hidden], None, None, eps
        ).flatten(-2)
        * weight
    )


def _step(
    gates_x: Tensor,
    gates_h: Tensor,
    c: Tensor,
    weight_x: Tensor | None,
    weight_h: Tensor,
    weight_c: Tensor,
    bias: Tensor | None,
    bias_c: Tensor | None,
    eps: float,
    normalized_cell: bool,
    per_gate: bool,
) -> tuple[Tensor, Tensor]:
    """(h, c) of lntune.ops.lnlstm_step.formula, which TorchScript cannot read."""
    z = _norm(gates_h, weight_h, eps, per_gate) + (
        gates_x if weight_x is None else _norm(gates_x, weight_x, eps, per_gate)
    )
    if bias is not None:
        z = z + bias
    i, f, g, o = z.chunk(4, -1)
    cell = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    normalized = torch.nn.functional.layer_norm(cell, [cell.shape[-1]], weight_c, bias_c, eps)
    return torch.sigmoid(o) * torch.tanh(normalized), normalized if normalized_cell else cell


def by_steps(
    gates_x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    matrix: Tensor,
    weight_x: Tensor | None,
    weight_h: Tensor,
    weight_c: Tensor,
    bias: Tensor | None,
    bias_c: Tensor | None,
    sizes: list[int],
    eps: float,
    normalized_cell: bool,
    per_gate: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """lntune.torch.lnlstm_sequence.lnlstm_sequence in any dtype and on any device, differentiable
    as often as PyTorch's operators are.
    """
    sizes = step_sizes(sizes, int(gates_x.shape[0]), int(h_0.shape[0]))
    steps = len(sizes)
    gates = gates_x.split(sizes)
    out = list(gates)
    first = sizes[steps - 1] if reverse else sizes[0]
    h, c = h_0[:first], c_0[:first]
    h_n, c_n = h_0[:0], c_0[:0]
    for i in range(steps):
        t = steps - 1 - i if reverse else i
        now, n = h.shape[0], sizes[t]
        if n < now:  # forwards, the shorter sequences end
            h_n, c_n = torch.cat((h[n:], h_n)), torch.cat((c[n:], c_n))
            h, c = h[:n], c[:n]
        elif n > now:  # backwards, they begin
            h, c = torch.cat((h, h_0[now:n])), torch.cat((c, c_0[now:n]))
        gates_h = torch.nn.functional.linear(h, matrix).to(c.dtype)
        h, c = _step(
            gates[t].to(c.dtype),
            gates_h,
            c,
            weight_x,
            weight_h,
            weight_c,
            bias,
            bias_c,
            eps,
            normalized_cell,
            per_gate,
        )
        out[t] = h
    if h_n.shape[0] > 0:
        h, c = torch.cat((h, h_n)), torch.cat((c, c_n))
    return torch.cat(out), h, c


def _of_tensor(
    gates_x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    matrix: Tensor,
    weight_x: Tensor | None,
    weight_h: Tensor,
    weight_c: Tensor,
    bias: Tensor | None,
    bias_c: Tensor | None,
    sizes: Tensor | None,
    eps: float,
    normalized_cell: bool,
    per_gate: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """by_steps for sizes in a tensor, which a trace does not take for constants."""
    size_list: list[int] = [] if sizes is None else sizes.tolist()
    return by_steps(
        gates_x,
        h_0,
        c_0,
        matrix,
        weight_x,
        weight_h,
        weight_c,
        bias,
        bias_c,
        size_list,
        eps,
        normalized_cell,
        per_gate,
        reverse,
    )


@functools.cache
def scripted_by_steps() -> Callable[..., Outputs]:
    """by_steps with `sizes` a tensor, None for the whole batch, as one call of a function of
    TorchScript's, which torch.jit.trace keeps.
    """
    with warnings.catch_warnings():
        # of TorchScript, of which whoever traces has been warned already
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(_of_tensor)
