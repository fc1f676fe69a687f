"""torch.ops.aten.native_layer_norm_backward on tuned kernels.

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
from lntune.errors import InputError, got_expected
from lntune.ops.layer_norm_backward import NAME, arguments, variant
from lntune.torch import devices, dispatch, layer_norm_node
from lntune.torch.arguments import (
    NAMES,
    check_arguments,
    in_float32,
    kind,
    mixed,
    overridden,
    served,
    there,
)

Wanted = tuple[bool, bool, bool]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]

# The arguments of a call, as lntune.kernels.direct.Table wants them described, and by the kernels'
# names. The bias is looked at only for its dtype, which is that of dbeta.
_SIGNATURE, _NAMES = "ttnttoo", ("dy", "x", "normalized_shape", "mean", "rstd", "weight", "bias")
_direct = {
    wanted: dispatch.Direct(_SIGNATURE, _NAMES)
    for wanted in itertools.product((True, False), repeat=3)
}


def layer_norm_backward(
    grad_out: Tensor,  # (..., *normalized_shape)
    input: Tensor,  # (..., *normalized_shape)
    normalized_shape: Sequence[int],
    mean: Tensor,  # (rows,) or (..., 1), float32
    rstd: Tensor,  # (rows,) or (..., 1), float32
    weight: Tensor | None = None,  # normalized_shape
    bias: Tensor | None = None,  # normalized_shape
    output_mask: Sequence[bool] = (True, True, True),
) -> Gradients:
    """The gradients (dx, dgamma, dbeta) of layer norm, each None unless `output_mask` wants it and
    its tensor is there.

    The arguments and results of torch.ops.aten.native_layer_norm_backward, with the statistics in
    float32 whatever the dtype of the input; only the dtype and the presence of `bias` matter. The
    same call gives the same bits. While gradients are recorded PyTorch's own formula serves, and
    can be differentiated. (See lntune.ops.layer_norm_backward for the equations.)

    Raises:
        InputError: a shape or dtype that does not fit, naming the argument.
    """
    dx, dgamma, dbeta = output_mask
    wanted = (bool(dx), bool(dgamma and weight is not None), bool(dbeta and bias is not None))
    if not torch.is_grad_enabled():
        made = _direct[wanted].call(grad_out, input, normalized_shape, mean, rstd, weight, bias)
        if made is not None:
            return _place(made, wanted)
    return _any(grad_out, input, normalized_shape, mean, rstd, weight, bias, wanted)


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
        NAMES[input.dtype],
        rows,
        variant(kind(weight, input), kind(bias, input), wanted),
    )


def _place(made: Any, wanted: Wanted) -> Gradients:
    """A kernel's outputs, one tensor or several, where the gradients wanted have their places."""
    left = iter(made if isinstance(made, tuple) else (made,))
    return tuple(next(left) if want else None for want in wanted)  # type: ignore[return-value]


def _any(
    dy: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wanted: Wanted,
) -> Gradients:
    """Every call that is not ready to go: checked, and prepared for the next time."""
    tensors = there(dy, input, mean, rstd, weight, bias)
    # a graph of torch.fx's records the operator
    if not all(isinstance(t, Tensor) for t in tensors) and overridden(*tensors):
        recorded: Gradients = torch.ops.aten.native_layer_norm_backward(
            dy, input, normalized_shape, mean, rstd, weight, bias, list(wanted)
        )
        return recorded
    shape = _check(dy, input, normalized_shape, mean, rstd, weight, bias)
    hidden = math.prod(shape)
    rows = input.numel() // hidden if hidden else 0
    if not any(wanted):
        return None, None, None
    kernel = None
    if (
        rows
        and not torch.is_grad_enabled()
        and dy.dtype == input.dtype
        and served(input, weight, bias, hidden)
        and served(dy, mean, rstd, hidden)
    ):
        case = _case(rows, hidden, input, weight, bias, wanted)
        kernel = dispatch.kernel_for(case, there(dy, input, weight))
    if kernel is None:
        return eager_backward(dy, input, shape, mean, rstd, weight, bias, wanted)

    def plain(tensor: Tensor, size: int) -> Tensor:
        return tensor.contiguous().resolve_neg().view(size)

    given = {
        "dy": devices.matrix(dy, hidden),
        "x": devices.matrix(input, hidden),
        "mean": plain(mean, rows),
        "rstd": plain(rstd, rows),
    }
    if weight is not None:
        given["weight"] = plain(weight, hidden)
    like = {
        name: t for name, t in (("dx", input), ("dgamma", weight), ("dbeta", bias)) if t is not None
    }
    made = {
        a.name: torch.empty_like(like[a.name], memory_format=torch.contiguous_format)
        for a in arguments(case)
        if a.role == "out"
    }
    outputs = {
        name: tensor.view(rows, hidden) if name == "dx" else tensor.view(hidden)
        for name, tensor in made.items()
    }
    kernel(*({**given, **outputs}[a.name] for a in arguments(case)))
    if hidden > 1 and not any(t is not None and t.is_neg() for t in (input, mean, rstd, weight)):
        _direct[wanted].remember(case, kernel, (dy, input, shape, mean, rstd, weight, bias))
    return made.get("dx"), made.get("dgamma"), made.get("dbeta")


