"""The on-disk cache of built kernels. Deleting it costs only time."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from lntune import backends
from lntune import knobs as knobs_module
from lntune.backends.backend import Backend, Kernel, Scheduled
from lntune.case import Case
from lntune.device import Device
from lntune.errors import BuildError, ScheduleError
from lntune.schedule import Schedule
from lntune.system import native, paths, sealed, sources, toolchain
from lntune.system.sealed import DamagedError
from lntune.versions import Code


class Key(msgspec.Struct, frozen=True):
    """What a kernel is built from, which any machine knows that looks for it. Timings and the log
    are not among it, nor what it is built with: a kernel that comes from elsewhere is found where
    there is neither TVM nor a compiler. That is kept with the file, see `_tools`.
    """

    op: str
    hidden: int
    dtype: str
    variant: str
    bucket: int  # kernels take any number of rows, but a schedule may look at the bucket it is for
    schedule: str
    code: Code
    knobs: dict[str, Any]
    target: dict[str, Any]
    abi: str
    """Releases of tvm_ffi whose binary interface it has."""
    runtime: str

    @property
    def digest(self) -> str:
        """The file name this key stands for."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()[:24]


def key_of(
    case: Case, schedule: Schedule, setting: Any, device: Device, strided: bool = False
) -> Key:
    """The key of one kernel; `strided` is as kernel's."""
    # Of the cores it matters only how many rows sums have, a row for each block of rows: else a
    # machine with more of them would find nothing.
    backend = backends.of(device)
    target = {**backend.target(device), "blocks": case.blocks(device)}
    target.pop("num-cores", None)
    if device.backend:
        target["backend"] = device.backend
    if strided:
        target["strided"] = True
    return Key(
        case.op,
        case.hidden,
        case.dtype,
        case.variant,
        case.bucket,
        schedule.name,
        schedule.code,
        knobs_module.to_dict(setting),
        target,
        toolchain.COMPATIBLE["apache-tvm-ffi"],
        backend.runtime(),
    )


def path_of(
    case: Case, schedule: Schedule, setting: Any, device: Device, strided: bool = False
) -> Path:
    """Where a kernel lies once built; arguments as kernel's."""
    return _path(key_of(case.typical, schedule, setting, device, strided), backends.of(device))


def _path(key: Key, backend: Backend) -> Path:
    return paths.cached("kernels", key.op, f"{key.digest}.{native.FORMAT}.{backend.suffix}")


def _tools(backend: Backend) -> sealed.Facts:
    """What this machine builds kernels with, by name; nothing of what it lacks."""
    tvm = toolchain.installed("apache-tvm")
    return backend.tools() | ({"apache-tvm": tvm} if tvm != toolchain.MISSING else {})


def _outdated(facts: sealed.Facts, schedule: Schedule, backend: Backend) -> bool:
    """True for a kernel that was built by other tools than this machine has, or of code that was
    edited since without a new version, where this machine has all that it takes to build it anew.
    """
    tools = _tools(backend)
    if "apache-tvm" not in tools or not backend.can_compile() or toolchain.incompatible():
        return False
    if not sources.unchanged(facts, schedule.path):
        return True
    return tools["apache-tvm"] != facts.get("apache-tvm") or not backend.same_tools(facts)


def built(
    case: Case,
    schedule: Schedule,
    setting: Any,
    device: Device,
    archs: tuple[str, ...] = (),
    strided: bool = False,
) -> bool:
    """True when the kernel lies in the cache, whole, and of the tools that are here; arguments as
    prepare's.
    """
    backend = backends.of(device)
    path = path_of(case, schedule, setting, device, strided)
    return _holds(path, schedule, backend, archs)


def _holds(path: Path, schedule: Schedule, backend: Backend, archs: tuple[str, ...]) -> bool:
    """True when a sound file is there, and has code for some architectures beside that of its
    own.
    """
    try:
        facts = sealed.read(path).facts
    except (DamagedError, OSError):
        return False
    if _outdated(facts, schedule, backend):
        return False
    return not archs or backend.architectures(path) >= set(archs)


def prepare(
    case: Case,
    schedule: Schedule,
    setting: Any,
    device: Device,
    archs: tuple[str, ...] = (),
    strided: bool = False,
    scheduled: Scheduled | None = None,
) -> Path:
    """The file of a kernel, built now if it is not in the cache; nothing is loaded, and a GPU need
    not be here.

    `archs` are architectures whose code a GPU's kernel holds beside that of the device's own and
    what it held before, for those who load the file themselves (launcher.load(read(path))): a GPU
    of another architecture looks for a kernel with the knobs that are best there. `strided` is as
    kernel's. `scheduled` is the same kernel, of the typical case, where it was scheduled before.

    Raises:
        BuildError: it cannot be built or stored.
        ScheduleError: the knobs do not fit.
    """
    case = case.typical
    key = key_of(case, schedule, setting, device, strided)
    backend = backends.of(device)
    path = _path(key, backend)
    if path.is_file():
        with contextlib.suppress(OSError):
            try:
                sealed.read(path)
            except DamagedError as e:
                sealed.put_aside(path, str(e))
    if not _holds(path, schedule, backend, archs):
        _build(key, case, schedule, setting, device, archs, strided, path, scheduled)
    return path


def _build(
    key: Key,
    case: Case,
    schedule: Schedule,
    setting: Any,
    device: Device,
    archs: tuple[str, ...],
    strided: bool,
    path: Path,
    scheduled: Scheduled | None = None,
) -> None:
    """Build a kernel and store it under its name; arguments as prepare's."""
    # the compiler is imported only when something must be built
    from lntune.kernels import compiler

    facts = {
        **_tools(backends.of(device)),
        **sources.stamp(schedule.path),
        "key": msgspec.json.encode(key, order="sorted").decode(),
    }
    compiler.to_file(case, schedule, setting, device, path, strided, facts, archs, scheduled)


def kernel(
    case: Case, schedule: Schedule, setting: Any, device: Device, strided: bool = False
) -> Kernel:
    """The kernel for a case, from the cache or built now and put there: a function of tensors in
    the operator's order.

    `strided`: one that reads matrices whose rows lie anywhere; others want them one behind the
    other. A cached file's digest is checked before it is loaded. One that is damaged is put aside,
    which is said, and built again; so is one of another TVM or CUDA compiler than those that are
    here, and serves where that fails.

    Raises:
        BuildError: it is not cached and cannot be built or stored, or no GPU is here that runs it.
        ScheduleError: the knobs do not fit.
    """
    case = case.typical
    key = key_of(case, schedule, setting, device, strided)
    backend = backends.of(device)
    path = _path(key, backend)
    backend.ensure_usable(f"{case} ({schedule.name})")

    def make() -> None:
        _build(key, case, schedule, setting, device, (), strided, path)

    if not _is_current(path, schedule, backend, make):
        make()
    return native.fetch(path, functools.partial(backend.load, path), make)


def _is_current(path: Path, schedule: Schedule, backend: Backend, make: Callable[[], None]) -> bool:
    """True when there is a file for `native.fetch`. One of other tools than this machine's, or of
    other code, is made anew before, where that succeeds.
    """
    try:
        outdated = _outdated(sealed.facts(path), schedule, backend)
    except DamagedError:
        return path.is_file()
    if outdated:
        with contextlib.suppress(BuildError, ScheduleError):
            make()
    return True
