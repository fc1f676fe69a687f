"""Kernels bound to a case's tensors: calls without arguments, ready to be timed."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from lntune import backends, ops
from lntune.backends.backend import Call, Kernel
from lntune.case import Case
from lntune.device import Device
from lntune.errors import LntuneError, gist
from lntune.kernels import direct


def bind(
    case: Case,
    kernel: Kernel,
    copies: Sequence[Mapping[str, Any]],
    allocate: bool,
    directly: bool = True,
) -> list[Call]:
    """The kernel bound to each of several copies of a case's named inputs; with `allocate` as
    direct calls, which make their outputs as PyTorch does. Where the price of a call from Python
    does not count (see Backend.calls_directly), outputs may be made in Python if need be.

    Raises:
        LntuneError: direct calls cannot be made here, and have to be.
    """
    if not allocate:
        return [
            functools.partial(kernel, *_arguments(case, given, _outputs(case, given)))
            for given in copies
        ]
    if (calls := _direct(case, kernel, copies)) is not None:
        return calls
    if directly:
        raise LntuneError(
            f"a direct call of {case.op} {case.variant} was refused; its inputs are of a kind that"
            " direct calls do not take."
        )
    return [functools.partial(_allocating, case, kernel, given) for given in copies]


def compiled(
    case: Case, copies: Sequence[Mapping[str, Any]], device: Device
) -> tuple[list[Call], str]:
    """Eager's call (or what the operator has for it) through torch.compile, bound to each of
    several copies of a case's inputs, with these as arguments: constants would be folded in. And
    why there is none, on a line, or the empty string: it needs more than is on every machine (a C
    compiler, Python's headers).
    """
    import torch

    op, backend = ops.get(case.op), backends.of(device)
    make = op.compiled or functools.partial(backend.baseline, device)
    names = [n for n, v in copies[0].items() if isinstance(v, torch.Tensor)]

    def call(*tensors: Any) -> Any:
        return make(case, {**copies[0], **dict(zip(names, tensors, strict=True))})()

    torch._dynamo.reset()
    function = torch.compile(call, dynamic=False, fullgraph=True)
    calls = [functools.partial(function, *(given[n] for n in names)) for given in copies]
    return list(calls), refusal(calls[0])


def refusal(call: Call) -> str:
    """Why a contender does not take the case, on a line, or the empty string: some refuse long
    rows, others the GPU or the machine.
    """
    try:
        call()
    except Exception as e:  # theirs, of whatever kind
        return f"{type(e).__name__}: {gist(e)}"
    return ""


def _direct(case: Case, kernel: Kernel, copies: Sequence[Mapping[str, Any]]) -> list[Call] | None:
    """Direct calls; None where they are refused."""
    import torch

    arguments = ops.get(case.op).arguments(case)
    inputs = [a for a in arguments if a.role != "out"]
    calls = [[given[a.name] for a in inputs] for given in copies]
    table = direct.Table("".join("f" if a.role == "scalar" else "t" for a in inputs))
    bits = case.rows.bit_length()
    table.remember(kernel, arguments, [a.name for a in inputs], (bits, bits), calls[0], case)
    with torch.inference_mode():
        refused = table.call(*calls[0]) is None
    return None if refused else [functools.partial(table.call, *call) for call in calls]


def _allocating(case: Case, kernel: Kernel, given: Mapping[str, Any]) -> dict[str, Any]:
    """One call that makes its outputs in Python, and returns them."""
    outputs = _outputs(case, given)
    kernel(*_arguments(case, given, outputs))
    return outputs


def _arguments(case: Case, given: Mapping[str, Any], outputs: Mapping[str, Any]) -> list[Any]:
    """The kernel's arguments in order."""
    return [
        outputs[a.name] if a.role == "out" else given[a.name]
        for a in ops.get(case.op).arguments(case)
    ]


def _outputs(case: Case, given: Mapping[str, Any]) -> dict[str, Any]:
    """New tensors for what the kernel writes, on the inputs' device."""
    import torch

    return {
        a.name: torch.empty(
            a.sizes(case.rows, case.hidden), dtype=getattr(torch, a.dtype), device=_device(given)
        )
        for a in ops.get(case.op).arguments(case)
        if a.role == "out"
    }


def _device(given: Mapping[str, Any]) -> Any:
    """PyTorch's device of a case's inputs."""
    import torch

    return next(v.device for v in given.values() if isinstance(v, torch.Tensor))