def _check(
    dy: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[int, ...]:
    """The normalized shape.

    Raises:
        InputError: as layer_norm_backward's.
    """
    shape = check_arguments(input, normalized_shape, weight, bias)
    if dy.shape != input.shape:
        raise InputError(
            got_expected(
                "grad_out", f"shape {tuple(dy.shape)}", f"the input's {tuple(input.shape)}"
            )
        )
    rows = math.prod(input.shape[: input.ndim - len(shape)])
    for name, stats in (("mean", mean), ("rstd", rstd)):
        if stats.numel() != rows:
            raise InputError(
                got_expected(
                    name, f"shape {tuple(stats.shape)}", f"one number for each of the {rows} rows"
                )
            )
        if stats.dtype not in (torch.float32, torch.promote_types(torch.float32, input.dtype)):
            raise InputError(
                got_expected(
                    name, str(stats.dtype), "torch.float32", f"Convert it: {name}.float()."
                )
            )
    return shape


def eager_backward(
    dy: Tensor,
    input: Tensor,
    shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wanted: Wanted,
) -> Gradients:
    """PyTorch's own backward, given float32 statistics (rows,) whatever the input's dtype.

    On CPUs low precision takes its mixed-dtype form, in which weight and statistics are float32:
    the other would round the statistics to the input's dtype first. On GPUs statistics are float32
    always, and all the rest has to be of one dtype.
    """
    if input.device.type == "cuda":
        if mixed(input, weight, bias):
            x, gamma, beta = in_float32(input, weight, bias)
            made = eager_backward(dy.float(), x, shape, mean, rstd, gamma, beta, wanted)
            like = (input, weight, bias)
            return tuple(
                g if g is None or t is None else g.to(t.dtype)
                for g, t in zip(made, like, strict=True)
            )  # type: ignore[return-value]
        low = False
    else:
        low = input.itemsize < torch.float32.itemsize
    shape = list(shape)
    stats_shape = [*input.shape[: input.ndim - len(shape)], *[1] * len(shape)]
    gamma = weight
    if low:
        gamma = (
            torch.ones(shape, dtype=torch.float32, device=input.device)
            if weight is None
            else weight.float()
        )
    beta = bias.float() if bias is not None and low else bias
    dx, dgamma, dbeta = torch.ops.aten.native_layer_norm_backward(
        dy.contiguous(),
        input.contiguous(),
        shape,
        mean.view(stats_shape),
        rstd.view(stats_shape),
        gamma,
        beta,
        list(wanted),
    )
    if wanted[1] and weight is not None and dgamma is not None:
        dgamma = dgamma.to(weight.dtype)
    if wanted[2] and bias is not None and dbeta is not None:
        dbeta = dbeta.to(bias.dtype)
    return dx if wanted[0] else None, dgamma if wanted[1] else None, dbeta if wanted[2] else None


@torch.library.custom_op(
    "lntune::layer_norm_backward", mutates_args=(), device_types=("cpu", "cuda")
)
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
    made = layer_norm_backward(
        grad_out, input, normalized_shape, mean, rstd, weight, bias, output_mask
    )
    return tuple(input.new_empty(0) if m is None else m for m in made)  # type: ignore[return-value]


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
    made = layer_norm_backward(dy, input, shape, mean, rstd, weight, bias, mask)
    usual = not torch.is_grad_enabled() and dy.dtype == input.dtype and input.is_contiguous()
    hidden = input.shape[-1]
    if (
        usual
        and input.numel()
        and served(input, weight, bias, hidden)
        and served(dy, mean, rstd, hidden)
    ):
        dx, dgamma, dbeta = mask
        case = _case(input.numel() // hidden, hidden, input, weight, bias, (dx, dgamma, dbeta))
        kernel = dispatch.kernel_for(case, (input,))
        # not where a kernel is only away for now
        if kernel or dispatch.choose(case, devices.of(input.device)).tier == "eager":
            layer_norm_node.remember(
                case, kernel, kind(weight, input), kind(bias, input), (dx, dgamma, dbeta)
            )
    return tuple(input.new_empty(0) if m is None else m for m in made)


def bound_call(case: Case, inputs: Mapping[str, Any]) -> Callable[[], Any]:
    """layer_norm_backward bound to the operator's named inputs, see `Op.binding`."""
    dy, x, mean, rstd, weight = (inputs[name] for name in ("dy", "x", "mean", "rstd", "weight"))
    shape = (case.hidden,)
    return lambda: layer_norm_backward(dy, x, shape, mean, rstd, weight, weight)
