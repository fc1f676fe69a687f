"""From the case of a call to the kernel that serves it: the kernel that was chosen for the case is
built or loaded once, and remembered.

`choose`, `reload` and `strict` are those of choices.py and reloading.py.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from lntune import knobs as knobs_module
from lntune import ops
from lntune import schedule as schedule_module
from lntune.bundle import loaded
from lntune.case import Case
from lntune.device import Device
from lntune.errors import BuildError, LntuneError, NotTunedError, ScheduleError
from lntune.log.records import LogWarning
from lntune.log.select import Choice, Tier
from lntune.schedule import Schedule, ScheduleWarning
from lntune.system import callers, paths, trust
from lntune.system.later import Later, passes, root
from lntune.system.sealed import DamagedWarning
from lntune.system.variables import VariableWarning
from lntune.torch import apart, devices, first_check, recording, untuned
from lntune.torch.choices import choose, decide, decide_anew
from lntune.torch.first_check import (
    RecordingError,
    UncheckedError,
    WrongKernelError,
    WrongKernelWarning,
)
from lntune.torch.reloading import LOCK, is_strict, kernels_changed, on_reload, reload, strict
from lntune.torch.untuned import UntunedWarning
from lntune.torch.vector_width import narrowed

with contextlib.suppress(Exception):  # loading a kernel says what is wrong with it
    import tvm_ffi  # noqa: F401  (so that the first call of a kernel does not pay for it)

__all__ = [
    "FILTERED_WARNINGS",
    "Choice",
    "Kernel",
    "UntunedWarning",
    "choose",
    "chose_eager",
    "kernel_for",
    "reload",
    "serve",
    "strict",
]

Kernel = Callable[..., None]
FILTERED_WARNINGS = (
    UntunedWarning,
    LogWarning,
    DamagedWarning,
    paths.CacheWarning,
    trust.TrustWarning,
    VariableWarning,
    ScheduleWarning,
    WrongKernelWarning,
)
"""Warnings that are errors where the user's filters say so, and then reach the user."""
NO_KERNEL = "has no kernel, eager mode serves it"
"""What a warning says of a case whose kernel cannot be built or loaded."""
_Key = tuple[Device, Case, devices.Layout]
_kernels: dict[_Key, Kernel | None] = {}
_retries: dict[_Key, Later] = {}
"""Cases without a kernel because of what may pass, and when each is tried again."""
_decided_on_eager: set[_Key] = set()
"""Cases without a kernel because eager mode was chosen, and not because none could be had."""
_warned: set[tuple[object, ...]] = set()
"""Faults that were warned of."""
_STEPS_DOWN: dict[Tier, str] = {
    "exact": "that record",
    "bucket": "the record of another row bucket",
    "near": "the record of a nearby hidden size",
    "default": "default knobs",
    "eager": "eager mode",
}
"""Tier of a choice -> what serves a case that was not measured, in a warning's words."""


@on_reload
def _forget() -> None:
    _kernels.clear()
    _retries.clear()
    _decided_on_eager.clear()
    _warned.clear()


def kernel_for(case: Case, tensors: Sequence[Tensor] = ()) -> Kernel | None:
    """The kernel that serves a case, built or loaded now if need be; None where eager mode serves
    it.

    `tensors` are those of the call whose rows are hidden (or gates) long. They say on which device,
    the CPU where there are none; where the rows of one do not follow one another in memory, the
    same schedule serves with their distance left open (call the kernel with what devices.matrix
    gives); and where on a GPU one is not aligned to 16 bytes, with narrower accesses.

    Whatever goes wrong on the way to a kernel is warned of once, and eager mode serves; where it is
    a matter of files (a network drive that is away, a disk that is full), it is tried again later.

    Raises:
        NotTunedError: in strict mode, when the case was not measured on this device.
        LntuneError: in strict mode, when the kernel cannot be built.
    """
    device = devices.of_tensors(tensors)
    if device is None or apart.here():  # a check, whose eager mode a user may have replaced by ours
        return None
    key = device, case.typical, devices.layout(device, tensors, case.hidden)
    with LOCK:
        kernel = _kernels.get(key, _undecided)
        if kernel is _undecided:
            kernel = _kernels[key] = _obtain_or_warn(*key)
        elif kernel is None and _retries and key in _retries and _retries[key].due:
            kernel = _kernels[key] = _obtain_or_warn(*key)
            if kernel is not None:  # others have noted that eager mode serves
                kernels_changed()
        return kernel


