"""A kernel is checked before it serves its first call on a machine: whatever was tuned, what serves
may be built for another variant, row bucket or hidden size than was tried, or elsewhere.

The check takes some tens of milliseconds, once for each kernel and environment: its verdict is kept
beside the kernel (`lntune/kernels/verdicts.py`). A kernel that fails is put aside, which is said,
and the next choice serves. `LNTUNE_CHECK=0` in the environment leaves all of this out.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import msgspec

from lntune import backends, ops
from lntune import knobs as knobs_module
from lntune import schedule as schedule_module
from lntune.backends.backend import Kernel
from lntune.bundle import loaded as loaded_bundles
from lntune.bundle.loaded import Found
from lntune.case import Case
from lntune.check.short import Shortly
from lntune.device import Device
from lntune.errors import BuildError, LntuneError
from lntune.kernels import cache, verdicts
from lntune.kernels.cache import Loaded
from lntune.kernels.verdicts import Checked
from lntune.log.select import Choice
from lntune.schedule import Schedule
from lntune.system import callers, sealed
from lntune.system.sealed import DamagedError
from lntune.torch import apart, devices, untuned
from lntune.torch.reloading import on_reload
from lntune.torch.vector_width import narrowed

_log = logging.getLogger("lntune")
_said: set[tuple[str, ...]] = set()
_anew: list[set[str]] = []
"""While verdicts are made anew: the kernels whose verdict was."""


class WrongKernelWarning(UserWarning):
    """A kernel was found wrong before it served a call, and does not serve: the next choice
    does.
    """


class WrongKernelError(BuildError):
    """A kernel was found wrong, and is not used."""


class UncheckedError(BuildError):
    """A kernel cannot be checked at the moment, and is not used before it was."""


class RecordingError(UncheckedError):
    """A kernel cannot be checked while a CUDA graph is recorded."""


@on_reload
def _forget() -> None:
    _said.clear()


def against(case: Case, schedule: Schedule, setting: object, device: Device) -> str:
    """Why the kernel for contiguous rows of a choice does not serve, as an earlier check found, and
    says once; empty where nothing is known against it.
    """
    case = _named(case)
    if not verdicts.enabled() or not _believed(cache.path_of(case, schedule, setting, device)):
        return ""
    message = verdicts.against(case, schedule, setting, device)
    if message:
        say(case, _name(schedule, setting), f"{message}; it was put aside when that was found")
    return message


def _believed(path: Path) -> bool:
    """False for a kernel that is to be checked anew, and was not yet."""
    return not _anew or str(path) in _anew[-1]


def kernel(
    case: Case, schedule: Schedule, setting: object, device: Device, strided: bool = False
) -> Kernel:
    """The kernel of `cache.kernel`, which was found right here; checked now if it was not yet.

    Raises:
        WrongKernelError: it is wrong, now or when it was checked before.
        UncheckedError: it cannot be checked at the moment: while a graph is recorded, or for want
            of memory.
        BuildError, ScheduleError: as cache.kernel.
    """
    case = _named(case)
    asked = case, schedule, setting, device, strided
    here = verdicts.environment(device) if verdicts.enabled() else {}
    if not here:
        return cache.kernel(*asked)
    path = cache.path_of(*asked)
    if not _believed(path):
        _anew[-1].add(str(path))
        verdicts.clear(path, here)
    name = _name(schedule, setting)
    if message := verdicts.against(*asked):
        say(case, name, f"{message}; it was put aside when that was found")
        raise WrongKernelError(_wrong(case, name, message))
    found = verdicts.of(path, here)
    if (found is None or not found.ok) and backends.of(device).recording():
        raise RecordingError(
            f"the kernel {name} was not checked yet, which cannot be done while a CUDA graph is"
            " recorded: call it once before"
        )
    loaded = cache.loaded(*asked)
    if found is None or found.digest != loaded.digest:
        found = _check(loaded, case, name, device, strided, here)
    if not found.ok:
        raise WrongKernelError(_wrong(case, name, found.message))
    return loaded.kernel


def shipped_kernel(found: Found, device: Device) -> Kernel:
    """The kernel of a bundle, which was found right here; checked now if it was not yet.

    Raises:
        WrongKernelError, UncheckedError: as kernel.
        BuildError: it was altered, or cannot be loaded here.
    """
    case, place = found.entry.case, found.place
    name = _shipped_name(found)
    here = verdicts.environment(device) if verdicts.enabled() else {}
    if not here:
        return found.load(device)
    if not _believed(place):
        _anew[-1].add(str(place))
        verdicts.clear(place, here)
    known = verdicts.of(place, here, found.sha256)
    if known is None and backends.of(device).recording():
        raise RecordingError(
            f"the kernel {name} was not checked yet, which cannot be done while a CUDA graph is"
            " recorded: call it once before"
        )
    if known is None:
        loaded = Loaded(found.load(device), place, found.sha256)
        known = _check(loaded, case, name, device, found.entry.strided, here)
        kernel = loaded.kernel
    elif known.ok:
        kernel = found.load(device)
    if not known.ok:
        raise WrongKernelError(_wrong(case, name, known.message))
    return kernel


def against_shipped(found: Found, device: Device) -> str:
    """Why a bundle's kernel does not serve, as an earlier check here found, and says once; empty
    where nothing is known against it.
    """
    if not verdicts.enabled() or not _believed(found.place):
        return ""
    known = verdicts.of(found.place, verdicts.environment(device), found.sha256)
    if known is None or known.ok:
        return ""
    say(found.entry.case, _shipped_name(found), f"{known.message}; that was found before")
    return known.message


def _shipped_name(found: Found) -> str:
    entry = found.entry
    return f"{entry.schedule} ({knobs_module.describe(entry.knobs)}) of {found.bundle.folder}"


def _check(
    loaded: Loaded, case: Case, name: str, device: Device, strided: bool, here: dict[str, str]
) -> Checked:
    """Check a kernel that was loaded, and keep what comes of it."""
    backend = backends.of(device)

    def check() -> Shortly:
        return backend.verify_shortly(case, device, loaded.kernel, strided)

    try:
        outcome = apart.run(check)
    except Exception as e:
        raise UncheckedError(f"the kernel {name} cannot be checked: {e}") from e
    facts: dict[str, str] = {}
    with contextlib.suppress(DamagedError):
        facts = sealed.facts(loaded.path)
    found = Checked(
        f"{case.typical}{' strided' if strided else ''}",
        name,
        loaded.digest,
        not outcome.message,
        outcome.message,
        outcome.seconds,
        here,
        facts,
    )
    became = verdicts.note(loaded.path, found)
    state = "right" if found.ok else f"wrong: {found.message}; {became}"
    _log.debug("%s, %s: checked in %.0f ms, %s", case, name, 1e3 * found.seconds, state)
    if not found.ok:
        say(case, name, f"{found.message}; {became}")
    return found


def refuse(case: Case, choice: Choice, device: Device, message: str) -> None:
    """Keep the kernel of a choice, which a more thorough check has found wrong, from serving."""
    case = _named(case)
    here = verdicts.environment(device) if verdicts.enabled() else {}
    with contextlib.suppress(LntuneError):
        if choice.bundle and (shipped := loaded_bundles.find(case, device)):
            known = verdicts.of(shipped.place, here, shipped.sha256) if here else None
            if known is not None:
                wrong = msgspec.structs.replace(known, ok=False, message=message)
                became = verdicts.note(shipped.place, wrong)
                say(case, _shipped_name(shipped), f"{message}; {became}")
            return
        schedule, setting = schedule_module.resolve(choice.schedule, case.op, choice.knobs)
        path = cache.path_of(case, schedule, setting, device)
        if here and (found := verdicts.of(path, here)) is not None:
            wrong = msgspec.structs.replace(found, ok=False, message=message)
            say(case, _name(schedule, setting), f"{message}; {verdicts.note(path, wrong)}")


def state(case: Case, choice: Choice, device: Device) -> str:
    """What is known of the kernel of a choice on this machine, as a sentence's rest; empty where
    it is eager mode that serves, or the device is not here.
    """
    if not verdicts.enabled() or choice.tier == "eager" or not verdicts.environment(device):
        return ""
    found = verdict(case, choice, device)
    if found is None:
        return "not checked on this machine yet; its first call does that"
    return f"found right on this machine, in {1e3 * found.seconds:.0f} ms" if found.ok else ""


def verdict(case: Case, choice: Choice, device: Device, strided: bool = False) -> Checked | None:
    """The verdict on the kernel of a choice on this machine, `strided` that for matrices whose rows
    lie apart; None where there is none, or eager mode serves.
    """
    case = _named(case)
    here = verdicts.environment(device) if verdicts.enabled() else {}
    if not here or choice.tier == "eager":
        return None
    try:
        if choice.bundle:
            shipped = loaded_bundles.find(case, device, strided)
            if shipped is None or not shipped.entry.file:
                return None
            return verdicts.of(shipped.place, here, shipped.sha256)
        schedule, setting = schedule_module.resolve(choice.schedule, case.op, choice.knobs)
        if strided:
            setting = narrowed(setting, schedule, case, device, devices.ANY, strided) or setting
        return verdicts.of(cache.path_of(case, schedule, setting, device, strided), here)
    except LntuneError:
        return None


def _named(case: Case) -> Case:
    """The case with its variant by name."""
    return msgspec.structs.replace(case, variant=ops.get(case.op).check_variant(case.variant))


def _name(schedule: Schedule, setting: object) -> str:
    return f"{schedule.name} ({knobs_module.describe(knobs_module.to_dict(setting))})"


def _wrong(case: Case, name: str, message: str) -> str:
    return f"{untuned.name(case)}: the kernel {name} is wrong: {message}. {_remedy(case)}"


def _remedy(case: Case) -> str:
    sizes = f"--hidden {case.hidden} --dtype {case.dtype} --rows {case.rows}"
    return f"To check it anew: lntune check {case.op} {sizes}"


def say(case: Case, name: str, reason: str) -> None:
    """Warn, once until lntune.reload(), of a kernel that is wrong."""
    key = (untuned.name(case), case.variant, name)
    if key not in _said:
        _said.add(key)
        callers.warn(
            f"{untuned.name(case)}: the kernel {name} is wrong, and the next choice serves:"
            f" {reason}. {_remedy(case)}",
            WrongKernelWarning,
        )


@contextlib.contextmanager
def anew() -> Iterator[None]:
    """In the block every kernel is checked once more, also one that was found wrong before."""
    _anew.append(set())
    try:
        yield
    finally:
        _anew.pop()
