"""lntune.layer_norm: torch.nn.functional.layer_norm on tuned kernels.

A call that eager mode was measured to serve best is PyTorch's (known_eager). Others go one of three
ways:

* no gradient wanted: a direct call, one step of C from the arguments to the kernel, without
  autograd and dispatcher;
* gradients: such a call that keeps the statistics, with a backward attached to its output in C++
  (layer_norm_node); until that is compiled, which the first backward has done, and for tensors on
  GPUs, an autograd.Function of two such calls;
* under torch.compile: the custom op `lntune::layer_norm`.

Whatever a kernel does not do (another device, float64, tensor subclasses, functorch, dispatch
modes) goes to PyTorch, and so does what writes a program for elsewhere (torch.export, torch.onnx,
torch.jit, torch.fx): that holds PyTorch's own norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lntune.case import MAX_HIDDEN, Case
from lntune.ops.layer_norm import NAME, variant
from lntune.torch import devices, dispatch, eager, known_eager, layer_norm_node, recording
from lntune.torch.argument_checks import check_layer_norm
from lntune.torch.direct_calls import Direct
from lntune.torch.eager import autocast_widens, in_float32
from lntune.torch.layer_norm_backward import layer_norm_backward
from lntune.torch.registration import register_with_torchscript
from lntune.torch.support import (
    DTYPE_NAMES,
    NO_ROWS,
    OVERRIDDEN,
    TRACED,
    affine_kind,
    are_plain,
    exporting,
    in_transform,
    is_checkpointed,
    is_kernel_eps,
    is_overridden,
    kernel_support,
    log_unsupported,
    needs_gradients,
    present,
)

_compiling = torch.compiler.is_compiling
_dynamo_compiling = torch.compiler.is_dynamo_compiling
_tracing = torch._C._is_tracing

# The arguments of a call, as lntune.kernels.direct.Table wants them described, and by the kernels'
# names.
_SIGNATURE = "tnoof"
_NAMES = ("x", "normalized_shape", "weight", "bias", "eps")
_NO_KERNEL = "it has no rows, or rows or an eps that are not built"
_direct = Direct(_SIGNATURE, _NAMES, layer_norm_node.RECORD)
# for autograd.Function: with the statistics a backward takes
_saving = Direct(_SIGNATURE, _NAMES)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer normalization over the last dimensions; the signature and the result of
    torch.nn.functional.layer_norm.

    float32, float16 and bfloat16 on CPUs and NVIDIA GPUs run on the kernel tuned for the device,
    hidden size and number of rows; everything else, and every case in which eager measured faster,
    is PyTorch's. (Ba, Kiros, Hinton: *Layer Normalization*, 2016, arXiv:1607.06450, eqs. 3-4.)

    Args:
        input: (..., *normalized_shape), of a floating-point dtype.
        normalized_shape: the last dimensions of the input, whose elements are a row.
        weight: normalized_shape, in the input's dtype or float32; may be left out.
        bias: as weight.
        eps: added to the variance.

    Returns:
        Shaped as the input, contiguous, in the input's dtype (float32 on a GPU under autocast, as
        PyTorch's).

    Raises:
        InputError: a shape, dtype or device that does not fit, or an eps that is no number, naming
            the argument.
        NotTunedError: in strict mode only, see `lntune.strict`.
    """
    if _dynamo_compiling():
        if not are_plain(input, weight, bias):
            return functional.layer_norm(input, normalized_shape, weight, bias, eps)
        return _compiled(input, normalized_shape, weight, bias, eps)
    y = _direct.call(input, normalized_shape, weight, bias, eps)
    if y is not None:
        return y  # type: ignore[no-any-return]
    if (case := known_eager.known(input, normalized_shape, weight, bias, eps)) is not None:
        if recording.SINKS:
            with recording.timing(*case):
                return functional.layer_norm(input, normalized_shape, weight, bias, eps)
        return functional.layer_norm(input, normalized_shape, weight, bias, eps)
    if _saving.serves(input, normalized_shape, weight, bias, eps) and needs_gradients(
        input, weight, bias
    ):
        return _LayerNorm.apply(input, tuple(normalized_shape), weight, bias, eps, None)  # type: ignore[no-any-return, no-untyped-call]
    return _general(input, normalized_shape, weight, bias, eps)


register_with_torchscript(layer_norm, "aten::layer_norm")


