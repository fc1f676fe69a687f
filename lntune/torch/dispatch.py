"""From a call to a kernel: decide once per (device, operator, hidden size, dtype, row bucket),
build or load once, remember.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from torch import Tensor

from lntune import device as device_module
from lntune import ops, schedule
from lntune.case import BUCKETS, Case
from lntune.device import Device
from lntune.errors import BuildError, LntuneError, LogError, NotTunedError, ScheduleError
from lntune.kernels import cache
from lntune.kernels.direct import Table
from lntune.log import records
from lntune.log.records import LogWarning, Record
from lntune.log.select import Choice, select
from lntune.schedule import ScheduleWarning
from lntune.system import callers, paths
from lntune.system.later import Later, passes, root
from lntune.system.sealed import DamagedWarning
from lntune.torch import devices, untuned
from lntune.torch.narrow import narrowed
from lntune.torch.untuned import UntunedWarning

with contextlib.suppress(Exception):  # what is wrong with it is said when a kernel is loaded
    import tvm_ffi  # noqa: F401  (so that the first call of a kernel does not pay for it)

__all__ = [
    "Direct",
    "Kernel",
    "UntunedWarning",
    "choose",
    "kernel_for",
    "on_reload",
    "reload",
    "serve",
    "strict",
]

Kernel = Callable[..., None]


_lock = threading.RLock()
# A process forks only between two decisions: a child that inherits the lock shut by another thread
# would wait for ever.
os.register_at_fork(
    before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
)
_records: dict[tuple[Device, str], list[Record]] = {}
_choices: dict[tuple[Device, Case], Choice] = {}
_kernels: dict[tuple[Device, Case, devices.Layout], Kernel | None] = {}
_again: dict[tuple[Device, Case, devices.Layout], Later] = {}
"""Cases without a kernel because of what may pass."""
_said: set[tuple[object, ...]] = set()
"""What went wrong."""
_on_reload: list[Callable[[], None]] = []
_OURS = (UntunedWarning, LogWarning, DamagedWarning, paths.CacheWarning, ScheduleWarning)
"""Warnings that are errors where the user's filters say so, and then reach the user."""
_strict = os.environ.get("LNTUNE_STRICT", "") not in ("", "0")


class _Before:
    """What `strict` gives: a context manager at whose end the mode is again what it was before."""

    def __init__(self, before: bool) -> None:
        self._before = before

    def __enter__(self) -> None:
        """The mode is set already."""

    def __exit__(self, *_: object) -> None:
        strict(self._before)


def strict(enabled: bool = True) -> _Before:
    """From now on raise NotTunedError for a call whose case was not measured on this device,
    instead of stepping down.

    `with lntune.strict():` does so in a block, in all threads. `LNTUNE_STRICT=1` in the environment
    does the same from the start.
    """
    global _strict
    before, _strict = _strict, enabled
    reload()
    return _Before(before)


def reload() -> None:
    """Forget every decision and read the tuning logs again at the next call: after tuning in the
    same process.
    """
    with _lock:
        _records.clear()
        _choices.clear()
        _kernels.clear()
        _again.clear()
        _said.clear()
        untuned.forget()
        for forget in _on_reload:
            forget()


def on_reload(forget: Callable[[], None]) -> None:
    """Have `forget` called whenever decisions are forgotten."""
    _on_reload.append(forget)


def choose(case: Case, device: Device | None = None) -> Choice:
    """What serves a case (its rows stand for their bucket) on a device, this machine's CPU if none
    is given, decided on the logs as they were when first asked. A schedule that fails when it is
    asked is left out, which is said once.
    """
    case, device = case.typical, device or device_module.current()
    with _lock:
        if (device, case) not in _choices:
            if (device, case.op) not in _records:
                _records[device, case.op] = _read(case.op, device)
            _choose(case, device, {})
        return _choices[device, case]


def _choose(case: Case, device: Device, failed: dict[str, str]) -> None:
    """Decide on a case without the schedules that have failed, and say which fail."""
    known = {
        name: s for name, s in schedule.for_op(case.op, device.kind).items() if name not in failed
    }
    choice = select(case, device, _records[device, case.op], known)
    faults = {**failed, **choice.faults}
    steps = (*(f"left out: {fault}" for fault in failed.values()), *choice.steps)
    _choices[device, case] = msgspec.structs.replace(choice, steps=steps, faults=faults)
    for name, fault in faults.items():
        if ("schedule", name) not in _said:
            _said.add(("schedule", name))
            callers.warn(f"left out: {fault}", ScheduleWarning)


