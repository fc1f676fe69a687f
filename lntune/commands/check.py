"""`lntune check`: the kernels that serve PyTorch calls, checked against float64 as candidates of a
tuning run are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import msgspec

from lntune import backends, check, ops
from lntune import device as device_module
from lntune.backends.backend import Kernel
from lntune.case import Case
from lntune.device import Device
from lntune.log import records
from lntune.log.select import Tier
from lntune.system import paths
from lntune.torch import devices, dispatch, first_check


class Result(msgspec.Struct, frozen=True):
    """The check of one case: what serves it, and whether that is right (see check.Verdict). Where a
    kernel was chosen and cannot be had, it is not, and `missing`; eager mode then serves.
    """

    case: Case
    tier: Tier
    schedule: str
    ok: bool
    message: str
    errors: dict[str, float]
    versus_eager: dict[str, float]
    missing: bool = False


def tuned_cases(op: str, device: Device | None = None) -> list[Case]:
    """The cases tuned on a device, this machine's CPU if none is given, or the operator's default
    grid where there are none.
    """
    grid = ops.get(op).grid
    finals = records.finals(
        records.read(paths.log_dirs(), op, device or device_module.current(), role="final")
    )
    return sorted(r.case for r in finals.values()) or list(grid)


def _verdict(case: Case, device: Device, kernel: Kernel) -> check.Verdict:
    """What the gate says that finalists pass: the thorough check, and on as many rows as the case
    has what eager mode makes of them.
    """
    backend = backends.of(device)
    verdict = backend.verify(case, device, kernel, thoroughly=True)
    if not verdict.ok:
        return verdict
    given = backend.inputs(case, device)[0]
    wrong = backend.compare(case, device, kernel, given)
    return msgspec.structs.replace(verdict, message=wrong)


def asked_of(cases: Sequence[Case]) -> list[Case]:
    """What is checked of cases: each in the variants that PyTorch's calls take."""
    return [
        msgspec.structs.replace(case, variant=variant)
        for case in cases
        for variant in ops.get(case.op).called(case.variant)
    ]


def check_cases(
    cases: Sequence[Case],
    device: Device | None = None,
    on_kernel: Callable[[Case], None] = lambda _: None,
) -> list[Result]:
    """Check what serves each case on a device, this machine's CPU if none is given, as it is loaded
    for PyTorch, with and without saved statistics. What an earlier check found is not believed, and
    what this one finds is kept for calls. `on_kernel` is told each of `asked_of(cases)` before it
    is checked.

    Raises:
        InputError: the GPU is not here.
    """
    import torch

    device = device or device_module.current()
    backend = backends.of(device)
    tensors = [torch.empty(0, device=backend.torch_device(device))]
    dispatch.reload()
    results: list[Result] = []
    reason = ""  # of the last kernel that could not be had; what many share is said once
    with (
        warnings.catch_warnings(record=True) as caught,
        devices.serving(device),
        first_check.anew(),
    ):
        warnings.simplefilter("always", dispatch.UntunedWarning)
        for asked in asked_of(cases):
            on_kernel(asked)
            kernel, choice = (
                dispatch.kernel_for(asked, tensors),
                dispatch.choose(asked, device),
            )
            if kernel is None:
                reason = next(
                    (text for w in caught if dispatch.NO_KERNEL in (text := str(w.message))),
                    reason,
                )
                caught.clear()
                missing = choice.tier != "eager"
                message = reason if missing else "eager mode serves it"
                results.append(Result(asked, "eager", "", not missing, message, {}, {}, missing))
                continue
            try:
                verdict = _verdict(asked, device, kernel)
            except Exception as e:
                verdict = check.Verdict(f"{type(e).__name__}: {e}", {}, {})
            if not verdict.ok:
                first_check.refuse(asked, choice, device, verdict.message)
            results.append(
                Result(
                    asked,
                    choice.tier,
                    choice.schedule,
                    verdict.ok,
                    verdict.message,
                    verdict.errors,
                    verdict.versus_eager,
                )
            )
    return results
