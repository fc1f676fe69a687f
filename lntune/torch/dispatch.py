"""From a call to a kernel: decide once per (device, operator, hidden size, dtype, row bucket), build or load once, remember."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import tvm_ffi  # noqa: F401  (so that the first call of a kernel does not pay for it)
from torch import Tensor

from lntune import artifact, knobs, ops, paths, records, schedule
from lntune import device as device_module
from lntune.case import BUCKETS, Case, bucket_label
from lntune.device import Device
from lntune.direct import Table
from lntune.errors import LntuneError, NotTunedError
from lntune.records import Record
from lntune.select import Choice, select
from lntune.torch import devices
from lntune.torch.narrow import narrowed

Kernel = Callable[..., None]

_lock = threading.RLock()
# A process forks only between two decisions: a child that inherits the lock shut by another thread would wait for ever.
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
_records: dict[str, list[Record]] = {}
_choices: dict[tuple[Device, Case], Choice] = {}
_kernels: dict[tuple[Device, Case, devices.Layout], Kernel | None] = {}
_told: set[tuple[Device, str, int, str, int]] = set()
_on_reload: list[Callable[[], None]] = []
_strict = os.environ.get("LNTUNE_STRICT", "") not in ("", "0")


class UntunedWarning(UserWarning):
    """A call is not served by a measurement of its own case. Said once per case; `lntune why` tells the whole story."""


def strict(enabled: bool = True) -> None:
    """From now on raise NotTunedError for a call whose case was not measured on this device, instead of stepping down.

    `LNTUNE_STRICT=1` in the environment does the same from the start.
    """
    global _strict  # noqa: PLW0603 (a process-wide switch, like torch.set_num_threads)
    _strict = enabled
    reload()


def reload() -> None:
    """Forget every decision and read the tuning logs again at the next call: after tuning in the same process."""
    with _lock:
        _records.clear()
        _choices.clear()
        _kernels.clear()
        for forget in _on_reload:
            forget()


def on_reload(forget: Callable[[], None]) -> None:
    """Have `forget` called whenever decisions are forgotten."""
    _on_reload.append(forget)


def choose(case: Case, device: Device | None = None) -> Choice:
    """What serves a case (its rows stand for their bucket) on a device, this machine's CPU if none is given, decided on the logs as they
    were when first asked.
    """
    case, device = case.typical, device or device_module.current()
    with _lock:
        if (device, case) not in _choices:
            if case.op not in _records:
                _records[case.op] = records.read(paths.log_dirs(), case.op, role="final")
            _choices[device, case] = select(case, device, _records[case.op], schedule.for_op(case.op, device.kind))
        return _choices[device, case]


def kernel_for(case: Case, tensors: Sequence[Tensor] = ()) -> Kernel | None:
    """The kernel that serves a case, built or loaded now if need be; None where eager mode serves it.

    `tensors` are those of the call whose rows are hidden (or gates) long. They say on which device, the CPU where there are none; where the
    rows of one do not lie one behind the other, the same schedule serves with their distance left open (call the kernel with what
    devices.matrix gives); and where on a GPU one is not aligned to 16 bytes, with narrower accesses.

    Raises:
        NotTunedError: in strict mode, when the case was not measured on this device.
        LntuneError: in strict mode, when the kernel cannot be built.
    """
    device = devices.of_tensors(tensors)
    if device is None:
        return None
    key = device, case.typical, devices.layout(device, tensors, case.hidden)
    with _lock:
        if key not in _kernels:
            _kernels[key] = _obtain(*key)
        return _kernels[key]


def serve(case: Case, tensors: Sequence[Tensor] = ()) -> Kernel:
    """The kernel that serves a case; where eager mode does, PyTorch's operators behind the kernel's arguments. `tensors` as kernel_for's.

    Raises:
        NotTunedError, LntuneError: as kernel_for.
    """
    return kernel_for(case, tensors) or functools.partial(_stand_in, case)


def _stand_in(case: Case, *values: Any) -> None:
    arguments = ops.get(case.op).arguments(case)
    named = {a.name: value for a, value in zip(arguments, values, strict=True)}
    made = ops.get(case.op).eager(case, {a.name: named[a.name] for a in arguments if a.role in ("in", "scalar")})
    for a in arguments:
        if a.role == "out":
            named[a.name].copy_(made[a.name])
        elif a.role == "sum":
            named[a.name][0] += made[a.name]


def _obtain(device: Device, case: Case, layout: devices.Layout) -> Kernel | None:
    what = f"{case.op} hidden {case.hidden} {case.dtype} rows {bucket_label(case.bucket)}"
    command = f"lntune tune {case.op} --hidden {case.hidden} --dtype {case.dtype} --rows {case.rows}"
    command += " --target cuda" if device.kind == "gpu" else ""
    try:
        choice = choose(case, device)
        if not choice.measured:
            outlived = choice.stale and choice.tier in ("exact", "eager")
            if _strict:
                state = "was measured on this device before its schedule changed" if outlived else "was not measured on this device"
                raise NotTunedError(f"{what} {state} ({'; '.join(choice.steps)}). Run: {command}")
            told = (device, case.op, case.hidden, case.dtype, case.bucket)
            if told not in _told:  # once, whatever the variant
                _told.add(told)
                served = {"bucket": "the record of another row bucket", "near": "the record of a nearby hidden size", "default": "default knobs"}
                by = {"exact": "that record", **served}.get(choice.tier, "eager mode")
                state = "was tuned before its schedule changed" if outlived else "is not tuned on this device"
                warnings.warn(f"{what} {state}; served by {by}. Run: {command}", UntunedWarning, stacklevel=5)
        if choice.tier == "eager":
            return None
        plan = schedule.get(choice.schedule, case.op)
        setting = narrowed(knobs.from_dict(plan.knobs, dict(choice.knobs)), plan, case, device, layout.widest)
        if setting is None:
            return None
        try:
            return artifact.kernel(case, plan, setting, device, layout.strided)
        except LntuneError:
            if not layout.strided:
                raise
        # Where nothing can be built, the kernel for contiguous rows may be there.
        return functools.partial(_with_copies, artifact.kernel(case, plan, setting, device))
    except (LntuneError, OSError) as e:  # an unreadable log or cache must not stop a model that runs without either
        if _strict:
            raise
        warnings.warn(f"{what} has no kernel, eager mode serves it: {e}", UntunedWarning, stacklevel=5)
        return None


def _with_copies(kernel: Kernel, *values: Any) -> None:
    """Call a kernel for contiguous rows with tensors of which some are not; what it writes is."""
    kernel(*(v.contiguous() if isinstance(v, Tensor) else v for v in values))


class Direct:
    """The direct calls of one operator: a `lntune.direct.Table` made when the first kernel is there, forgotten on reload.

    `names` says which argument of the kernels each argument of a call is. Where a table cannot be made every call takes the
    general path, which is slower by some microseconds and otherwise the same; `lntune doctor` says so. `record` is as Table's.
    """

    def __init__(self, signature: str, names: tuple[str, ...], record: ctypes.c_void_p | None = None) -> None:
        self.call: Callable[..., Any] = _unknown
        self.serves: Callable[..., Any] = _unknown
        self._signature, self._names, self._record = signature, names, record
        self._table: Table | None = None
        on_reload(self.forget)

    def remember(self, case: Case, kernel: Kernel, call: tuple[Any, ...], recorded: bool = False) -> None:
        """Have calls like `call`, in the row bucket of `case`, served directly by this kernel; `recorded`: those whose gradients are recorded,
        instead of the others.
        """
        with _lock:
            if isinstance(kernel, functools.partial):  # copies its arguments; only kernels can be called from C
                return
            try:
                self._table = self._table or Table(self._signature, record=self._record)
            except (LntuneError, OSError):
                return
            first, last = BUCKETS[case.bucket]
            bits = (first.bit_length(), last.bit_length())  # a bucket is a range of bit lengths
            if self._table.remember(kernel, ops.get(case.op).arguments(case), self._names, bits, call, case, recorded):
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


def describe(case: Case, device: Device | None = None) -> dict[str, Any]:
    """The choice for a case on a device as plain data, for `lntune why` and for machines."""
    choice = choose(case, device)
    record = choice.record
    return {
        "case": {"op": case.op, "hidden": case.hidden, "dtype": case.dtype, "rows": case.rows, "bucket": bucket_label(case.bucket)},
        "tier": choice.tier,
        "schedule": choice.schedule,
        "knobs": choice.knobs,
        "steps": list(choice.steps),
        "tuned_us": record.median() if record else None,
        "eager_us": record.median("eager") if record else None,
        "stale": choice.stale,
        "disturbed": bool(record and record.disturbance),
    }