def layer_norm_forward(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd): layer normalization with the statistics of its rows, which
    `lntune.layer_norm_backward` takes.

    The arguments of torch.native_layer_norm, with shapes and dtypes as layer_norm's. y is shaped as
    the input; mean and rstd = 1 / sqrt(variance + eps) have the shape (rows,) and are float32
    whatever the dtype of the input, float64 for one in float64. y can be differentiated, the
    statistics of a kernel's call cannot. (Ba, Kiros, Hinton 2016, eqs. 3-4.)

    Raises:
        InputError, NotTunedError: as layer_norm.
    """
    if is_overridden(input, weight, bias):
        log_unsupported("layer_norm_forward", OVERRIDDEN)
        return torch.native_layer_norm(input, list(normalized_shape), weight, bias, eps)
    shape = check_layer_norm(input, normalized_shape, weight, bias, eps)
    support = kernel_support(present(input, weight, bias), math.prod(shape), eps)
    if not support:
        log_unsupported("layer_norm_forward", support)
        with recording.eager(NAME, input, math.prod(shape), support.reason):
            return eager.layer_norm_forward(input, shape, weight, bias, eps)
    return torch.ops.lntune.layer_norm(input, list(shape), weight, bias, eps, True)  # type: ignore[no-any-return]


def _general(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Every call that no table knows: checked, served, and made known to the table for the next."""
    if _compiling():  # torch.export without dynamo traces with tensors of its own
        return _compiled(input, normalized_shape, weight, bias, eps)
    if is_overridden(input, weight, bias):
        log_unsupported(NAME, OVERRIDDEN)
        return functional.layer_norm(input, normalized_shape, weight, bias, eps)
    # no sizes to check, or sizes that are tensors
    if isinstance(input, Tensor) and (input.is_nested or _tracing()):
        log_unsupported(NAME, TRACED)
        return functional.layer_norm(input, normalized_shape, weight, bias, eps)
    shape = check_layer_norm(input, normalized_shape, weight, bias, eps)
    hidden, tensors = math.prod(shape), present(input, weight, bias)
    checkpointed = is_checkpointed(*tensors)
    support = NO_ROWS
    if input.numel():
        support = kernel_support(tensors, hidden, eps, watched=checkpointed)
    if not support:
        log_unsupported(NAME, support)
        with recording.eager(NAME, input, hidden, support.reason):
            return eager.layer_norm(input, shape, weight, bias, eps)
    if autocast_widens(input):
        x, weight, bias = in_float32(input, weight, bias)
        return layer_norm(x, shape, weight, bias, eps)
    grad = needs_gradients(*tensors)
    case = _case(input.numel() // hidden, hidden, input, weight, bias, grad)
    kernel, device = dispatch.kernel_for(case, tensors), devices.of(input.device)
    if kernel is None:
        if dispatch.chose_eager(case, tensors):
            known_eager.remember(input, normalized_shape, weight, bias, eps, (case, device))
        with recording.timing(case, device):
            return eager.layer_norm(input, shape, weight, bias, eps)
    if checkpointed:
        return torch.ops.lntune.layer_norm(input, list(shape), weight, bias, eps, True)[0]  # type: ignore[no-any-return]
    # Direct calls refuse a negative bit: only _neg_view and views of one element (hidden 1) can be
    # contiguous and have it.
    if hidden > 1 and not any(v is not None and v.is_neg() for v in (weight, bias)):
        node = grad and devices.have_node(input) and layer_norm_node.ready()
        call = (input, shape, weight, bias, float(eps))
        (_direct if node or not grad else _saving).remember(case, kernel, call, recorded=node)
        if node and (y := _direct.call(*call)) is not None:
            return y  # type: ignore[no-any-return]
    kernel = recording.noted(kernel, case, device)
    if grad:
        return _LayerNorm.apply(input, shape, weight, bias, eps, kernel)  # type: ignore[no-any-return, no-untyped-call]
    return _run(kernel, input, hidden, weight, bias, eps, stats=False)[0]


def _case(
    rows: int,
    hidden: int,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: bool,
) -> Case:
    return Case(
        NAME,
        hidden,
        DTYPE_NAMES[input.dtype],
        max(rows, 1),
        variant(affine_kind(weight, input), affine_kind(bias, input), statistics),
    )


def _run(
    kernel: Callable[..., None],
    input: Tensor,
    hidden: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    stats: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Call the kernel on any layout: (y shaped as the input and contiguous, mean (rows,), rstd
    (rows,)).
    """
    x = devices.matrix(input, hidden)
    y = torch.empty_like(input, memory_format=torch.contiguous_format)
    affine = [v.contiguous().resolve_neg().view(-1) for v in (weight, bias) if v is not None]
    if not stats:
        kernel(x, *affine, eps, y.view(-1, hidden))
        return y, None, None
    # the device is named, because torch.device may be in force
    mean = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    kernel(x, *affine, eps, y.view(-1, hidden), mean, rstd)
    return y, mean, rstd


class _LayerNorm(torch.autograd.Function):
    """Forward and backward on kernels; while the backward is recorded it is PyTorch's, which can be
    differentiated again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        shape: tuple[int, ...],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        kernel: Any,
    ) -> Tensor:
        results = (
            _saving.call(input, shape, weight, bias, eps)
            if kernel is None
            else _run(kernel, input, math.prod(shape), weight, bias, eps, stats=True)
        )
        if results is None:  # forgotten by another thread since it was asked whether it serves
            results = eager.layer_norm_forward(input, shape, weight, bias, eps)
        ctx.shape = shape
        ctx.save_for_backward(input, weight, bias, *results[1:])
        y: Tensor = results[0]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, mean, rstd = ctx.saved_tensors
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3])
        dx, dgamma, dbeta = layer_norm_backward(
            dy, input, ctx.shape, mean, rstd, weight, bias, wanted
        )
        if layer_norm_node.compile_once():
            _saving.forget()
        return dx, None, dgamma, dbeta, None, None


