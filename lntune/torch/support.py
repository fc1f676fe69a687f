"""Whether kernels can take a call of PyTorch's, and why not where PyTorch has to serve it.

What is asked here is about the call alone: its tensors, what watches it, what is recorded of it.
Which kernel then serves the case, or that eager mode measured faster, is dispatch's to decide.

The reason of each call that is left to PyTorch is logged (logger "lntune", level DEBUG).
"""

from __future__ import annotations

import functools
import logging
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.overrides import _get_current_function_mode_stack, has_torch_function
from torch.utils._device import DeviceContext

from lntune.case import DTYPES, MAX_HIDDEN
from lntune.system import callers
from lntune.torch import devices
from lntune.torch.constants import constant
from lntune.torch.reloading import on_reload

DTYPE_NAMES = {getattr(torch, name): name for name in DTYPES}
"""dtypes kernels exist for, with their names in a Case."""

_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_log = logging.getLogger("lntune")
_logged: set[tuple[str, str, str, int]] = set()
on_reload(_logged.clear)


@dataclass(frozen=True, slots=True)
class Support:
    """Whether kernels can take a call: true, or false with the reason, a part of a sentence."""

    reason: str = ""

    @classmethod
    def no(cls, reason: str) -> Support:
        """No kernel takes the call, for this reason."""
        return cls(reason)

    def __bool__(self) -> bool:
        return not self.reason


YES = Support()
"""Kernels can take the call."""

_WATCHED = Support.no("a dispatch mode watches the call")
_SPARSE = Support.no("a tensor is not strided")
_BATCHED = Support.no("the call is transformed by torch.func or a tensor is a batch of vmap")
_FUNCTION_MODE = Support.no("a TorchFunctionMode watches the call")
_FORWARD_AD = Support.no("forward-mode derivatives flow through a tensor")
_DEVICES = Support.no("its tensors are on several devices")
NO_ROWS = Support.no("it has no rows")
OVERRIDDEN = Support.no("an argument has a __torch_function__ of its own")
TRACED = Support.no("the call is traced or its input is nested, so that sizes are not known")
PER_GATE = Support.no("per_gate is served by PyTorch's operators")

_functorch_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
# what torch.autograd.grad(is_grads_batched=True) sends
_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
_dispatch_modes = torch._C._len_torch_dispatch_stack
_dispatch_mode = torch._C._get_dispatch_mode
_early_modes: Callable[[], int] = torch._ops._len_torch_dispatch_stack_pre_dispatch
_saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_transforms = torch._C._functorch.get_dynamic_layer_stack_depth
_dual_numbers = torch.autograd.forward_ad
_grad_enabled = torch.is_grad_enabled
in_transform: Callable[[], bool] = constant(lambda: _transforms() > 0)
"""True inside vmap, grad and jvp of compiled code. Dynamo asks while it traces, where these are
under way, and traces again where they change; what is asked here it knows by itself only since
PyTorch 2.13 or so.
"""

_RECORDERS = (
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
    torch._C._TorchDispatchModeKey.FAKE,
)
_RECORDED = _PLAIN | {FakeTensor, FunctionalTensor}


def kernel_support(
    tensors: Sequence[Tensor], hidden: int, eps: float = 0.0, watched: bool = False
) -> Support:
    """Whether kernels can take a call with these tensors, the input first, whose rows are of
    `hidden` elements. `watched`: as if no dispatch mode watched it.
    """
    input = tensors[0]
    if not watched and _dispatch_modes() > 0:
        return _WATCHED
    device = input.device
    for t in tensors:
        if type(t) not in _PLAIN:  # such as fake tensors, whose sizes may be symbols
            return Support.no(f"an argument is of the class {type(t).__name__}")
        if t.dtype not in DTYPE_NAMES or not 1 <= hidden <= MAX_HIDDEN:
            return size_support(t.dtype, hidden)
        if t.layout is not torch.strided:
            return _SPARSE
        if t is not input and t.device != device:
            return _DEVICES
        if _functorch_wrapped(t) or _legacy_batched(t):
            return _BATCHED
    if devices.of(device) is None:
        return Support.no(f"kernels do not run on {device}")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return _BATCHED
    if _in_function_mode():
        return _FUNCTION_MODE
    if _in_forward_ad(tensors):
        return _FORWARD_AD
    return YES if is_kernel_eps(eps) else Support.no(f"eps {eps} is not a finite number, 0 or more")


