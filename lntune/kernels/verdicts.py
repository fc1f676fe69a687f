"""What the checks of cached kernels have found, kept beside them: one file for each kernel and
environment, `KERNEL.ENVIRONMENT.checked`, which is JSON.

A verdict is that of a file with a certain digest in an environment: on a processor or GPU with its
driver, under versions of what runs it. One that is against a kernel keeps it from being used, and
from being built once more of the same; its file is put aside as `KERNEL.wrong`. Where the cache
cannot be written, verdicts are this process's alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from lntune import backends
from lntune.case import Case
from lntune.check import short
from lntune.device import Device
from lntune.kernels import cache
from lntune.schedule import Schedule
from lntune.system import scratch, sealed, toolchain
from lntune.system.sealed import DamagedError, Facts

SUFFIX = ".checked"
ASIDE = ".wrong"
_KEPT = 8
"""Kernels put aside that are kept in a folder, for whoever wants to know what is wrong."""


class Checked(msgspec.Struct, frozen=True):
    """What came of a check: whether the kernel of a file with this digest and these facts is right
    in an environment, what is wrong with it, and the seconds that the check took. `case` and
    `kernel`, the schedule with its knobs, are for readers.
    """

    case: str
    kernel: str
    digest: str
    ok: bool
    message: str
    seconds: float
    environment: Facts
    facts: Facts = {}


_here: dict[tuple[Path, str], Checked] = {}
"""Verdicts of this process, by kernel and environment."""


def enabled() -> bool:
    """False where LNTUNE_CHECK is 0: nothing is checked before it serves, nor is what was."""
    return os.environ.get("LNTUNE_CHECK", "") != "0"


def environment(device: Device) -> Facts:
    """What a verdict on a device of this machine rests on; nothing where the device is not here."""
    machine = backends.of(device).machine(device)
    if not machine:
        return {}
    versions = {name: toolchain.installed(name) for name in ("torch", "apache-tvm-ffi")}
    return {**machine, **versions, "check": str(short.VERSION)}


def _tag(here: Facts) -> str:
    encoded = msgspec.json.encode(here, order="sorted")
    return hashlib.sha256(encoded).hexdigest()[:12]


def path_of(kernel: Path, here: Facts) -> Path:
    """Where the verdict on a kernel's file in an environment is kept."""
    return kernel.with_name(f"{kernel.name}.{_tag(here)}{SUFFIX}")


def of(kernel: Path, here: Facts, digest: str = "") -> Checked | None:
    """The verdict on the kernel that goes by a file's name; None where there is none, or it is of
    another file than that which is there now. `digest` is that of a file that lies elsewhere.
    """
    found = _here.get((kernel, _tag(here))) or _read(path_of(kernel, here))
    if found is None or (digest and found.digest != digest):
        return None
    if digest:
        return found
    try:
        same = sealed.digest(kernel) == found.digest
    except (DamagedError, OSError):  # gone: what is wrong was put aside
        same = not found.ok
    return found if same else None


def _read(path: Path) -> Checked | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Checked)
    except (OSError, msgspec.MsgspecError):
        return None


def against(
    case: Case, schedule: Schedule, setting: object, device: Device, strided: bool = False
) -> str:
    """Why a kernel is not to be used or built again, as the check of an earlier one found it; empty
    where nothing is known against it, or what it would be built with or of has changed since.
    Arguments as cache.kernel's.
    """
    here = environment(device)
    if not here:
        return ""
    path = cache.path_of(case, schedule, setting, device, strided)
    found = of(path, here)
    if found is None or found.ok or cache.outdated(found.facts, schedule, backends.of(device)):
        return ""
    return found.message


def note(kernel: Path, found: Checked) -> str:
    """Keep a verdict, and put the file aside where it is against the kernel, unless in another
    environment the same file was found right. The answer is what became of it, in words.
    """
    _here[kernel, _tag(found.environment)] = found
    path = path_of(kernel, found.environment)
    try:
        with scratch.whole(path, closed=True) as temporary:
            temporary.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))
    except OSError as e:
        return f"this process does not use it; that cannot be noted ({e.strerror or e})"
    if found.ok or any(one.ok and one.digest == found.digest for one in all_of(kernel)):
        return f"it is not used here, see {path.name}"
    aside = kernel.with_name(f"{kernel.name}{ASIDE}")
    try:
        kernel.replace(aside)
    except OSError:
        return f"it is not used, see {path.name}"
    with contextlib.suppress(OSError):
        every = sorted(kernel.parent.glob(f"*{ASIDE}"), key=lambda p: p.stat().st_mtime_ns)
        for old in every[:-_KEPT]:
            old.unlink()
    return f"it is put aside as {aside.name}"


def all_of(kernel: Path) -> Iterator[Checked]:
    """The verdicts of all environments that are kept beside a kernel's file."""
    for path in kernel.parent.glob(f"{kernel.name}.*{SUFFIX}"):
        if (found := _read(path)) is not None:
            yield found


def every(folder: Path) -> Iterator[Checked]:
    """All verdicts in the cache of kernels."""
    for path in sorted(folder.glob(f"*/*{SUFFIX}")):
        if (found := _read(path)) is not None:
            yield found


def clear(kernel: Path, here: Facts) -> None:
    """Forget the verdict on a kernel in an environment: it is checked again, and built again where
    it was put aside.
    """
    _here.pop((kernel, _tag(here)), None)
    with contextlib.suppress(OSError):
        path_of(kernel, here).unlink(missing_ok=True)