def chose_eager(case: Case, tensors: Sequence[Tensor] = ()) -> bool:
    """Whether it was chosen that eager mode serves a case, for which kernel_for has no kernel."""
    device = devices.of_tensors(tensors)
    if device is None:
        return False
    return (device, case.typical, devices.layout(device, tensors, case.hidden)) in _decided_on_eager


def served() -> dict[str, str]:
    """What serves each case that calls have met, both in words: schedule, knobs and the versions of
    their code, or eager mode.
    """
    with LOCK:
        return {
            f"{untuned.name(case)} {case.variant}{' strided' if layout.strided else ''}"
            f" on a {device.kind.upper()}": _in_words(choose(case, device), kernel)
            for (device, case, layout), kernel in list(_kernels.items())
        }


def _in_words(choice: Choice, kernel: Kernel | None) -> str:
    if kernel is None or choice.tier == "eager":
        return "eager mode"
    code = schedule_module.code_of(choice.schedule)
    versions = f"version {code.schedule}.{code.op}.{code.lowering}"
    return f"{choice.schedule} ({knobs_module.describe(choice.knobs)}, {versions})"


def _undecided(*_: Any) -> None:
    """What stands for a kernel before it was asked for."""


@contextlib.contextmanager
def serving(kernels: Mapping[Case, Kernel], device: Device) -> Iterator[None]:
    """In the block these kernels serve calls of their cases, named as calls name them, whatever the
    log says: to measure them as a user calls them. For tensors that lie as usual.
    """
    with LOCK:
        before = dict(_kernels)
        _kernels.update({(device, c.typical, devices.Layout()): k for c, k in kernels.items()})
        kernels_changed()
    try:
        yield
    finally:
        with LOCK:
            _kernels.clear()
            _kernels.update(before)
            kernels_changed()


def serve(case: Case, tensors: Sequence[Tensor] = ()) -> Kernel:
    """The kernel that serves a case; where eager mode does, PyTorch's operators behind the kernel's
    arguments. `tensors` as kernel_for's.

    Raises:
        NotTunedError, LntuneError: as kernel_for.
    """
    kernel = kernel_for(case, tensors) or functools.partial(_eager_kernel, case)
    return recording.noted(kernel, case, devices.of_tensors(tensors))


def _eager_kernel(case: Case, *values: Any) -> None:
    """PyTorch's operators, called as a kernel of the case is."""
    arguments = ops.get(case.op).arguments(case)
    named = {a.name: value for a, value in zip(arguments, values, strict=True)}
    results = ops.get(case.op).eager(
        case, {a.name: named[a.name] for a in arguments if a.role in ("in", "scalar")}
    )
    for a in arguments:
        if a.role == "out":
            named[a.name].copy_(results[a.name])
        elif a.role == "sum":
            named[a.name][0] += results[a.name]


def _obtain_or_warn(device: Device, case: Case, layout: devices.Layout) -> Kernel | None:
    """`_obtain`, and None with a warning where it fails."""
    key = device, case, layout
    later = _retries.get(key) or Later()
    try:
        with later.trying():
            kernel = _obtain(*key)
    except RecordingError as e:
        if is_strict():
            raise
        _retries[key] = Later()  # at the next call
        _warn_once(("recording",), f"{untuned.name(case)} is served by eager mode: {e}")
        return None
    except (NotTunedError, *FILTERED_WARNINGS):
        raise
    except Exception as e:
        if is_strict():
            if isinstance(e, LntuneError):
                raise
            raise BuildError(f"{untuned.name(case)} has no kernel: {type(e).__name__}: {e}") from e
        passing, fault = passes(e) or isinstance(e, UncheckedError), root(e)
        if passing:
            _retries[key] = later
        # Once for all cases that have it: their files differ in their names.
        identity = (
            (type(fault), fault.errno)
            if isinstance(fault, OSError) and fault.errno
            else (type(fault), str(fault))
        )
        reason = str(e) if isinstance(e, LntuneError) else f"{type(e).__name__}: {e}"
        retry = " It is tried again later." if passing else ""
        _warn_once(identity, f"{untuned.name(case)} {NO_KERNEL}: {reason}{retry}")
        return None
    _retries.pop(key, None)
    return kernel