def _read(op: str, device: Device) -> list[Record]:
    """The final measurements of an operator. Those of other devices only tell why they do not
    serve: a log of another device that cannot be read is no loss.

    Raises:
        LogError: a log of this device cannot be read.
    """
    folders = paths.log_dirs()
    try:
        return records.read(folders, op, role="final")
    except LogError as e:
        mine = records.read(folders, op, device, role="final")
        callers.warn(f"{e} It is another device's, and left out.", LogWarning)
        return mine


def kernel_for(case: Case, tensors: Sequence[Tensor] = ()) -> Kernel | None:
    """The kernel that serves a case, built or loaded now if need be; None where eager mode serves
    it.

    `tensors` are those of the call whose rows are hidden (or gates) long. They say on which device,
    the CPU where there are none; where the rows of one do not lie one behind the other, the same
    schedule serves with their distance left open (call the kernel with what devices.matrix gives);
    and where on a GPU one is not aligned to 16 bytes, with narrower accesses.

    Whatever goes wrong on the way to a kernel is said once, and eager mode serves; where it is a
    matter of files (a network drive that is away, a disk that is full), it is tried again later.

    Raises:
        NotTunedError: in strict mode, when the case was not measured on this device.
        LntuneError: in strict mode, when the kernel cannot be built.
    """
    device = devices.of_tensors(tensors)
    if device is None:
        return None
    key = device, case.typical, devices.layout(device, tensors, case.hidden)
    with _lock:
        kernel = _kernels.get(key, _unknown)
        if kernel is _unknown:
            kernel = _kernels[key] = _obtained(*key)
        elif kernel is None and _again and key in _again and _again[key].due:
            kernel = _kernels[key] = _obtained(*key)
            if kernel is not None:
                for forget in _on_reload:  # what has noted that eager mode serves
                    forget()
        return kernel


def _obtained(device: Device, case: Case, layout: devices.Layout) -> Kernel | None:
    """`_obtain`, and None where it fails."""
    key = device, case, layout
    later = _again.get(key) or Later()
    try:
        with later.trying():
            kernel = _obtain(*key)
    except (NotTunedError, *_OURS):
        raise
    except Exception as e:
        if _strict:
            if isinstance(e, LntuneError):
                raise
            raise BuildError(f"{untuned.name(case)} has no kernel: {type(e).__name__}: {e}") from e
        passing, fault = passes(e), root(e)
        if passing:
            _again[key] = later
        # Once for all cases that have it: their files differ in their names.
        what = (
            (type(fault), fault.errno)
            if isinstance(fault, OSError) and fault.errno
            else (type(fault), str(fault))
        )
        if what not in _said:
            _said.add(what)
            reason = str(e) if isinstance(e, LntuneError) else f"{type(e).__name__}: {e}"
            again = " It is tried again later." if passing else ""
            callers.warn(
                f"{untuned.name(case)} has no kernel, eager mode serves it: {reason}{again}",
                UntunedWarning,
            )
        return None
    _again.pop(key, None)
    return kernel


def serve(case: Case, tensors: Sequence[Tensor] = ()) -> Kernel:
    """The kernel that serves a case; where eager mode does, PyTorch's operators behind the kernel's
    arguments. `tensors` as kernel_for's.

    Raises:
        NotTunedError, LntuneError: as kernel_for.
    """
    return kernel_for(case, tensors) or functools.partial(_stand_in, case)


def _stand_in(case: Case, *values: Any) -> None:
    arguments = ops.get(case.op).arguments(case)
    named = {a.name: value for a, value in zip(arguments, values, strict=True)}
    made = ops.get(case.op).eager(
        case, {a.name: named[a.name] for a in arguments if a.role in ("in", "scalar")}
    )
    for a in arguments:
        if a.role == "out":
            named[a.name].copy_(made[a.name])
        elif a.role == "sum":
            named[a.name][0] += made[a.name]


