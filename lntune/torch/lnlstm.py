"""One step of an LSTM with layer normalization, as a function of tensors; the matrix products are
the caller's.

* no gradient wanted: a direct call of the kernel;
* gradients: an autograd.Function, whose forward keeps the statistics for the backward's kernel;
* under torch.compile: the custom op `lntune::lnlstm_step`.

Whatever a kernel does not do is the formula in PyTorch's operators.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lntune.case import MAX_HIDDEN, Case
from lntune.errors import InputError, got_expected
from lntune.ops.lnlstm_step import NAME, TENSORS, arguments, formula, statistics, tokens_of
from lntune.torch import devices, dispatch
from lntune.torch.arguments import (
    NAMES,
    batched,
    check_eps,
    check_number,
    overridden,
    rebuilt,
    recorded,
    served,
    served_unwatched,
    transformed,
    usual,
)
from lntune.torch.lnlstm_backward import case_of, recorded_backward, step_backward

_dynamo_compiling = torch.compiler.is_dynamo_compiling
_exporting = torch.compiler.is_exporting
_tracing = torch._C._is_tracing

# The arguments of a call, as lntune.kernels.direct.Table wants them described, and by the kernels'
# names.
_SIGNATURE = "tttottoof"
_NAMES = (*TENSORS, "eps")
_direct = {carried: dispatch.Direct(_SIGNATURE, _NAMES) for carried in (False, True)}


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
    is the sum of all vectors that are added to z. `weight_x` None: the input's part is already
    normalized, with its gain (for a whole sequence at once). `carried`: the cell is carried
    normalized, c[t] = LN(...), as in PyTorch's custom_lstms.py and TensorFlow Addons. `per_gate`:
    each of the four gates is normalized by itself, as in TensorFlow's LayerNormBasicLSTMCell
    (PyTorch's operators serve that).

    Raises:
        InputError: a shape or dtype that does not fit, or an eps that is no number, naming the
            argument.
        NotTunedError: in strict mode only, see `lntune.strict`.
    """
    tensors: Any = (gates_x, gates_h, c, weight_x, weight_h, weight_c, bias, bias_c)
    if _dynamo_compiling():
        if (
            per_gate
            or not usual(eps)
            or _exporting()  # a program that runs where lntune is not
            or len({t.dtype for t in tensors if t is not None}) > 1
            or not devices.serves(c.device.type)
            or c.dtype not in NAMES
            or transformed()
        ):
            return formula(*(*tensors, eps, carried, per_gate))
        h, c_new, _ = torch.ops.lntune.lnlstm_step(*tensors, eps, carried, recorded(*tensors))
        return h, c_new
    if not per_gate:
        made = _direct[carried].call(*tensors, eps)
        if made is not None:
            return made  # type: ignore[no-any-return]
    return _any(dict(zip(TENSORS, tensors, strict=True)), eps, carried, per_gate)


def _any(
    given: dict[str, Tensor | None], eps: float, carried: bool, per_gate: bool
) -> tuple[Tensor, Tensor]:
    """Every call that is not ready to go: checked, and prepared for the next time. `given` has all
    tensors in the order of the call.
    """
    # torch.jit.trace and torch.fx record the formula, sizes are tensors there; subclasses of
    # tensors take PyTorch's operators.
    if _tracing() or overridden(*given.values()):
        return formula(*(*given.values(), eps, carried, per_gate))  # type: ignore[arg-type]
    c = _check(given, eps)
    there = {name: t for name, t in given.items() if t is not None}
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in there.values()))
    there = {name: t.to(dtype) for name, t in there.items()}
    hidden, rows = c.shape[-1], math.prod(c.shape[:-1])
    values: Any = [there.get(name) for name in given]
    watched = rebuilt(*values)
    serves = served_unwatched if watched else served
    if (
        not rows
        or per_gate
        or not usual(eps)
        or hidden > MAX_HIDDEN // 4
        or not all(serves(t, None, None, hidden) for t in there.values())
    ):
        return formula(*(*values, eps, carried, per_gate))
    stats = recorded(*values)
    case = case_of(NAME, there, rows, carried, stats)
    kernel = dispatch.kernel_for(case, tuple(there.values()))
    if kernel is None:
        return formula(*(*values, eps, carried))
    if watched:
        return torch.ops.lntune.lnlstm_step(*values, float(eps), carried, True)[:2]  # type: ignore[no-any-return]
    if stats:
        return _Step.apply(float(eps), carried, *values)  # type: ignore[no-any-return, no-untyped-call]
    if hidden > 1 and not any(
        t is not None and (t.dtype != dtype or t.is_neg()) for t in given.values()
    ):
        _direct[carried].remember(case, kernel, (*given.values(), float(eps)))
    h, c_new, _ = _run(there, float(eps), carried, stats=False)
    return h, c_new