def _warn_once(identity: tuple[object, ...], message: str) -> None:
    if identity not in _warned:
        _warned.add(identity)
        callers.warn(message, UntunedWarning)


def _obtain(device: Device, case: Case, layout: devices.Layout) -> Kernel | None:
    """The kernel of what was chosen, None where that is eager mode; of the next choice where a
    schedule fails.
    """
    choice = choose(case, device)
    if is_strict():
        if choice.wrong:
            raise WrongKernelError(f"{untuned.name(case)}: {choice.wrong[0]}")
        for reason in (
            *choice.faults.values(),
            *(one.reason for one in schedule_module.left_out() if one.op in ("", case.op)),
        ):
            raise ScheduleError(reason)
    if not choice.measured:
        _step_down(device, case, choice)
    if choice.tier == "eager":
        _decided_on_eager.add((device, case, layout))
        return None
    # of tensors that are not aligned no bundle has kernels
    if choice.bundle and layout.widest >= devices.ANY:
        return _of_bundle(device, case, layout, choice)
    schedule, setting = schedule_module.resolve(choice.schedule, case.op, choice.knobs)
    try:
        setting = narrowed(setting, schedule, case, device, *layout)
        return None if setting is None else _built(case, schedule, setting, device, layout)
    except ScheduleError as e:  # of the schedule itself: another may do
        if is_strict():
            raise
        decide(case, device, {**choice.faults, schedule.name: str(e)})
    except WrongKernelError:  # was said
        if is_strict():
            raise
        if layout != devices.Layout():  # what serves other calls may be right
            return None
        if not decide_anew(case, device, choice):
            return None
    return _obtain(device, case, layout)


def _of_bundle(device: Device, case: Case, layout: devices.Layout, choice: Choice) -> Kernel | None:
    """The kernel that a bundle has for tensors of a layout; where rows lie apart and it has none
    for them, that for contiguous rows, which is given copies. Where it is found wrong, or cannot be
    loaded, the next choice serves.
    """
    plain, apart_rows = (loaded.find(case, device, strided) for strided in (False, True))
    try:
        if layout.strided and apart_rows is not None and apart_rows.entry.file:
            return first_check.shipped_kernel(apart_rows, device)
        if plain is None or not plain.entry.file:  # the bundle went since
            return None
        kernel = first_check.shipped_kernel(plain, device)
        return functools.partial(_with_copies, kernel) if layout.strided else kernel
    except WrongKernelError:  # was said
        if is_strict():
            raise
        if layout.strided or not decide_anew(case, device, choice):
            return None
    return _obtain(device, case, layout)


def _step_down(device: Device, case: Case, choice: Choice) -> None:
    """Count a case that is not served by a measurement of its own.

    Raises:
        NotTunedError: in strict mode.
    """
    outlived = choice.stale and choice.tier in ("exact", "eager")
    if is_strict():
        state = (
            "was measured on this device before its schedule changed"
            if outlived
            else "was not measured on this device"
        )
        command = untuned.Untuned(case, device, "").command
        raise NotTunedError(
            f"{untuned.name(case)} {state}. Run: {command} (What was looked at:"
            f" {'; '.join(choice.steps)}.)"
        )
    served = f"the bundle {choice.bundle}" if choice.bundle else _STEPS_DOWN[choice.tier]
    untuned.count(case, device, served, outlived)


def _built(
    case: Case, schedule: Schedule, setting: Any, device: Device, layout: devices.Layout
) -> Kernel:
    """The kernel for tensors of a layout, checked."""
    try:
        return first_check.kernel(case, schedule, setting, device, layout.strided)
    except RecordingError:
        raise
    except LntuneError:
        if not layout.strided:
            raise
    # Where nothing can be built, the kernel for contiguous rows may be in the cache.
    plain = first_check.kernel(case, schedule, setting, device)
    return functools.partial(_with_copies, plain)


def _with_copies(kernel: Kernel, *values: Any) -> None:
    """Call a kernel for contiguous rows with tensors of which some are not; what it writes is."""
    kernel(*(v.contiguous() if isinstance(v, Tensor) else v for v in values))
