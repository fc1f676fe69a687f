"""lntune.layer_norm_backward: torch.ops.aten.native_layer_norm_backward on tuned kernels.

Direct calls without a detour, one table for each set of gradients that is wanted; whatever a kernel
does not do goes to PyTorch, and so does everything while the backward itself is recorded: PyTorch's
formula can be differentiated again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lntune.case import Case
from lntune.ops.layer_norm_backward import NAME, arguments, variant
from lntune.torch import devices, dispatch, eager, layer_norm_node, recording
from lntune.torch.argument_checks import check_layer_norm_backward
from lntune.torch.direct_calls import Direct
from lntune.torch.eager import Gradients
from lntune.torch.support import (
    DTYPE_NAMES,
    NO_ROWS,
    Support,
    affine_kind,
    is_overridden,
    kernel_support,
    log_unsupported,
    present,
)

Wanted = tuple[bool, bool, bool]
"""Which of dx, dgamma and dbeta are asked for."""
_RECORDED = Support.no("its own gradients are recorded")
_MIXED = Support.no("grad_out and input are of different dtypes")

# The arguments of a call, as lntune.kernels.direct.Table wants them described, and by the kernels'
# names. The bias is looked at only for its dtype, which is that of dbeta.
_SIGNATURE, _NAMES = "ttnssoo", ("dy", "x", "normalized_shape", "mean", "rstd", "weight", "bias")
_direct = {
    wanted: Direct(_SIGNATURE, _NAMES) for wanted in itertools.product((True, False), repeat=3)
}


def layer_norm_backward(
    grad_out: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    output_mask: Sequence[bool] = (True, True, True),
) -> Gradients:
    """The gradients (dx, dgamma, dbeta) of layer norm, each None unless `output_mask` wants it and
    its tensor is given; shaped as their tensors, in their dtypes.

    The arguments and results of torch.ops.aten.native_layer_norm_backward, with the statistics in
    float32 whatever the dtype of the input. The same call gives the same bits. While gradients are
    recorded PyTorch's own formula serves, and can be differentiated. (Ba, Kiros, Hinton 2016,
    arXiv:1607.06450; lntune.ops.layer_norm_backward has the equations.)

    Args:
        grad_out: (..., *normalized_shape), the gradient of y.
        input: (..., *normalized_shape), of a floating-point dtype.
        normalized_shape: the last dimensions of the input, whose elements are a row.
        mean: (rows,) or (..., 1), float32, as layer_norm_forward gives it.
        rstd: as mean.
        weight: normalized_shape, in the input's dtype or float32.
        bias: as weight; only its dtype and whether it is given matter.
        output_mask: which of the three are wanted.

    Raises:
        InputError: a shape or dtype that does not fit, naming the argument.
        NotTunedError: in strict mode only, see `lntune.strict`.
    """
    dx, dgamma, dbeta = output_mask
    wanted = (bool(dx), bool(dgamma and weight is not None), bool(dbeta and bias is not None))
    if not torch.is_grad_enabled():
        outputs = _direct[wanted].call(grad_out, input, normalized_shape, mean, rstd, weight, bias)
        if outputs is not None:
            return _by_position(outputs, wanted)
    return _general(grad_out, input, normalized_shape, mean, rstd, weight, bias, wanted)


def _case(
    rows: int,
    hidden: int,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wanted: Wanted,
) -> Case:
    return Case(
        NAME,
        hidden,
        DTYPE_NAMES[input.dtype],
        rows,
        variant(affine_kind(weight, input), affine_kind(bias, input), wanted),
    )


def _by_position(outputs: Any, wanted: Wanted) -> Gradients:
    """A kernel's outputs, one tensor or several, at the positions of the gradients wanted."""
    remaining = iter(outputs if isinstance(outputs, tuple) else (outputs,))
    return tuple(next(remaining) if want else None for want in wanted)  # type: ignore[return-value]


def _support(
    dy: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    hidden: int,
) -> Support:
    """Whether a kernel can take a backward whose arguments fit each other."""
    if not input.numel():
        return NO_ROWS
    if torch.is_grad_enabled():
        return _RECORDED
    if dy.dtype != input.dtype:
        return _MIXED
    support = kernel_support(present(input, weight, bias), hidden)
    return kernel_support((dy, mean, rstd), hidden) if support else support