@functools.lru_cache(maxsize=256)
def size_support(dtype: object, hidden: int) -> Support:
    """Whether there are kernels for a dtype, a torch.dtype or its name, and for rows of `hidden`
    elements.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        return Support.no(f"{name} is not built")
    if hidden > MAX_HIDDEN:
        return Support.no(f"hidden {hidden}, above {MAX_HIDDEN}, is not built")
    return YES if hidden >= 1 else Support.no("rows of no elements are not built")


def is_kernel_eps(eps: float) -> bool:
    """True for an eps that kernels are checked with: a finite number, 0 or more. PyTorch takes any,
    and a row whose variance and eps are below zero is NaN to it.
    """
    return isinstance(eps, numbers.Real) and 0 <= eps < math.inf


def log_unsupported(name: str, support: Support) -> None:
    """Log that PyTorch serves a call of `lntune.<name>` at the user's line, and why: at level
    DEBUG, once for each line and reason until `lntune.reload()`.
    """
    if _log.isEnabledFor(logging.DEBUG):
        line = callers.place()
        key = (name, support.reason, line.file, line.line)
        if key not in _logged:
            _logged.add(key)
            _log.debug(
                "PyTorch serves lntune.%s at %s:%d: %s",
                name,
                line.file,
                line.line,
                support.reason,
            )


def graph_recording(*tensors: Tensor) -> bool:
    """True where make_fx, or what is built on it, records a graph or prepares that, no other mode
    watches, and nothing but gradients in reverse is to go through the tensors.
    """
    modes = _dispatch_modes()
    return (
        modes + _early_modes() > 0
        and modes == sum(_dispatch_mode(key) is not None for key in _RECORDERS)
        and all(type(t) in _RECORDED and not _legacy_batched(t) for t in tensors)
        and not _in_forward_ad(tensors)
    )


def is_batched(*tensors: Tensor | None) -> bool:
    """True inside vmap or for one of the tensors that is a batch of such, as in gradients of many
    outputs at once.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None or any(
        t is not None and (_functorch_wrapped(t) or _legacy_batched(t)) for t in tensors
    )


def is_checkpointed(*tensors: Tensor | None) -> bool:
    """True where a dispatch mode watches a call whose saved tensors go through hooks, as in a
    checkpoint. The call is done again for its backward, perhaps without the mode, and has to save
    now what the kernel's call saves then.
    """
    return _dispatch_modes() > 0 and needs_gradients(*tensors) and _saving_hooks(True) is not None


def needs_gradients(*tensors: Tensor | None) -> bool:
    """True when a gradient with respect to one of the tensors may be asked for later."""
    return _grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


exporting: Callable[[], bool] = constant(lambda: bool(torch.compiler.is_exporting()))
"""True while torch.export writes a program, which runs where lntune is not. Asked of PyTorch when
code is traced: what dynamo of PyTorch 2.11 puts in the place of its function is true in
torch.compile, too.
"""


def are_plain(*arguments: object) -> bool:
    """True where all that are not None are tensors of PyTorch's own two classes, as kernels and
    custom ops take them.
    """
    return all(a is None or type(a) in _PLAIN for a in arguments)


def is_overridden(*arguments: object) -> bool:
    """True where an argument has a __torch_function__ of its own (torch.fx's proxies, tensor
    subclasses), which takes the call over.
    """
    return not are_plain(*arguments) and has_torch_function(arguments)


def present(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Those that are not None."""
    return tuple(t for t in tensors if t is not None)


def affine_kind(vector: Tensor | None, input: Tensor) -> str | None:
    """How a variant's name says what an affine vector is beside its input: None, "same" or
    "float32".
    """
    if vector is None:
        return None
    return "same" if vector.dtype == input.dtype else "float32"


def _in_function_mode() -> bool:
    """True under a TorchFunctionMode that may want to see the call; torch.device and
    set_default_device only watch factories.
    """
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def _in_forward_ad(tensors: Sequence[Tensor]) -> bool:
    """True when forward-mode derivatives flow through a tensor, which only PyTorch's own formula
    carries on.
    """
    if _dual_numbers._current_level < 0:
        return False
    return any(_dual_numbers.unpack_dual(t).tangent is not None for t in tensors)
