"""Checks of the arguments of public functions and modules, with errors that name the argument.

A call that fails here would fail in PyTorch too, later and with a message about something else.
"""

from __future__ import annotations

import math
import numbers
import operator
import sys
from typing import Any

import torch
from torch import Tensor

from lntune.errors import InputError, got_expected
from lntune.torch import devices
from lntune.torch.lnlstm_arguments import StepTensors
from lntune.torch.support import is_kernel_eps


def check_layer_norm(
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
    ours = input.device.type in devices.TYPES  # what other devices take is for them to say
    if ours and not input.is_floating_point():
        raise InputError(
            got_expected(
                "input", str(input.dtype), "a floating-point dtype", "Convert it: input.float()."
            )
        )
    # an affine vector may be kept in float32
    allowed = (
        input.dtype,
        torch.float32 if input.itemsize < torch.float32.itemsize else input.dtype,
    )
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is None:
            continue
        if not isinstance(vector, Tensor):
            raise InputError(got_expected(name, type(vector).__name__, "a torch.Tensor or None"))
        if tuple(vector.shape) != shape:
            raise InputError(
                got_expected(name, f"shape {tuple(vector.shape)}", f"normalized_shape {shape}")
            )
        if ours and vector.dtype not in allowed:
            expected = " or ".join(dict.fromkeys(map(str, allowed)))
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
    check_eps(eps)
    return shape  # type: ignore[return-value]  # a symbol is an integer to all that follows


def check_layer_norm_backward(
    dy: Tensor,
    input: Tensor,
    normalized_shape: Any,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[int, ...]:
    """The normalized shape as a tuple of integers.

    Raises:
        InputError: as check_layer_norm, and for a gradient or statistics that do not fit the input.
    """
    shape = check_layer_norm(input, normalized_shape, weight, bias)
    if dy.shape != input.shape:
        raise InputError(
            got_expected(
                "grad_out", f"shape {tuple(dy.shape)}", f"the input's {tuple(input.shape)}"
            )
        )
    rows = math.prod(input.shape[: input.ndim - len(shape)])
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        if statistic.numel() != rows:
            raise InputError(
                got_expected(
                    name,
                    f"shape {tuple(statistic.shape)}",
                    f"one number for each of the {rows} rows",
                )
            )
        if statistic.dtype not in (torch.float32, torch.promote_types(torch.float32, input.dtype)):
            raise InputError(
                got_expected(
                    name, str(statistic.dtype), "torch.float32", f"Convert it: {name}.float()."
                )
            )
    return shape


def check_step(tensors: StepTensors, eps: float) -> None:
    """Check the arguments of an LSTM step, all by the shape and device of the cell.

    Raises:
        InputError: a shape, dtype or device that does not fit, or an eps that is no number, naming
            the argument.
    """
    named = tensors._asdict()
    for name, t in named.items():
        if t is None and name in ("weight_x", "bias", "bias_c"):
            continue
        if not isinstance(t, Tensor):
            raise InputError(got_expected(name, type(t).__name__, "a torch.Tensor"))
        if t.device.type in devices.TYPES and not t.is_floating_point():
            raise InputError(
                got_expected(
                    name, str(t.dtype), "a floating-point dtype", f"Convert it: {name}.float()."
                )
            )
    c = tensors.c
    if not c.ndim or not c.shape[-1]:
        raise InputError(
            got_expected("c", f"shape {tuple(c.shape)}", "(batch, hidden) with hidden 1 or more")
        )
    hidden = c.shape[-1]
    for name, t in named.items():
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
    check_eps(eps)


def check_eps(eps: Any) -> None:
    """InputError unless PyTorch's layer norm takes it for an eps: any real number."""
    if not isinstance(eps, numbers.Real) and not (isinstance(eps, Tensor) and eps.ndim == 0):
        raise InputError(got_expected("eps", repr(eps), "a number"))


def check_kernel_eps(eps: float) -> None:
    """InputError unless it is a finite number, 0 or more, as operators ask that have nothing but
    kernels.
    """
    if not is_kernel_eps(eps):
        raise InputError(got_expected("eps", repr(eps), "a finite number, 0 or more"))


def check_like(name: str, tensor: Tensor, parameter: Tensor) -> None:
    """InputError unless a module's argument has the device and dtype of its parameters; autocast
    takes other floating-point dtypes.
    """
    if tensor.device != parameter.device:
        raise InputError(
            got_expected(
                name,
                f"device {tensor.device}",
                f"the parameters' {parameter.device}",
                f"Move it: {name}.to(...).",
            )
        )
    if tensor.dtype != parameter.dtype and not (
        tensor.is_floating_point() and torch.is_autocast_enabled(tensor.device.type)
    ):
        raise InputError(
            got_expected(
                name,
                str(tensor.dtype),
                f"the parameters' {parameter.dtype}",
                f"Convert it: {name}.to({parameter.dtype}).",
            )
        )


def checked_count(name: str, value: Any) -> int:
    """An integer of whatever kind (NumPy's too), 1 or more, as Python's; InputError otherwise."""
    if (
        not hasattr(value, "__index__")
        or isinstance(value, (bool, Tensor))
        or (count := operator.index(value)) < 1
    ):
        raise InputError(got_expected(name, repr(value), "an integer, 1 or more"))
    return count


def checked_flag(name: str, value: Any) -> bool:
    """A truth value, Python's or NumPy's, as Python's; InputError otherwise."""
    numpy = sys.modules.get("numpy")  # which PyTorch does without
    if not isinstance(value, bool) and not (numpy and isinstance(value, numpy.bool_)):
        raise InputError(got_expected(name, repr(value), "True or False"))
    return bool(value)


def checked_number(name: str, value: Any, low: float, high: float, expected: str) -> float:
    """A finite number within `low` to `high` as Python's float; InputError, which says what was
    `expected`, otherwise.
    """
    if (
        not isinstance(value, numbers.Real)
        or isinstance(value, bool)
        or not math.isfinite(value)
        or not low <= float(value) <= high
    ):
        raise InputError(got_expected(name, repr(value), expected))
    return float(value)