def _obtain(device: Device, case: Case, layout: devices.Layout) -> Kernel | None:
    choice = choose(case, device)
    if _strict:
        for reason in (
            *choice.faults.values(),
            *(one.reason for one in schedule.left_out() if one.op in ("", case.op)),
        ):
            raise ScheduleError(reason)
    if not choice.measured:
        outlived = choice.stale and choice.tier in ("exact", "eager")
        if _strict:
            state = (
                "was measured on this device before its schedule changed"
                if outlived
                else "was not measured on this device"
            )
            command = untuned.Untuned(case, device, "").command
            raise NotTunedError(
                f"{untuned.name(case)} {state} ({'; '.join(choice.steps)}). Run: {command}"
            )
        served = {
            "bucket": "the record of another row bucket",
            "near": "the record of a nearby hidden size",
            "default": "default knobs",
        }
        untuned.met(
            case,
            device,
            {"exact": "that record", **served}.get(choice.tier, "eager mode"),
            outlived,
        )
    if choice.tier == "eager":
        return None
    plan, setting = schedule.resolve(choice.schedule, case.op, choice.knobs)
    try:
        setting = narrowed(setting, plan, case, device, layout.widest)
        return None if setting is None else _built(case, plan, setting, device, layout)
    except ScheduleError as e:  # of the schedule itself: another may do
        if _strict:
            raise
        _choose(case, device, {**choice.faults, plan.name: str(e)})
    return _obtain(device, case, layout)


def _built(
    case: Case, plan: schedule.Schedule, setting: Any, device: Device, layout: devices.Layout
) -> Kernel:
    """The kernel for tensors of a layout."""
    try:
        return cache.kernel(case, plan, setting, device, layout.strided)
    except LntuneError:
        if not layout.strided:
            raise
    # Where nothing can be built, the kernel for contiguous rows may be there.
    return functools.partial(_with_copies, cache.kernel(case, plan, setting, device))


def _with_copies(kernel: Kernel, *values: Any) -> None:
    """Call a kernel for contiguous rows with tensors of which some are not; what it writes is."""
    kernel(*(v.contiguous() if isinstance(v, Tensor) else v for v in values))


class Direct:
    """The direct calls of one operator: a `lntune.kernels.direct.Table` made when the first kernel
    is there, forgotten on reload.

    `names` says which argument of the kernels each argument of a call is. Where a table cannot be
    made every call takes the general path, which is slower by some microseconds and otherwise the
    same; `lntune doctor` says so. `record` is as Table's.
    """

    def __init__(
        self, signature: str, names: tuple[str, ...], record: ctypes.c_void_p | None = None
    ) -> None:
        self.call: Callable[..., Any] = _unknown
        self.serves: Callable[..., Any] = _unknown
        self._signature, self._names, self._record = signature, names, record
        self._table: Table | None = None
        self._later = Later()
        on_reload(self.forget)

    def remember(
        self, case: Case, kernel: Kernel, call: tuple[Any, ...], recorded: bool = False
    ) -> None:
        """Have calls like `call`, in the row bucket of `case`, served directly by this kernel;
        `recorded`: those whose gradients are recorded, instead of the others.
        """
        with _lock:
            # copies its arguments; only kernels can be called from C
            if isinstance(kernel, functools.partial):
                return
            if self._table is None and not self._later.due:
                return
            try:
                with self._later.trying():
                    self._table = self._table or Table(self._signature, record=self._record)
                    first, last = BUCKETS[case.bucket]
                    # a bucket is a range of bit lengths
                    bits = (first.bit_length(), last.bit_length())
                    known = self._table.remember(
                        kernel,
                        ops.get(case.op).arguments(case),
                        self._names,
                        bits,
                        call,
                        case,
                        recorded,
                    )
            except _OURS:
                raise
            except Exception:  # the general path serves as well
                return
            if known:
                self.call, self.serves = self._table.call, self._table.serves

    @property
    def ready(self) -> bool:
        """True when a kernel was remembered, so that some calls are direct."""
        return self.call is not _unknown

    def forget(self) -> None:
        """Have every call go the general path again."""
        if self._table is not None:
            self._table.forget()
        self.call = self.serves = _unknown


def _unknown(*_: Any) -> None:
    """The direct call before the first kernel is known."""
