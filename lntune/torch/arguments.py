"""The arguments of a layer norm: which are wrong, and which are a kernel's."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.overrides import _get_current_function_mode_stack, has_torch_function
from torch.utils._device import DeviceContext

from lntune.case import DTYPES, MAX_HIDDEN
from lntune.errors import InputError, got_expected
from lntune.torch import devices
from lntune.torch.constants import constant

NAMES = {getattr(torch, name): name for name in DTYPES}
"""dtypes kernels exist for, with their names in a Case."""

_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_LOW = frozenset({torch.float16, torch.bfloat16})
_dual_numbers = torch.autograd.forward_ad
_grad_enabled = torch.is_grad_enabled


def check_arguments(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
) -> tuple[int, ...]:
    """The normalized shape as a tuple of integers.

    Raises:
        InputError: a shape, dtype or device that does not fit, or an eps that is no number, naming
            the argument.
    """
    if not isinstance(input, Tensor):
        raise InputError(got_expected("input", type(input).__name__, "a torch.Tensor"))
    try:
        shape = tuple(
            n if isinstance(n, torch.SymInt) else operator.index(n) for n in normalized_shape
        )
    except TypeError:
        raise InputError(
            got_expected(
                "normalized_shape",
                repr(normalized_shape),
                "a sequence of integers",
                "Write (1024,), not 1024.",
            )
        ) from None
    if not shape:
        raise InputError(got_expected("normalized_shape", "()", "at least one dimension"))
    if input.ndim < len(shape) or tuple(input.shape[-len(shape) :]) != shape:
        raise InputError(
            got_expected(
                "input",
                f"shape {tuple(input.shape)}",
                f"a shape that ends in normalized_shape {shape}",
            )
        )
    ours = input.device.type in ("cpu", "cuda")  # what other devices take is for them to say
    if ours and not input.is_floating_point():
        raise InputError(
            got_expected(
                "input", str(input.dtype), "a floating-point dtype", "Convert it: input.float()."
            )
        )
    # an affine may be kept in float32
    wide = (input.dtype, torch.float32 if input.itemsize < torch.float32.itemsize else input.dtype)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is None:
            continue
        if not isinstance(vector, Tensor):
            raise InputError(got_expected(name, type(vector).__name__, "a torch.Tensor or None"))
        if tuple(vector.shape) != shape:
            raise InputError(
                got_expected(name, f"shape {tuple(vector.shape)}", f"normalized_shape {shape}")
            )
        if ours and vector.dtype not in wide:
            expected = " or ".join(dict.fromkeys(map(str, wide)))
            raise InputError(
                got_expected(
                    name,
                    str(vector.dtype),
                    f"the input's {expected}",
                    f"Convert it: {name}.to(input.dtype).",
                )
            )
        if vector.device != input.device:
            raise InputError(
                got_expected(
                    name,
                    f"device {vector.device}",
                    f"the input's {input.device}",
                    f"Move it: {name}.to(input.device).",
                )
            )
    check_number(eps)
    return shape  # type: ignore[return-value]  # a symbol is an integer to all that follows


def check_number(eps: Any) -> None:
    """InputError unless PyTorch's layer norm takes it for an eps."""
    if not isinstance(eps, numbers.Real) and not (isinstance(eps, Tensor) and eps.ndim == 0):
        raise InputError(got_expected("eps", repr(eps), "a number"))


def usual(eps: float) -> bool:
    """True for an eps that kernels are checked with; PyTorch takes any, and a row whose variance
    and eps are below zero is NaN to it.
    """
    return isinstance(eps, numbers.Real) and 0 <= eps < math.inf


def check_eps(eps: float) -> None:
    """InputError unless it is a finite number, 0 or more, as operators ask that have nothing but
    kernels.
    """
    if not usual(eps):
        raise InputError(got_expected("eps", repr(eps), "a finite number, 0 or more"))


_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
# what torch.autograd.grad(is_grads_batched=True) sends
_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
_modes = torch._C._len_torch_dispatch_stack
_saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_transforms = torch._C._functorch.get_dynamic_layer_stack_depth
transformed: Callable[[], bool] = constant(lambda: _transforms() > 0)
"""True inside vmap, grad and jvp of compiled code. Dynamo asks while it traces, where these are
under way, and traces again where they change; what is asked here it knows by itself only since
PyTorch 2.13 or so.
"""


_mode = torch._C._get_dispatch_mode
_early_modes: Callable[[], int] = torch._ops._len_torch_dispatch_stack_pre_dispatch
_RECORDERS = (
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
    torch._C._TorchDispatchModeKey.FAKE,
)
_RECORDED = _PLAIN | {FakeTensor, FunctionalTensor}


