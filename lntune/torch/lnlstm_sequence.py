"""LN-LSTM steps over a whole sequence, in one direction: one matrix product and one kernel a time
step, forward and backward.

As one operator it spares what autograd would do at every step: the gradient of the recurrent matrix
is a product over many time steps at once, the gradients of gains and biases are summed inside the
kernels, outputs are written where they belong, and of the gates only what enters a layer norm is
kept. torch.compile sees one node, `lntune::lnlstm_sequence`, however long the sequence. On a GPU
the time loop becomes a CUDA graph when its shapes repeat (see graphs.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lntune.case import MAX_HIDDEN
from lntune.torch import devices, graphs, lnlstm_loops
from lntune.torch.arguments import (
    NAMES,
    batched,
    plain,
    rebuilt,
    recorded,
    recording,
    served,
    served_unwatched,
    transformed,
    usual,
)
from lntune.torch.constants import constant
from lntune.torch.lnlstm_backward import recorded_backward
from lntune.torch.lnlstm_steps import WHOLE, by_steps, each, in_a_trace

_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]
_to_onnx: Callable[[], bool] = constant(lambda: bool(torch.onnx.is_in_onnx_export()))
"""True while a model is exported to ONNX, which has no such operator and no such loop."""


def lnlstm_sequence(
    # (rows of all steps, 4 * hidden): W_ih x, or with weight_x None what is added to z as it is
    gates_x: Tensor,
    h_0: Tensor,  # (batch, hidden)
    c_0: Tensor,  # (batch, hidden)
    matrix: Tensor,  # (4 * hidden, hidden): W_hh
    weight_x: Tensor | None,  # (4 * hidden,)
    weight_h: Tensor,  # (4 * hidden,)
    weight_c: Tensor,  # (hidden,)
    bias: Tensor | None,  # (4 * hidden,)
    bias_c: Tensor | None,  # (hidden,)
    sizes: Sequence[int] | Tensor,
    eps: float,
    carried: bool,
    per_gate: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(h of all steps, laid out as gates_x, h_n and c_n) of `lntune.torch.lnlstm.lnlstm_step` from
    step to step.

    Step t has the first sizes[t] sequences, sizes never rising, and their rows follow those of the
    steps before; without sizes every step has all of them, so that a compiled graph is one for
    sequences of any length. `reverse` begins at the last step. A sequence's state is taken up from
    h_0 and c_0 at its first step and handed on to h_n and c_n after its last. `sizes` is a tensor
    where torch.jit.trace shall not take it for a constant.
    """
    tensors = (gates_x, h_0, c_0, weight_x, weight_h, weight_c, bias, bias_c)
    there = [t for t in (*tensors, matrix) if t is not None]
    hidden = h_0.shape[-1]
    if _tracing() and plain(*there) and not transformed() and not _to_onnx():
        given = sizes if isinstance(sizes, Tensor) else torch.tensor(sizes) if sizes else None
        loop = in_a_trace()
        return loop(
            gates_x,
            h_0,
            c_0,
            matrix,
            weight_x,
            weight_h,
            weight_c,
            bias,
            bias_c,
            given,
            eps,
            carried,
            per_gate,
            reverse,
        )
    sizes = sizes.tolist() if isinstance(sizes, Tensor) else list(sizes)
    if (
        per_gate
        or not usual(eps)
        or hidden > MAX_HIDDEN // 4
        or h_0.dtype not in NAMES
        or any(t.dtype != h_0.dtype for t in tensors if t is not None)
        or not (
            _compiled(there)
            if torch.compiler.is_compiling() or recording(*there)
            else not _tracing() and _served(there, hidden)
        )
    ):
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
            sizes,
            eps,
            carried,
            per_gate,
            reverse,
        )
    keep = recorded(*there)
    sizes = sizes or WHOLE
    op = torch.ops.lntune.lnlstm_sequence
    out, h_n, c_n, *_ = op(
        gates_x,
        h_0,
        c_0,
        matrix,
        weight_x,
        weight_h,
        weight_c,
        bias,
        bias_c,
        sizes,
        eps,
        carried,
        reverse,
        keep,
    )
    return out, h_n, c_n


def _served(there: Sequence[Tensor], hidden: int) -> bool:
    """True where the operator may have an eager call, also one that is watched now and not when it
    is done again.
    """
    serves = served_unwatched if rebuilt(*there) else served
    return all(serves(t, None, None, hidden) for t in there)


def _compiled(there: Sequence[Tensor]) -> bool:
    """True where a graph may have the operator; for transforms of functions in it, and for ONNX,
    PyTorch's own formulas are wanted.
    """
    return devices.serves(there[0].device.type) and not transformed() and not _to_onnx()


