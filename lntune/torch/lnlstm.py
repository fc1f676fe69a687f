"""One step of an LSTM with layer normalization as a function of tensors: what comes after its
matrix products, which are the caller's.

The way of a call:

* no gradient wanted: a direct call of the kernel;
* gradients: an autograd.Function, whose forward keeps the statistics for the backward's kernel;
* under torch.compile: the custom op `lntune::lnlstm_step`.

Whatever a kernel does not do is the formula in PyTorch's operators.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lntune.case import MAX_HIDDEN, Case
from lntune.ops.lnlstm_step import NAME, arguments, formula, statistics, tokens_of
from lntune.torch import devices, dispatch, recording
from lntune.torch.argument_checks import check_kernel_eps, check_step
from lntune.torch.direct_calls import Direct
from lntune.torch.lnlstm_arguments import StepTensors
from lntune.torch.lnlstm_backward import case_of, recorded_backward, step_backward
from lntune.torch.support import (
    DTYPE_NAMES,
    NO_ROWS,
    OVERRIDDEN,
    PER_GATE,
    TRACED,
    Support,
    exporting,
    in_transform,
    is_batched,
    is_checkpointed,
    is_kernel_eps,
    is_overridden,
    kernel_support,
    log_unsupported,
    needs_gradients,
)

_dynamo_compiling = torch.compiler.is_dynamo_compiling
_tracing = torch._C._is_tracing

# The arguments of a call, as lntune.kernels.direct.Table wants them described, and by the kernels'
# names.
_SIGNATURE = "tttottoof"
_NAMES = (*StepTensors._fields, "eps")
_TENSORS = len(StepTensors._fields)
_direct = {normalized_cell: Direct(_SIGNATURE, _NAMES) for normalized_cell in (False, True)}


def lnlstm_step(
    # (batch, 4 * hidden): W_x x[t], or with weight_x None what is added to z as it is
    gates_x: Tensor,
    gates_h: Tensor,  # (batch, 4 * hidden): W_h h[t-1]
    c: Tensor,  # (batch, hidden)
    weight_x: Tensor | None,  # (4 * hidden,)
    weight_h: Tensor,  # (4 * hidden,)
    weight_c: Tensor,  # (hidden,)
    bias: Tensor | None = None,  # (4 * hidden,)
    bias_c: Tensor | None = None,  # (hidden,)
    eps: float = 1e-5,
    carried: bool = False,
    per_gate: bool = False,
) -> tuple[Tensor, Tensor]:
    """(h, c) after one step, both (batch, hidden), in the widest dtype of the arguments.

        z = LN(gates_x; weight_x) + LN(gates_h; weight_h) + bias       in the order i, f, g, o
        c[t] = sigmoid(f) c[t-1] + sigmoid(i) tanh(g)
        h[t] = sigmoid(o) tanh(LN(c[t]; weight_c) + bias_c)

    Ba, Kiros, Hinton: *Layer Normalization*, 2016, arXiv:1607.06450, supplement, eqs. 20-22; `bias`
    is the sum of all vectors that are added to z. Tensors in float32, float16 or bfloat16 on CPUs
    and NVIDIA GPUs run on kernels, all others on PyTorch's operators.

    Args:
        gates_x: (batch, 4 * hidden), like all tensors of any floating-point dtype.
        gates_h: (batch, 4 * hidden).
        c: (batch, hidden), the cell before the step.
        weight_x: (4 * hidden,); None: the input's part is already normalized, with its gain (for a
            whole sequence at once).
        weight_h: (4 * hidden,).
        weight_c: (hidden,).
        bias: (4 * hidden,) or None.
        bias_c: (hidden,) or None.
        eps: added to the variances.
        carried: the cell is carried normalized, c[t] = LN(...), as in PyTorch's custom_lstms.py and
            TensorFlow Addons.
        per_gate: each of the four gates is normalized by itself, as in TensorFlow's
            LayerNormBasicLSTMCell (PyTorch's operators serve that).

    Raises:
        InputError: a shape or dtype that does not fit, or an eps that is no number, naming the
            argument.
        NotTunedError: in strict mode only, see `lntune.strict`.
    """
    # no StepTensors yet: a direct call is over before one is made
    tensors = (gates_x, gates_h, c, weight_x, weight_h, weight_c, bias, bias_c)
    if _dynamo_compiling():
        if (
            per_gate
            or not is_kernel_eps(eps)
            or exporting()  # a program that runs where lntune is not
            or len({t.dtype for t in tensors if t is not None}) > 1
            or not devices.serves(c.device.type)
            or c.dtype not in DTYPE_NAMES
            or in_transform()
        ):
            return formula(*tensors, eps, carried, per_gate)
        h, c_new, _ = torch.ops.lntune.lnlstm_step(
            *tensors, eps, carried, needs_gradients(*tensors)
        )
        return h, c_new
    if not per_gate:
        outputs = _direct[carried].call(*tensors, eps)
        if outputs is not None:
            return outputs  # type: ignore[no-any-return]
    return _general(StepTensors(*tensors), eps, carried, per_gate)


def _general(
    tensors: StepTensors, eps: float, normalized_cell: bool, per_gate: bool
) -> tuple[Tensor, Tensor]:
    """Every call that no table knows: checked, served, and made known to the table for the next."""
    # torch.jit.trace and torch.fx record the formula, sizes are tensors there; subclasses of
    # tensors take PyTorch's operators.
    if _tracing() or is_overridden(*tensors):
        log_unsupported(NAME, TRACED if _tracing() else OVERRIDDEN)
        return formula(*tensors, eps, normalized_cell, per_gate)
    check_step(tensors, eps)
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors.present().values()))
    converted = StepTensors(*(None if t is None else t.to(dtype) for t in tensors))  # type: ignore[arg-type]
    checkpointed = is_checkpointed(*converted)
    support = PER_GATE if per_gate else _support(converted, eps, checkpointed)
    if not support:
        log_unsupported(NAME, support)
        with recording.eager(NAME, converted.c, converted.c.shape[-1], support.reason):
            return formula(*converted, eps, normalized_cell, per_gate)
    with_statistics = needs_gradients(*converted)
    rows = math.prod(tensors.c.shape[:-1])
    case = case_of(NAME, converted, rows, normalized_cell, with_statistics)
    kernel = dispatch.kernel_for(case, tuple(converted.present().values()))
    if kernel is None:
        with recording.timing(case, devices.of(converted.c.device)):
            return formula(*converted, eps, normalized_cell)
    if checkpointed:
        op = torch.ops.lntune.lnlstm_step
        return op(*converted, float(eps), normalized_cell, True)[:2]  # type: ignore[no-any-return]
    if with_statistics:
        return _Step.apply(float(eps), normalized_cell, *converted)  # type: ignore[no-any-return, no-untyped-call]
    if case.hidden > 1 and not any(
        t is not None and (t.dtype != dtype or t.is_neg()) for t in tensors
    ):
        _direct[normalized_cell].remember(case, kernel, (*tensors, float(eps)))
    h, c_new, _ = _run(converted, float(eps), normalized_cell, with_statistics=False)
    return h, c_new


def _support(tensors: StepTensors, eps: float, checkpointed: bool) -> Support:
    """Whether a kernel can take a step whose arguments fit each other and are of one dtype."""
    hidden = tensors.c.shape[-1]
    if hidden > MAX_HIDDEN // 4:
        return Support.no(f"hidden {hidden}, above {MAX_HIDDEN // 4}, is not built")
    if not tensors.c.numel():
        return NO_ROWS
    return kernel_support(tuple(tensors.present().values()), hidden, eps, watched=checkpointed)


def _for_kernel(tensors: StepTensors) -> StepTensors:
    """The tensors as kernels take them: matrices (rows, ...) as devices.matrix gives them, vectors
    contiguous.
    """
    gates_x, gates_h, c, *vectors = tensors
    matrices = (devices.matrix(t, t.shape[-1]) for t in (gates_x, gates_h, c))
    return StepTensors(
        *matrices, *(None if v is None else v.contiguous().resolve_neg() for v in vectors)
    )


def _run(
    tensors: StepTensors, eps: float, normalized_cell: bool, with_statistics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(h, c, statistics), the first two shaped as the cell, the statistics (number of them, rows)
    or empty.
    """
    shape, tensors = tensors.c.shape, _for_kernel(tensors)
    c = tensors.c
    rows = c.shape[0]
    case = case_of(NAME, tensors, rows, normalized_cell, with_statistics)
    names = statistics(tokens_of(case)) if with_statistics else ()
    h, c_new = (torch.empty_like(c, memory_format=torch.contiguous_format) for _ in range(2))
    kept = torch.empty((len(names), rows), dtype=torch.float32, device=c.device)
    if rows:
        inputs = tensors.present()
        values = {
            **inputs,
            "eps": eps,
            "h": h,
            "c_new": c_new,
            **dict(zip(names, kept, strict=True)),
        }
        kernel = dispatch.serve(case, tuple(inputs.values()))
        kernel(*(values[a.name] for a in arguments(case)))
    return h.view(shape), c_new.view(shape), kept


def _gradients(
    tensors: StepTensors, kept: Tensor, dh: Tensor, dc_new: Tensor, normalized_cell: bool
) -> tuple[Tensor | None, ...]:
    """The gradients of all tensors that are not None, in their order, with `kept` the statistics
    of the forward.
    """
    hidden = dh.shape[-1]
    grads = step_backward(
        devices.matrix(dh, hidden),
        devices.matrix(dc_new, hidden),
        _for_kernel(tensors),
        tuple(kept),
        normalized_cell,
    )
    return tuple(
        None if t is None else grads[name].view(t.shape)
        for name, t in zip(StepTensors._fields, tensors, strict=True)
    )


def _formula(ctx: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """The step as a function of its tensors alone, with what else a call kept."""
    return lambda *tensors: formula(*StepTensors(*tensors), ctx.eps, ctx.normalized_cell)


class _Step(torch.autograd.Function):
    """Forward and backward on kernels; while the backward is recorded it is the formula's, which
    can be differentiated again.
    """

    @staticmethod
    def forward(ctx: Any, eps: float, normalized_cell: bool, *flat: Any) -> tuple[Tensor, Tensor]:
        h, c_new, kept = _run(StepTensors(*flat), eps, normalized_cell, with_statistics=True)
        ctx.eps, ctx.normalized_cell = eps, normalized_cell
        ctx.save_for_backward(*flat, kept)
        return h, c_new

    @staticmethod
    def backward(ctx: Any, dh: Tensor, dc_new: Tensor) -> tuple[Tensor | None, ...]:
        *flat, kept = ctx.saved_tensors
        tensors = StepTensors(*flat)
        wanted = ctx.needs_input_grad[2:]
        inputs = (dh, dc_new, *tensors.present().values())
        if torch.is_grad_enabled() or not kernel_support(inputs, dh.shape[-1]):
            return None, None, *recorded_backward(_formula(ctx), tensors, (dh, dc_new), wanted)
        grads = _gradients(tensors, kept, dh, dc_new, ctx.normalized_cell)
        return (
            None,
            None,
            *(grad if want else None for grad, want in zip(grads, wanted, strict=True)),
        )


@torch.library.custom_op("lntune::lnlstm_step", mutates_args=(), device_types=devices.TYPES)
def lnlstm_step_op(
    gates_x: Tensor,
    gates_h: Tensor,
    c: Tensor,
    weight_x: Tensor | None,
    weight_h: Tensor,
    weight_c: Tensor,
    bias: Tensor | None,
    bias_c: Tensor | None,
    eps: float,
    carried: bool,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What torch.compile puts into a graph: (h, c, statistics), the last empty without `stats`."""
    tensors = StepTensors(gates_x, gates_h, c, weight_x, weight_h, weight_c, bias, bias_c)
    check_step(tensors, eps)
    check_kernel_eps(eps)
    return _run(tensors, eps, carried, stats)


@lnlstm_step_op.register_fake
def _fake(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    tensors, with_statistics = StepTensors(*flat[:_TENSORS]), flat[-1]
    c, raw = tensors.c, tensors.weight_x is not None
    count = len(statistics(("raw",) if raw else ())) if with_statistics else 0
    h, c_new = (torch.empty_like(c, memory_format=torch.contiguous_format) for _ in range(2))
    return h, c_new, c.new_empty((count, math.prod(c.shape[:-1])), dtype=torch.float32)


@torch.library.custom_op(
    "lntune::lnlstm_step_backward", mutates_args=(), device_types=devices.TYPES
)
def lnlstm_step_backward_op(
    dh: Tensor,
    dc_new: Tensor,
    stats: Tensor,
    gates_x: Tensor,
    gates_h: Tensor,
    c: Tensor,
    weight_x: Tensor | None,
    weight_h: Tensor,
    weight_c: Tensor,
    bias: Tensor | None,
    bias_c: Tensor | None,
    carried: bool,
) -> list[Tensor]:
    """What torch.compile puts into a graph of gradients: those of the tensors that are not None, in
    order.
    """
    tensors = StepTensors(gates_x, gates_h, c, weight_x, weight_h, weight_c, bias, bias_c)
    return [t for t in _gradients(tensors, stats, dh, dc_new, carried) if t is not None]


@lnlstm_step_backward_op.register_fake
def _fake_backward(dh: Tensor, dc_new: Tensor, stats: Tensor, *flat: Any) -> list[Tensor]:
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in StepTensors(*flat[:_TENSORS]).present().values()
    ]


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    *flat, ctx.eps, ctx.normalized_cell, ctx.with_statistics = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*flat, output[2])


def _op_backward(ctx: Any, dh: Tensor, dc_new: Tensor, _: Any) -> tuple[Any, ...]:
    *tensors, kept = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:_TENSORS]
    if torch.is_grad_enabled() or is_batched(dh, dc_new, *tensors):
        return *recorded_backward(_formula(ctx), tensors, (dh, dc_new), wanted), None, None, None
    if not ctx.with_statistics:  # a program that was written without gradients
        *_, kept = torch.ops.lntune.lnlstm_step(*tensors, ctx.eps, ctx.normalized_cell, True)
    op = torch.ops.lntune.lnlstm_step_backward
    computed = iter(op(dh, dc_new, kept, *tensors, ctx.normalized_cell))
    grads = [None if t is None else next(computed) for t in tensors]
    return (
        *(grad if want else None for grad, want in zip(grads, wanted, strict=True)),
        None,
        None,
        None,
    )


lnlstm_step_op.register_autograd(_op_backward, setup_context=_setup_context)


def bound_call(case: Case, inputs: Mapping[str, Any]) -> Callable[[], Any]:
    """lnlstm_step bound to the operator's named inputs, see `Op.binding`."""
    values: tuple[Any, ...] = (
        *map(inputs.get, StepTensors._fields),
        inputs["eps"],
        "carried" in tokens_of(case),
    )
    return lambda: lnlstm_step(*values)
