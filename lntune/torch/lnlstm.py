"""One step of an LSTM with layer normalization, as a function of tensors; the matrix products are the caller's.

In inference a direct call of the kernel; with gradients, and for whatever no kernel does, the formula in PyTorch's operators.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from lntune.case import MAX_HIDDEN, Case
from lntune.errors import InputError, got_expected
from lntune.ops.lnlstm_step import NAME, arguments, formula, variant
from lntune.torch import dispatch
from lntune.torch.arguments import NAMES, check_eps, served

_dynamo_compiling = torch.compiler.is_dynamo_compiling

# The arguments of a call, as lntune.direct.Table wants them described, and by the kernels' names.
_SIGNATURE = "tttottoof"
_NAMES = ("gates_x", "gates_h", "c", "weight_x", "weight_h", "weight_c", "bias", "bias_c", "eps")
_direct = {carried: dispatch.Direct(_SIGNATURE, _NAMES) for carried in (False, True)}


def lnlstm_step(
    gates_x: Tensor,  # (batch, 4 * hidden): W_x x[t], or with weight_x None what is added to z as it is
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

    Ba, Kiros, Hinton: *Layer Normalization*, 2016, arXiv:1607.06450, supplement, eqs. 20-22; `bias` is the sum of all vectors that are
    added to z. `weight_x` None: the input's part is already normalized, with its gain (for a whole sequence at once). `carried`:
    the cell is carried normalized, c[t] = LN(...), as in PyTorch's custom_lstms.py and TensorFlow Addons. `per_gate`: each of the
    four gates is normalized by itself, as in TensorFlow's LayerNormBasicLSTMCell (PyTorch's operators serve that).

    Raises:
        InputError: a shape, dtype or eps that does not fit, naming the argument.
        NotTunedError: in strict mode only, see `lntune.strict`.
    """
    if _dynamo_compiling():
        tensors = (gates_x, gates_h, c, weight_x, weight_h, weight_c, bias, bias_c)
        if (
            per_gate
            or torch.is_grad_enabled()
            or len({t.dtype for t in tensors if t is not None}) > 1
            or c.device.type != "cpu"
            or c.dtype not in NAMES
        ):
            return formula(*tensors, eps, carried, per_gate)
        return torch.ops.lntune.lnlstm_step(*tensors, eps, carried)  # type: ignore[no-any-return]
    if not per_gate:
        made = _direct[carried].call(gates_x, gates_h, c, weight_x, weight_h, weight_c, bias, bias_c, eps)
        if made is not None:
            return made  # type: ignore[no-any-return]
    tensors = (gates_x, gates_h, c, weight_x, weight_h, weight_c, bias, bias_c)
    return _any(dict(zip(_NAMES[:-1], tensors, strict=True)), eps, carried, per_gate)


def _any(given: dict[str, Tensor | None], eps: float, carried: bool, per_gate: bool) -> tuple[Tensor, Tensor]:
    """Every call that is not ready to go: checked, and prepared for the next time. `given` has all tensors in the order of the call."""
    c = _check(given, eps)
    there = {name: t for name, t in given.items() if t is not None}
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in there.values()))
    there = {name: t.to(dtype) for name, t in there.items()}
    hidden, rows = c.shape[-1], math.prod(c.shape[:-1])
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in there.values())
    kernel = None
    if rows and not per_gate and not wanted and hidden <= MAX_HIDDEN // 4 and all(served(t, None, None, hidden) for t in there.values()):
        case = Case(NAME, hidden, NAMES[dtype], rows, variant("weight_x" in there, "bias" in there, "bias_c" in there, carried))
        kernel = dispatch.kernel_for(case)
    if kernel is None:
        values: dict[str, Any] = {name: there.get(name) for name in given}
        return formula(**values, eps=eps, carried=carried, per_gate=per_gate)
    plain = {name: t.contiguous().resolve_neg() for name, t in there.items()}
    made = {name: torch.empty(c.shape, dtype=dtype, device=c.device) for name in ("h", "c_new")}
    flat = {name: t.view(-1, t.shape[-1]) if name in ("gates_x", "gates_h", "c", "h", "c_new") else t for name, t in {**plain, **made}.items()}
    kernel(*({**flat, "eps": float(eps)}[a.name] for a in arguments(case)))
    if hidden > 1 and not any(t is not None and (t.dtype != dtype or t.is_neg()) for t in given.values()):
        _direct[carried].remember(case, kernel, (*given.values(), float(eps)))
    return made["h"], made["c_new"]


def _check(given: dict[str, Tensor | None], eps: float) -> Tensor:
    """The cell; InputError, as lnlstm_step's, unless all arguments fit it."""
    for name, t in given.items():
        if t is None and name in ("weight_x", "bias", "bias_c"):
            continue
        if not isinstance(t, Tensor):
            raise InputError(got_expected(name, type(t).__name__, "a torch.Tensor"))
        if t.device.type == "cpu" and not t.is_floating_point():
            raise InputError(got_expected(name, str(t.dtype), "a floating-point dtype", f"Convert it: {name}.float()."))
    c = given["c"]
    assert c is not None
    if not c.ndim or not c.shape[-1]:
        raise InputError(got_expected("c", f"shape {tuple(c.shape)}", "(batch, hidden) with hidden 1 or more"))
    hidden = c.shape[-1]
    for name, t in given.items():
        if t is None:
            continue
        size = hidden if name in ("c", "weight_c", "bias_c") else 4 * hidden
        leading = tuple(c.shape[:-1]) if name in ("gates_x", "gates_h", "c") else ()
        if tuple(t.shape) != (*leading, size):
            raise InputError(got_expected(name, f"shape {tuple(t.shape)}", f"{(*leading, size)} beside a cell of shape {tuple(c.shape)}"))
        if t.device != c.device:
            raise InputError(got_expected(name, f"device {t.device}", f"the cell's {c.device}", f"Move it: {name}.to(c.device)."))
    check_eps(eps)
    return c


@torch.library.custom_op("lntune::lnlstm_step", mutates_args=(), device_types="cpu")
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
) -> tuple[Tensor, Tensor]:
    """What torch.compile puts into a graph in inference: (h, c)."""
    with torch.no_grad():
        h, cell = lnlstm_step(gates_x, gates_h, c, weight_x, weight_h, weight_c, bias, bias_c, eps, carried)
    return h, cell


@lnlstm_step_op.register_fake
def _fake(_gates_x: Tensor, _gates_h: Tensor, c: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(c, memory_format=torch.contiguous_format), torch.empty_like(c, memory_format=torch.contiguous_format)
