"""`lntune build`: the kernels that will serve calls, put into the cache beforehand; for devices
that need not be here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from lntune import backends, knobs, ops, schedule
from lntune.case import Case
from lntune.device import Device
from lntune.errors import BuildError, LntuneError
from lntune.kernels import cache, direct, verdicts
from lntune.log.select import Tier
from lntune.schedule import Schedule
from lntune.torch import choices, dispatch, first_check, layer_norm_node
from lntune.torch import devices as placed
from lntune.torch.vector_width import narrowed


class Built(msgspec.Struct, frozen=True):
    """One kernel, its rows being those that stand for their bucket. `status` is "built", "there"
    (it lay in the cache), "eager" (eager mode serves the case) or "failed", with the reason in
    `message`; `path` is the file, empty where there is none. `checked`: it was found right on this
    machine, now or before, and the calls that it serves need not do that. `wrong`: what would have
    served before it, and was found wrong.
    """

    case: Case
    device: str
    arch: str
    tier: Tier | Literal[""]
    schedule: str
    knobs: dict[str, knobs.Value]
    strided: bool
    status: Literal["built", "there", "eager", "failed"]
    path: str = ""
    bytes: int = 0
    message: str = ""
    checked: bool = False
    wrong: tuple[str, ...] = ()


def kernels(cases: Sequence[Case]) -> list[Case]:
    """The kernels that serve cases: one for each row bucket, and the variants that PyTorch calls
    most where none is given.
    """
    served = (
        msgspec.structs.replace(case.typical, variant=variant)
        for case in cases
        for variant in ops.get(case.op).called(case.variant)
    )
    return list(dict.fromkeys(served))


def build_case(
    case: Case, device: Device, archs: tuple[str, ...] = (), strided: bool = False
) -> Built:
    """Build what serves a case on a device, by the tuning logs as they are, unless it is in the
    cache, and check it where the device is here. In the place of one that is wrong the next choice
    is built; of one for rows that lie apart that for contiguous rows, which is given copies.

    `archs` are architectures whose code a GPU's file holds beside that of the device's own;
    `strided`: the kernel for matrices whose rows lie apart, instead of the one for contiguous rows.
    """
    apart, wrong = strided, tuple[str, ...]()
    while True:
        result = Built(case, device.name, device.isa, "", "", {}, apart, "failed", wrong=wrong)
        try:
            choice = dispatch.choose(case, device)
            result = msgspec.structs.replace(
                result,
                tier=choice.tier,
                schedule=choice.schedule,
                knobs=dict(choice.knobs),
                wrong=(*choice.wrong, *wrong),
            )
            if choice.tier == "eager":
                return msgspec.structs.replace(result, status="eager")
            return _made(result, device, archs)
        except first_check.WrongKernelError as e:
            if apart:
                apart, wrong = False, (*wrong, str(e))
            elif choices.decide_anew(case, device, choice):
                apart = strided
            else:
                return msgspec.structs.replace(result, message=_reason(e))
        except Exception as e:
            return msgspec.structs.replace(result, message=_reason(e))


def build_chosen(chosen: Built, device: Device, archs: tuple[str, ...] = ()) -> Built:
    """Build what is chosen: a case, a schedule and its knobs; arguments else as build_case's."""
    try:
        return _made(chosen, device, archs)
    except Exception as e:
        return msgspec.structs.replace(chosen, message=_reason(e))


def _made(chosen: Built, device: Device, archs: tuple[str, ...]) -> Built:
    case, strided = chosen.case, chosen.strided
    plan, setting = schedule.resolve(chosen.schedule, case.op, chosen.knobs)
    if strided:
        setting = narrowed(setting, plan, case, device, placed.ANY, strided) or setting
    cached = cache.built(case, plan, setting, device, archs, strided)
    path = cache.prepare(case, plan, setting, device, archs, strided)
    size = path.stat().st_size
    checked = _checked(case, plan, setting, device, strided)
    return msgspec.structs.replace(
        chosen,
        status="there" if cached else "built",
        path=str(path),
        bytes=size,
        checked=checked,
    )


def _checked(case: Case, plan: Schedule, setting: Any, device: Device, strided: bool) -> bool:
    """Check a kernel as its first call would; false where its device is not here.

    Raises:
        WrongKernelError: it is wrong.
    """
    if not verdicts.enabled() or not backends.of(device).machine(device):
        return False
    try:
        first_check.kernel(case, plan, setting, device, strided)
    except first_check.UncheckedError:  # its first call does
        return False
    return True


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, LntuneError) else f"{type(error).__name__}: {error}"


def build(
    cases: Sequence[Case],
    devices: Sequence[Device],
    archs: tuple[str, ...] = (),
    strided: bool = False,
    on_kernel: Callable[[int, int, Case, Device], None] = lambda *_: None,
) -> list[Built]:
    """Build `kernels(cases)` for each of the devices, and what loads and calls them, which takes a
    C compiler. `on_kernel` is told number, how many, case and device before each.

    Raises:
        ToolchainError, BuildError: there is no C compiler, or it fails.
    """
    ensure_libraries(devices)
    needed = kernels(cases)
    todo = [(case, device) for device in devices for case in needed]
    results = []
    for number, (case, device) in enumerate(todo):
        on_kernel(number, len(todo), case, device)
        several = archs if backends.of(device).multi_arch else ()
        results.append(build_case(case, device, several, strided))
    return results


def ensure_libraries(devices: Sequence[Device]) -> None:
    """Compile what loads and calls the kernels of devices, where it is not there yet.

    Raises:
        ToolchainError, BuildError: there is no C compiler, or it fails.
    """
    try:
        for backend in {backends.of(device) for device in devices}:
            backend.ensure_library()
        direct.ensure_library()
    except LntuneError:
        raise
    except Exception as e:
        raise BuildError(
            f"what loads kernels cannot be built: {_reason(e)}. See lntune doctor."
        ) from e
    if any(backends.of(device).node for device in devices):
        # an older compiler: autograd.Function serves, as `lntune doctor` says
        with contextlib.suppress(Exception):
            layer_norm_node.ensure_library()


def folder(results: Sequence[Built]) -> Path | None:
    """The cache's folder that the files lie in."""
    return next((Path(result.path).parents[2] for result in results if result.path), None)