def _plain(there: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as kernels take them: matrices (rows, ...) as devices.matrix gives them, vectors
    contiguous.
    """
    matrices = ("gates_x", "gates_h", "c")
    return {
        name: devices.matrix(t, t.shape[-1]) if name in matrices else t.contiguous().resolve_neg()
        for name, t in there.items()
    }


def _run(
    there: dict[str, Tensor], eps: float, carried: bool, stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(h, c, statistics), the first two shaped as the cell, the statistics (number of them, rows)
    or empty.
    """
    shape, plain = there["c"].shape, _plain(there)
    c = plain["c"]
    case = case_of(NAME, plain, c.shape[0], carried, stats)
    names = statistics(tokens_of(case)) if stats else ()
    made = (
        *(torch.empty_like(c, memory_format=torch.contiguous_format) for _ in range(2)),
        torch.empty((len(names), c.shape[0]), dtype=torch.float32, device=c.device),
    )
    values = {
        **plain,
        "eps": eps,
        "h": made[0],
        "c_new": made[1],
        **dict(zip(names, made[2], strict=True)),
    }
    if c.shape[0]:
        dispatch.serve(case, tuple(plain.values()))(*(values[a.name] for a in arguments(case)))
    return made[0].view(shape), made[1].view(shape), made[2]


def _gradients(
    tensors: Sequence[Tensor | None], stats: Tensor, dh: Tensor, dc_new: Tensor, carried: bool
) -> tuple[Tensor | None, ...]:
    """The gradients of all tensors that are there."""
    there = {name: t for name, t in zip(TENSORS, tensors, strict=True) if t is not None}
    hidden = dh.shape[-1]
    made = step_backward(
        devices.matrix(dh, hidden),
        devices.matrix(dc_new, hidden),
        _plain(there),
        tuple(stats),
        carried,
    )
    return tuple(
        None if t is None else made[name].view(t.shape)
        for name, t in zip(TENSORS, tensors, strict=True)
    )


def _formula(ctx: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """The step as a function of its tensors alone, with what else a call kept."""
    return lambda *tensors: formula(*(*tensors, ctx.eps, ctx.carried))


class _Step(torch.autograd.Function):
    """Forward and backward on kernels; while the backward is recorded it is the formula's, which
    can be differentiated again.
    """

    @staticmethod
    def forward(
        ctx: Any, eps: float, carried: bool, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        h, c_new, stats = _run(
            {name: t for name, t in zip(TENSORS, tensors, strict=True) if t is not None},
            eps,
            carried,
            stats=True,
        )
        ctx.eps, ctx.carried = eps, carried
        ctx.save_for_backward(*tensors, stats)
        return h, c_new

    @staticmethod
    def backward(ctx: Any, dh: Tensor, dc_new: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, stats = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() or not all(
            served(t, None, None, dh.shape[-1]) for t in (dh, dc_new, *tensors) if t is not None
        ):
            return None, None, *recorded_backward(_formula(ctx), tensors, (dh, dc_new), wanted)
        grads = _gradients(tensors, stats, dh, dc_new, ctx.carried)
        return (
            None,
            None,
            *(grad if want else None for grad, want in zip(grads, wanted, strict=True)),
        )


def _check(given: dict[str, Tensor | None], eps: float) -> Tensor:
    """The cell; InputError, as lnlstm_step's, unless all arguments fit it."""
    for name, t in given.items():
        if t is None and name in ("weight_x", "bias", "bias_c"):
            continue
        if not isinstance(t, Tensor):
            raise InputError(got_expected(name, type(t).__name__, "a torch.Tensor"))
        if t.device.type in ("cpu", "cuda") and not t.is_floating_point():
            raise InputError(
                got_expected(
                    name, str(t.dtype), "a floating-point dtype", f"Convert it: {name}.float()."
                )
            )
    c = given["c"]
    assert c is not None
    if not c.ndim or not c.shape[-1]:
        raise InputError(
            got_expected("c", f"shape {tuple(c.shape)}", "(batch, hidden) with hidden 1 or more")
        )
    hidden = c.shape[-1]
    for name, t in given.items():
        if t is None:
            continue
        size = hidden if name in ("c", "weight_c", "bias_c") else 4 * hidden
        leading = tuple(c.shape[:-1]) if name in ("gates_x", "gates_h", "c") else ()
        if tuple(t.shape) != (*leading, size):
            raise InputError(
                got_expected(
                    name,
                    f"shape {tuple(t.shape)}",
                    f"{(*leading, size)} beside a cell of shape {tuple(c.shape)}",
                )
            )
        if t.device != c.device:
            raise InputError(
                got_expected(
                    name,
                    f"device {t.device}",
                    f"the cell's {c.device}",
                    f"Move it: {name}.to(c.device).",
                )
            )
    check_number(eps)
    return c


@torch.library.custom_op("lntune::lnlstm_step", mutates_args=(), device_types=("cpu", "cuda"))
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
    given = dict(
        zip(TENSORS, (gates_x, gates_h, c, weight_x, weight_h, weight_c, bias, bias_c), strict=True)
    )
    _check(given, eps)
    check_eps(eps)
    return _run({name: t for name, t in given.items() if t is not None}, eps, carried, stats)


@lnlstm_step_op.register_fake
def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, _, _, stats = arguments
    c = tensors[2]
    count = len(statistics(("raw",) if tensors[3] is not None else ())) if stats else 0
    like = [torch.empty_like(c, memory_format=torch.contiguous_format) for _ in range(2)]
    return like[0], like[1], c.new_empty((count, math.prod(c.shape[:-1])), dtype=torch.float32)


@torch.library.custom_op(
    "lntune::lnlstm_step_backward", mutates_args=(), device_types=("cpu", "cuda")
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
    """What torch.compile puts into a graph of gradients: those of the tensors that are there, in
    order.
    """
    tensors = (gates_x, gates_h, c, weight_x, weight_h, weight_c, bias, bias_c)
    return [t for t in _gradients(tensors, stats, dh, dc_new, carried) if t is not None]


@lnlstm_step_backward_op.register_fake
def _fake_backward(*arguments: Any) -> list[Tensor]:
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in arguments[3:11]
        if t is not None
    ]


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    *tensors, eps, carried, stats = inputs
    ctx.eps, ctx.carried, ctx.stats = eps, carried, stats
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, output[2])


def _op_backward(ctx: Any, dh: Tensor, dc_new: Tensor, _: Any) -> tuple[Any, ...]:
    *tensors, stats = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:8]
    if torch.is_grad_enabled() or batched(dh, dc_new, *tensors):
        return *recorded_backward(_formula(ctx), tensors, (dh, dc_new), wanted), None, None, None
    if not ctx.stats:  # a program that was written without gradients
        *_, stats = torch.ops.lntune.lnlstm_step(*tensors, ctx.eps, ctx.carried, True)
    made = iter(torch.ops.lntune.lnlstm_step_backward(dh, dc_new, stats, *tensors, ctx.carried))
    grads = [None if t is None else next(made) for t in tensors]
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
        *map(inputs.get, TENSORS),
        inputs["eps"],
        "carried" in tokens_of(case),
    )
    return lambda: lnlstm_step(*values)