def recording(*tensors: Tensor) -> bool:
    """True where make_fx, or what is built on it, records a graph or prepares that, no other mode
    watches, and nothing but gradients in reverse is to go through the tensors.
    """
    modes = _modes()
    return (
        modes + _early_modes() > 0
        and modes == sum(_mode(key) is not None for key in _RECORDERS)
        and all(type(t) in _RECORDED and not _legacy_batched(t) for t in tensors)
        and not _forward_ad(*tensors)
    )


def batched(*tensors: Tensor | None) -> bool:
    """True inside vmap or for one of the tensors that is a batch of such, as in gradients of many
    outputs at once.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None or any(
        t is not None and (_wrapped(t) or _legacy_batched(t)) for t in tensors
    )


def kind(vector: Tensor | None, input: Tensor) -> str | None:
    """How a variant's name says what an affine vector is beside its input: None, "same" or
    "float32".
    """
    if vector is None:
        return None
    return "same" if vector.dtype == input.dtype else "float32"


def recorded(*tensors: Tensor | None) -> bool:
    """True when a gradient with respect to one of the tensors may be asked for later."""
    return _grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def plain(*arguments: object) -> bool:
    """True where all that is there are tensors of PyTorch's own two classes, as kernels and custom
    ops take them.
    """
    return all(a is None or type(a) in _PLAIN for a in arguments)


def overridden(*arguments: object) -> bool:
    """True where an argument has a __torch_function__ of its own (torch.fx's proxies, tensor
    subclasses), which takes the call over.
    """
    return not plain(*arguments) and has_torch_function(arguments)


def served(input: Tensor, weight: Tensor | None, bias: Tensor | None, hidden: int) -> bool:
    """True when a kernel could take the call; the rest is PyTorch's."""
    return _modes() == 0 and served_unwatched(input, weight, bias, hidden)


def rebuilt(*tensors: Tensor | None) -> bool:
    """True where a dispatch mode watches a call whose saved tensors go through hooks, as in a
    checkpoint. The call is done again for its backward, perhaps without the mode, and has to save
    now what the kernel's call saves then.
    """
    return _modes() > 0 and recorded(*tensors) and _saving_hooks(True) is not None


def served_unwatched(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, hidden: int
) -> bool:
    """True when a kernel could take the call if no dispatch mode watched it."""
    return (
        devices.of(input.device) is not None
        and input.dtype in NAMES
        and 1 <= hidden <= MAX_HIDDEN
        and plain(input, weight, bias)
        and all(t is None or t.layout is torch.strided for t in (input, weight, bias))
        and not any(
            t is not None and (_wrapped(t) or _legacy_batched(t)) for t in (input, weight, bias)
        )
        and torch._C._functorch.peek_interpreter_stack() is None
        and not _watched()
        and not _forward_ad(input, weight, bias)
    )


def _watched() -> bool:
    """True under a TorchFunctionMode that may want to see the call; torch.device and
    set_default_device only watch factories.
    """
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def _forward_ad(*tensors: Tensor | None) -> bool:
    """True when forward-mode derivatives flow through a tensor, which only PyTorch's own formula
    carries on.
    """
    if _dual_numbers._current_level < 0:
        return False
    return any(t is not None and _dual_numbers.unpack_dual(t).tangent is not None for t in tensors)


def there(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Those that are there."""
    return tuple(t for t in tensors if t is not None)


def lifted(input: Tensor) -> bool:
    """True where autocast has PyTorch's layer norm compute in float32, and give it: on GPUs, not on
    CPUs.
    """
    return input.device.type == "cuda" and input.dtype in _LOW and torch.is_autocast_enabled("cuda")


def native(
    input: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd) of torch.native_layer_norm, whatever the dtypes of the affine vectors; the
    statistics as they come.
    """
    if input.device.type == "cpu" or not mixed(input, weight, bias):
        return torch.native_layer_norm(input, list(shape), *pair(input, shape, weight, bias), eps)
    x, weight, bias = in_float32(input, weight, bias)
    y, mean, rstd = torch.native_layer_norm(x, list(shape), weight, bias, eps)
    return y.to(input.dtype), mean, rstd


def in_float32(
    input: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """All three in float32."""
    return (
        input.float(),
        None if weight is None else weight.float(),
        None if bias is None else bias.float(),
    )


def mixed(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """True where an affine vector is of another dtype than the input, which PyTorch's CUDA kernels
    refuse.
    """
    return any(v is not None and v.dtype != input.dtype for v in (weight, bias))


def pair(
    input: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The affine vectors as PyTorch's CPU kernels take them, both in one dtype: forward refuses a
    mixed pair, and backward a float32 bias without a weight.
    """
    if bias is None or bias.dtype == (input if weight is None else weight).dtype:
        return weight, bias
    return (
        torch.ones(tuple(shape), dtype=torch.float32, device=input.device)
        if weight is None
        else weight.float()
    ), bias.float()