def _compiled(
    input: Tensor, normalized_shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """What torch.compile and torch.export trace."""
    shape = list(normalized_shape)  # which may be symbols, and then stay such
    # vmap, grad and jvp inside compiled code want PyTorch's own formulas (a custom op has no
    # forward-mode derivative, and its tangent would be taken for zero). An exported program shall
    # run where lntune is not.
    if (
        exporting()
        or not devices.serves(input.device.type)
        or input.dtype not in DTYPE_NAMES
        or isinstance(eps, Tensor)
        or in_transform()
    ):
        return eager.layer_norm(input, shape, weight, bias, eps)
    if autocast_widens(input):
        input, weight, bias = in_float32(input, weight, bias)
    y, _, _ = torch.ops.lntune.layer_norm(
        input, shape, weight, bias, eps, needs_gradients(input, weight, bias)
    )
    return y  # type: ignore[no-any-return]


@torch.library.custom_op("lntune::layer_norm", mutates_args=(), device_types=devices.TYPES)
def layer_norm_op(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd); the statistics are float32 of shape (rows,), or empty without `stats`."""
    shape = check_layer_norm(input, normalized_shape, weight, bias, eps)
    hidden = math.prod(shape)
    rows = input.numel() // hidden if hidden else 0
    kernel, device = None, devices.of(input.device)
    counting = recording.eager(NAME, input, hidden, _NO_KERNEL)
    if rows and hidden <= MAX_HIDDEN and is_kernel_eps(eps):
        case = _case(rows, hidden, input, weight, bias, stats)
        kernel = dispatch.kernel_for(case, present(input, weight, bias))
        counting = recording.timing(case, device)
    if kernel is not None:
        kernel = recording.noted(kernel, case, device)
        y, mean, rstd = _run(kernel, input, hidden, weight, bias, eps, stats)
    else:
        with counting:
            y, mean, rstd = eager.layer_norm_forward(input, shape, weight, bias, eps)
    if not stats or mean is None or rstd is None:
        mean, rstd = (
            input.new_empty(0, dtype=torch.float32),
            input.new_empty(0, dtype=torch.float32),
        )
    return y, mean, rstd


@layer_norm_op.register_fake
def _fake(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_layer_norm(input, normalized_shape, weight, bias, eps)
    leading = input.shape[: input.ndim - len(normalized_shape)]
    rows = math.prod(leading) if stats else 0
    y = torch.empty_like(input, memory_format=torch.contiguous_format)
    return y, input.new_empty(rows, dtype=torch.float32), input.new_empty(rows, dtype=torch.float32)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    input, shape, weight, bias, eps, stats = inputs
    _, mean, rstd = output
    ctx.shape, ctx.eps, ctx.stats = shape, eps, stats
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(input, weight, bias, mean, rstd)


def _op_backward(ctx: Any, dy: Tensor, _dmean: Any, _drstd: Any) -> tuple[Any, ...]:
    input, weight, bias, mean, rstd = ctx.saved_tensors
    if not ctx.stats:  # a program that was written without gradients
        _, mean, rstd = torch.ops.lntune.layer_norm(input, ctx.shape, weight, bias, ctx.eps, True)
    wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3])
    if torch.is_grad_enabled():
        dx, dgamma, dbeta = eager.layer_norm_backward(
            dy, input, ctx.shape, mean, rstd, weight, bias, wanted
        )
        return dx, None, dgamma, dbeta, None, None
    grads = torch.ops.lntune.layer_norm_backward(
        dy, input, ctx.shape, mean, rstd, weight, bias, list(wanted)
    )
    dx, dgamma, dbeta = (g if want else None for g, want in zip(grads, wanted, strict=True))
    return dx, None, dgamma, dbeta, None, None


layer_norm_op.register_autograd(_op_backward, setup_context=_setup_context)


def prepare_training() -> None:
    """Compile the node of autograd's graph, see `lntune.torch.prepare_training`.

    Raises:
        BuildError: it cannot be compiled.
    """
    layer_norm_node.ensure_library()


def bound_call(case: Case, inputs: Mapping[str, Any]) -> Callable[[], Any]:
    """layer_norm bound to the operator's named inputs, see `Op.binding`."""
    x, weight, bias, eps = inputs["x"], inputs.get("weight"), inputs.get("bias"), inputs["eps"]
    shape = (case.hidden,)
    return lambda: layer_norm(x, shape, weight, bias, eps)