def _general(
    dy: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wanted: Wanted,
) -> Gradients:
    """Every call that no table knows: checked, served, and made known to the table for the next."""
    tensors = present(dy, input, mean, rstd, weight, bias)
    # a graph of torch.fx's records the operator
    if not all(isinstance(t, Tensor) for t in tensors) and is_overridden(*tensors):
        proxies: Gradients = torch.ops.aten.native_layer_norm_backward(
            dy, input, normalized_shape, mean, rstd, weight, bias, list(wanted)
        )
        return proxies
    shape = check_layer_norm_backward(dy, input, normalized_shape, mean, rstd, weight, bias)
    hidden = math.prod(shape)
    if not any(wanted):
        return None, None, None
    support = _support(dy, input, mean, rstd, weight, bias, hidden)
    if not support:
        log_unsupported(NAME, support)
        with recording.eager(NAME, input, hidden, support.reason):
            return eager.layer_norm_backward(dy, input, shape, mean, rstd, weight, bias, wanted)
    rows = input.numel() // hidden
    case = _case(rows, hidden, input, weight, bias, wanted)
    kernel, device = dispatch.kernel_for(case, present(dy, input, weight)), devices.of(input.device)
    if kernel is None:
        with recording.timing(case, device):
            return eager.layer_norm_backward(dy, input, shape, mean, rstd, weight, bias, wanted)

    def contiguous(tensor: Tensor, size: int) -> Tensor:
        return tensor.contiguous().resolve_neg().view(size)

    inputs = {
        "dy": devices.matrix(dy, hidden),
        "x": devices.matrix(input, hidden),
        "mean": contiguous(mean, rows),
        "rstd": contiguous(rstd, rows),
    }
    if weight is not None:
        inputs["weight"] = contiguous(weight, hidden)
    like = {
        name: t for name, t in (("dx", input), ("dgamma", weight), ("dbeta", bias)) if t is not None
    }
    grads = {
        a.name: torch.empty_like(like[a.name], memory_format=torch.contiguous_format)
        for a in arguments(case)
        if a.role == "out"
    }
    outputs = {
        name: tensor.view(rows, hidden) if name == "dx" else tensor.view(hidden)
        for name, tensor in grads.items()
    }
    call = recording.noted(kernel, case, device)
    call(*({**inputs, **outputs}[a.name] for a in arguments(case)))
    if hidden > 1 and not any(t is not None and t.is_neg() for t in (input, mean, rstd, weight)):
        _direct[wanted].remember(case, kernel, (dy, input, shape, mean, rstd, weight, bias))
    return grads.get("dx"), grads.get("dgamma"), grads.get("dbeta")


@torch.library.custom_op("lntune::layer_norm_backward", mutates_args=(), device_types=devices.TYPES)
def layer_norm_backward_op(
    grad_out: Tensor,
    input: Tensor,
    normalized_shape: list[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """What torch.compile puts into a graph: (dx, dgamma, dbeta), empty where not wanted."""
    grads = layer_norm_backward(
        grad_out, input, normalized_shape, mean, rstd, weight, bias, output_mask
    )
    return tuple(input.new_empty(0) if g is None else g for g in grads)  # type: ignore[return-value]


@layer_norm_backward_op.register_fake
def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, input, _, _, _, weight, bias, output_mask = arguments
    like = (input, weight, bias)
    return tuple(  # type: ignore[return-value]
        (
            torch.empty_like(t, memory_format=torch.contiguous_format)
            if want and t is not None
            else input.new_empty(0)
        )
        for want, t in zip(output_mask, like, strict=True)
    )


torch.library.define(
    "lntune::layer_norm_gradients",
    "(Tensor grad_out, Tensor input, SymInt[] normalized_shape, Tensor mean, Tensor rstd, Tensor?"
    " weight, Tensor? bias, bool[] output_mask) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("lntune::layer_norm_gradients", "CompositeImplicitAutograd")
def _gradients(
    dy: Tensor,
    input: Tensor,
    shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """What the node in C++ calls where it cannot go to the kernel by itself: whatever happens in
    here is recorded, traced, watched. Backwards that look like this one go to the kernel from now
    on.
    """
    grads = layer_norm_backward(dy, input, shape, mean, rstd, weight, bias, mask)
    hidden = math.prod(shape)
    if input.is_contiguous() and _support(dy, input, mean, rstd, weight, bias, hidden):
        dx, dgamma, dbeta = mask
        case = _case(input.numel() // hidden, hidden, input, weight, bias, (dx, dgamma, dbeta))
        kernel = dispatch.kernel_for(case, (input,))
        # not where a kernel is only away for now
        if kernel or dispatch.choose(case, devices.of(input.device)).tier == "eager":
            layer_norm_node.remember(
                case,
                kernel,
                affine_kind(weight, input),
                affine_kind(bias, input),
                (dx, dgamma, dbeta),
            )
    return tuple(input.new_empty(0) if g is None else g for g in grads)


def bound_call(case: Case, inputs: Mapping[str, Any]) -> Callable[[], Any]:
    """layer_norm_backward bound to the operator's named inputs, see `Op.binding`."""
    dy, x, mean, rstd, weight = (inputs[name] for name in ("dy", "x", "mean", "rstd", "weight"))
    shape = (case.hidden,)
    return lambda: layer_norm_backward(dy, x, shape, mean, rstd, weight, weight)
