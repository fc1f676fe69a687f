"""The on-disk cache of built kernels. Deleting it costs only time."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from lntune import backends
from lntune import knobs as knobs_module
from lntune.backends.backend import Backend, Kernel, Scheduled
from lntune.case import Case
from lntune.device import Device
from lntune.errors import BuildError, ScheduleError
from lntune.schedule import Schedule
from lntune.system import native, paths, sealed, sources, toolchain, turns
from lntune.system.sealed import DamagedError, ForeignError
from lntune.versions import Code

_KEY = "key"
"""The fact that says what a file was built for."""
_ATTEMPTS = 3
"""Loads of a file that others replace meanwhile."""


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


def outdated(facts: sealed.Facts, schedule: Schedule, backend: Backend) -> bool:
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
    if outdated(facts, schedule, backend):
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
                _ensure_own(path, key)
            except DamagedError as e:
                sealed.put_aside(path, str(e), isinstance(e, ForeignError))
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
    """Build a kernel and store it under its name, unless another process does so meanwhile;
    arguments as prepare's.
    """
    # the compiler is imported only when something must be built
    from lntune.kernels import compiler

    facts = {
        **_tools(backends.of(device)),
        **sources.stamp(schedule.path),
        _KEY: _encoded(key),
    }
    with turns.turn(path) as made:
        if not (made and _holds(path, schedule, backends.of(device), archs)):
            compiler.to_file(
                case, schedule, setting, device, path, strided, facts, archs, scheduled
            )


class Loaded(NamedTuple):
    """A kernel, the file it is of, and that file's digest."""

    kernel: Kernel
    path: Path
    digest: str


def kernel(
    case: Case, schedule: Schedule, setting: Any, device: Device, strided: bool = False
) -> Kernel:
    """The kernel of `loaded`; arguments and errors are the same."""
    return loaded(case, schedule, setting, device, strided).kernel


def loaded(
    case: Case, schedule: Schedule, setting: Any, device: Device, strided: bool = False
) -> Loaded:
    """The kernel for a case, from the cache or built now and put there: a function of tensors in
    the operator's order.

    `strided`: one that reads matrices whose rows lie anywhere; others want them one behind the
    other. A cached file's digest is checked before it is loaded, and that it was built for this
    very case, schedule, knobs and target. One that is damaged or another's is put aside, which is
    said, and built again; so is one of another TVM or CUDA compiler than those that are here, and
    serves where that fails.

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

    def load() -> tuple[str, Kernel]:
        _ensure_own(path, key)
        return sealed.digest(path), backend.load(path)

    if not _is_current(path, schedule, backend, make):
        make()
    for _ in range(_ATTEMPTS):
        digest, function = native.fetch(path, load, make)
        try:
            if sealed.digest(path) == digest:
                break
        except (DamagedError, OSError):  # the cache was emptied meanwhile
            break
    return Loaded(function, path, digest)


def _ensure_own(path: Path, key: Key) -> None:
    """Complain where a file says that it was built for something else than its name stands for.

    Raises:
        ForeignError: it does.
        DamagedError: there is no such file, or nothing is said.
    """
    said = sealed.facts(path).get(_KEY)
    if said is not None and said != _encoded(key):
        raise ForeignError(f"{path} is the kernel of something else: {said}")


def _encoded(key: Key) -> str:
    return msgspec.json.encode(key, order="sorted").decode()


def _is_current(path: Path, schedule: Schedule, backend: Backend, make: Callable[[], None]) -> bool:
    """True when there is a file for `native.fetch`. One of other tools than this machine's, or of
    other code, is made anew before, where that succeeds.
    """
    try:
        old = outdated(sealed.facts(path), schedule, backend)
    except DamagedError:
        return path.is_file()
    if old:
        with contextlib.suppress(BuildError, ScheduleError):
            make()
    return True
