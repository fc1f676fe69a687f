"""The gradients of a step of an LSTM with layer normalization, by a kernel or by its formula."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lntune.case import Case
from lntune.device import Device
from lntune.errors import InputError, got_expected
from lntune.ops import lnlstm_step_backward as op
from lntune.ops.lnlstm_step import TENSORS, statistics, tokens_of, variant
from lntune.torch import devices, dispatch
from lntune.torch.direct_calls import Direct
from lntune.torch.lnlstm_arguments import StepTensors
from lntune.torch.support import DTYPE_NAMES

Sums = dict[str, Tensor]
"""What kernels add gradients of gains and biases to, by the names of the kernels' arguments."""

# The arguments of a call, as lntune.kernels.direct.Table wants them described, and by the kernels'
# names.
_SUMS = tuple(op.sums(("raw", "bias", "bias_c")))
_NAMES = ("dh", "dc_new", *TENSORS, *statistics(("raw",)), *_SUMS)
_OPTIONAL = ("weight_x", "bias", "bias_c", "mean_x", "rstd_x", "dweight_x", "dbias", "dbias_c")
_SIGNATURE = "".join("o" if name in _OPTIONAL else "t" for name in _NAMES)
_direct = {normalized_cell: Direct(_SIGNATURE, _NAMES) for normalized_cell in (False, True)}


def case_of(
    name: str,
    tensors: StepTensors,
    rows: int,
    normalized_cell: bool,
    with_statistics: bool = False,
) -> Case:
    """The case of a step, forward or backward by `name`, of so many rows."""
    return Case(
        name,
        tensors.c.shape[-1],
        DTYPE_NAMES[tensors.c.dtype],
        rows,
        variant(
            tensors.weight_x is not None,
            tensors.bias is not None,
            tensors.bias_c is not None,
            normalized_cell,
            with_statistics,
        ),
    )


def device_of(torch_device: torch.device) -> Device:
    """The device behind one of PyTorch's, which decides how many blocks of rows keep sums of their
    own.

    Raises:
        InputError: kernels do not run there.
    """
    if (device := devices.of(torch_device)) is None:
        raise InputError(
            got_expected(
                "device",
                torch_device,
                "a device that kernels run on",
                "`lntune doctor` tells which do.",
            )
        )
    return device


def zero_sums(case: Case, like: Tensor) -> Sums:
    """What the kernels of `case` add the gradients of gains and biases to: float32, (blocks of
    rows, hidden or 4 * hidden), on the device of `like`.
    """
    blocks = case.blocks(device_of(like.device))
    return {
        a.name: torch.zeros(
            a.sizes(case.rows, case.hidden, blocks), dtype=torch.float32, device=like.device
        )
        for a in op.arguments(case)
        if a.role == "sum"
    }


def accumulate(
    dh: Tensor,
    dc_new: Tensor,
    tensors: StepTensors,
    step_statistics: Sequence[Tensor],
    normalized_cell: bool,
    sums: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """dgates_x, dgates_h and dc of one step; the gradients of gains and biases are added to `sums`,
    see zero_sums.

    Args:
        dh: (rows, hidden), gradient of h; as devices.matrix gives it, like all other matrices.
        dc_new: (rows, hidden), gradient of the new cell.
        tensors: the forward's, of one dtype.
        step_statistics: as many (rows,) in float32 as ops.lnlstm_step.statistics names.
        normalized_cell: whether the new cell is the normalized one.
        sums: float32, by name.
    """
    # hooks that pack what is kept for a backward may give it back in another layout
    step_statistics = [t.contiguous() for t in step_statistics]
    moments = (None, None, *step_statistics) if tensors.weight_x is None else step_statistics
    call = (dh, dc_new, *tensors, *moments, *map(sums.get, _SUMS))
    direct = _direct[normalized_cell]
    outputs: tuple[Tensor, Tensor, Tensor] | None = direct.call(*call)
    if outputs is not None:
        return outputs
    case = case_of(op.NAME, tensors, tensors.c.shape[0], normalized_cell)
    new = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)
    outputs = new(tensors.gates_x), new(tensors.gates_h), new(tensors.c)
    if case.rows:
        values = {
            **dict(zip(_NAMES, call, strict=True)),
            **dict(zip(("dgates_x", "dgates_h", "dc"), outputs, strict=True)),
        }
        inputs = dh, dc_new, *tensors.present().values()
        dispatch.serve(case, inputs)(*(values[a.name] for a in op.arguments(case)))
        if kernel := dispatch.kernel_for(case, inputs):
            direct.remember(case, kernel, call)
    return outputs


def step_backward(
    dh: Tensor,
    dc_new: Tensor,
    tensors: StepTensors,
    step_statistics: Sequence[Tensor],
    normalized_cell: bool,
) -> dict[str, Tensor]:
    """All gradients of one step, by the names of the forward's tensors and in their dtypes;
    arguments as accumulate's.
    """
    sums = zero_sums(case_of(op.NAME, tensors, tensors.c.shape[0], normalized_cell), dh)
    grads = dict(
        zip(
            ("gates_x", "gates_h", "c"),
            accumulate(dh, dc_new, tensors, step_statistics, normalized_cell, sums),
            strict=True,
        )
    )
    named = tensors.present()
    for name, total in sums.items():
        of = name.removeprefix("d")
        grads[of] = total.sum(0).to(named[of].dtype)
    return grads


def recorded_backward(
    function: Callable[..., tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    grads: tuple[Tensor, ...],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of function(*tensors), those that are wanted, made by autograd so that they can
    be differentiated again.

    Each is that of its own argument alone: the tensors are what autograd has of them, so one may be
    made of another (the gates of h of the weights that made h), and what a gradient owes to that
    way is added where it leads.
    """
    with torch.enable_grad():
        own = [None if t is None else t.view_as(t) for t in tensors]
        outputs = function(*own)
        sources: list[Any] = [t for t, want in zip(own, wanted, strict=True) if want]
        computed = iter(
            torch.autograd.grad(outputs, sources, grads, create_graph=True, allow_unused=True)
        )
    return tuple(next(computed) if want else None for want in wanted)


def bound_call(case: Case, inputs: Mapping[str, Any]) -> Callable[[], Any]:
    """accumulate bound to the operator's named inputs, see `Op.binding`."""
    tokens = tokens_of(case)
    tensors = StepTensors(*map(inputs.get, TENSORS))  # type: ignore[arg-type]
    moments = tuple(inputs[name] for name in statistics(tokens))
    sums = {name: inputs[name] for name in op.sums(tokens)}
    dh, dc_new, carried = inputs["dh"], inputs["dc_new"], "carried" in tokens
    return lambda: accumulate(dh, dc_new, tensors, moments, carried, sums)