@torch.library.custom_op("lntune::lnlstm_sequence", mutates_args=(), device_types=("cpu", "cuda"))
def lnlstm_sequence_op(
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
    carried: bool,
    reverse: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(h, h_n, c_n, gates_h, c, statistics); the last three, empty without `keep`, are of all steps
    and for the backward.
    """
    tensors = (gates_x, h_0, c_0, matrix, weight_x, weight_h, weight_c, bias, bias_c)
    return graphs.run(
        lnlstm_loops.forward,
        tensors,
        (each(sizes, gates_x.shape[0], h_0.shape[0]), eps, carried, reverse, keep),
    )  # type: ignore[return-value]


@lnlstm_sequence_op.register_fake
def _fake(
    gates_x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    matrix: Tensor,
    weight_x: Any,
    weight_h: Tensor,
    weight_c: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *_, keep = rest
    (rows, gates), hidden = gates_x.shape, h_0.shape[1]
    every = rows if keep else 0
    kept = (
        gates_x.new_empty(every, gates),
        gates_x.new_empty(every, hidden),
        gates_x.new_empty(lnlstm_loops.moments(weight_x), every, dtype=torch.float32),
    )
    return gates_x.new_empty(rows, hidden), torch.empty_like(h_0), torch.empty_like(c_0), *kept


@torch.library.custom_op(
    "lntune::lnlstm_sequence_backward", mutates_args=(), device_types=("cpu", "cuda")
)
def lnlstm_sequence_backward_op(
    dout: Tensor,
    dh_n: Tensor,
    dc_n: Tensor,
    out: Tensor,
    gates_h: Tensor,
    cells: Tensor,
    stats: Tensor,
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
    carried: bool,
    reverse: bool,
) -> list[Tensor]:
    """The gradients of the tensors from gates_x on that are there, in order."""
    kept = (dout, dh_n, dc_n, out, gates_h, cells, stats)
    tensors = (*kept, gates_x, h_0, c_0, matrix, weight_x, weight_h, weight_c, bias, bias_c)
    return list(
        graphs.run(
            lnlstm_loops.backward,
            tensors,
            (each(sizes, gates_x.shape[0], h_0.shape[0]), carried, reverse),
        )
    )


@lnlstm_sequence_backward_op.register_fake
def _fake_backward(*arguments: Any) -> list[Tensor]:
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in arguments[7 : 7 + _TENSORS]
        if t is not None
    ]


_TENSORS = 9  # arguments of the operator that are tensors, and come first


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *ctx.sizes_and_options, keep = inputs[_TENSORS:]
    out, _, _, *kept = output
    ctx.keep = keep
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # zeros for what is kept would be as large as that
    ctx.save_for_backward(*inputs[:_TENSORS], out, *kept)


def _op_backward(ctx: Any, *grads_out: Tensor | None) -> tuple[Any, ...]:
    saved: Any = ctx.saved_tensors
    tensors, kept = saved[:_TENSORS], saved[_TENSORS:]
    like = (kept[0], tensors[1], tensors[2])
    dout, dh_n, dc_n = (
        torch.zeros_like(t) if g is None else g for g, t in zip(grads_out, like, strict=False)
    )
    sizes, eps, carried, reverse = ctx.sizes_and_options
    wanted = ctx.needs_input_grad[:_TENSORS]
    if torch.is_grad_enabled() or batched(dout, dh_n, dc_n, *tensors):

        def function(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
            return by_steps(*(*given, sizes, eps, carried, False, reverse))

        return *recorded_backward(function, tensors, (dout, dh_n, dc_n), wanted), *[None] * 5
    # a program that was written without gradients: what the backward takes is made now
    if not ctx.keep:
        *_, gates_h, cells, stats = torch.ops.lntune.lnlstm_sequence(
            *tensors, sizes, eps, carried, reverse, True
        )
        kept = (kept[0], gates_h, cells, stats)
    op = torch.ops.lntune.lnlstm_sequence_backward
    made = iter(op(dout, dh_n, dc_n, *kept, *tensors, sizes, carried, reverse))
    grads = [None if t is None else next(made) for t in tensors]
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *[None] * 5


lnlstm_sequence_op.register_autograd(_op_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.lntune.lnlstm_sequence)
def _flops(gates_x: torch.Size, h_0: torch.Size, *_: Any, **__: Any) -> int:
    """What a FlopCounterMode counts: the products with the recurrent matrix, one for each row."""
    return 2 * math.prod(gates_x) * h_0[1]


@register_flop_formula(torch.ops.lntune.lnlstm_sequence_backward)
def _flops_backward(*shapes: Any, **_: Any) -> int:
    """As many for the gradient of the state, and for that of the matrix."""
    return 2 * _flops(*shapes[7:9])
