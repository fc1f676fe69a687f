"""The gradients of an LN-LSTM step, on a kernel or by its formula."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lntune.case import Case
from lntune.errors import InputError, got_expected
from lntune.ops import lnlstm_step_backward as op
from lntune.ops.lnlstm_step import TENSORS, statistics, tokens_of, variant
from lntune.torch import devices, dispatch
from lntune.torch.arguments import NAMES

Given = dict[str, Tensor]

# The arguments of a call, as lntune.kernels.direct.Table wants them described, and by the kernels'
# names.
_SUMS = tuple(op.sums(("raw", "bias", "bias_c")))
_NAMES = ("dh", "dc_new", *TENSORS, *statistics(("raw",)), *_SUMS)
_SIGNATURE = "".join(
    (
        "o"
        if name
        in (
            "weight_x",
            "bias",
            "bias_c",
            "mean_x",
            "rstd_x",
            "dweight_x",
            "dbias",
            "dbias_c",
        )
        else "t"
    )
    for name in _NAMES
)
_direct = {carried: dispatch.Direct(_SIGNATURE, _NAMES) for carried in (False, True)}


def case_of(name: str, given: Given, rows: int, carried: bool, stats: bool = False) -> Case:
    """The case of the step, forward or backward by `name`, for the forward's tensors that are
    there.
    """
    c = given["c"]
    return Case(
        name,
        c.shape[-1],
        NAMES[c.dtype],
        rows,
        variant("weight_x" in given, "bias" in given, "bias_c" in given, carried, stats),
    )


def cores(place: torch.device) -> int:
    """Cores of the device behind `place`, which decide how many blocks of rows keep sums of their
    own.

    Raises:
        InputError: kernels do not run there.
    """
    if (device := devices.of(place)) is None:
        raise InputError(
            got_expected(
                "device", place, "a device that kernels run on", "`lntune doctor` tells which do."
            )
        )
    return device.cores


def zero_sums(case: Case, like: Tensor) -> Given:
    """What the kernels of `case` add the gradients of gains and biases to."""
    blocks = case.blocks(cores(like.device))
    return {
        a.name: torch.zeros(
            a.sizes(case.rows, case.hidden, blocks), dtype=torch.float32, device=like.device
        )
        for a in op.arguments(case)
        if a.role == "sum"
    }


def matrices(dh: Tensor, dc_new: Tensor, given: Given) -> tuple[Tensor, ...]:
    """The tensors whose last axis is hidden or gates."""
    return dh, dc_new, *given.values()


def accumulate(
    dh: Tensor, dc_new: Tensor, given: Given, stats: Sequence[Tensor], carried: bool, sums: Given
) -> tuple[Tensor, Tensor, Tensor]:
    """dgates_x, dgates_h and dc; the gradients of gains and biases are added to `sums`, see
    zero_sums.

    `given` are the forward's tensors that are there, of one dtype, matrices (rows, ...) as
    devices.matrix gives them, as dh and dc_new are; `stats` are as many (rows,) as
    ops.lnlstm_step.statistics names.
    """
    moments = (None, None, *stats) if "weight_x" not in given else stats
    call = (dh, dc_new, *map(given.get, TENSORS), *moments, *map(sums.get, _SUMS))
    made = _direct[carried].call(*call)
    if made is not None:
        return made  # type: ignore[no-any-return]
    case = case_of(op.NAME, given, given["c"].shape[0], carried)
    new = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)
    outputs = new(given["gates_x"]), new(given["gates_h"]), new(given["c"])
    if case.rows:
        values = {
            **dict(zip(_NAMES, call, strict=True)),
            **dict(zip(("dgates_x", "dgates_h", "dc"), outputs, strict=True)),
        }
        wide = matrices(dh, dc_new, given)
        dispatch.serve(case, wide)(*(values[a.name] for a in op.arguments(case)))
        if kernel := dispatch.kernel_for(case, wide):
            _direct[carried].remember(case, kernel, call)
    return outputs


def step_backward(
    dh: Tensor, dc_new: Tensor, given: Given, stats: Sequence[Tensor], carried: bool
) -> Given:
    """All gradients of one step, by the names of the forward's tensors and in their dtypes;
    arguments as accumulate's.
    """
    sums = zero_sums(case_of(op.NAME, given, given["c"].shape[0], carried), dh)
    made = dict(
        zip(
            ("gates_x", "gates_h", "c"),
            accumulate(dh, dc_new, given, stats, carried, sums),
            strict=True,
        )
    )
    return made | {
        name.removeprefix("d"): t.sum(0).to(given[name.removeprefix("d")].dtype)
        for name, t in sums.items()
    }


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
        made = function(*own)
        sources: list[Any] = [t for t, want in zip(own, wanted, strict=True) if want]
        found = iter(
            torch.autograd.grad(made, sources, grads, create_graph=True, allow_unused=True)
        )
    return tuple(next(found) if want else None for want in wanted)


def bound_call(case: Case, inputs: Mapping[str, Any]) -> Callable[[], Any]:
    """accumulate bound to the operator's named inputs, see `Op.binding`."""
    tokens = tokens_of(case)
    tensors = {name: inputs[name] for name in TENSORS if name in inputs}
    stats = tuple(inputs[name] for name in statistics(tokens))
    sums = {name: inputs[name] for name in op.sums(tokens)}
    dh, dc_new, carried = inputs["dh"], inputs["dc_new"], "carried" in tokens
    return lambda: accumulate(dh, dc_new, tensors, stats, carried, sums)
