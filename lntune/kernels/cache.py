"""The on-disk cache of built kernels. Deleting it costs only time."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from lntune import knobs as knobs_module
from lntune.backends import cuda
from lntune.backends.cpu import runtime
from lntune.backends.cuda import launcher
from lntune.backends.cuda.device_code import Binary
from lntune.case import Case
from lntune.device import Device
from lntune.errors import BuildError, ScheduleError, ToolchainError
from lntune.schedule import Schedule
from lntune.system import native, paths, sealed, sources, toolchain
from lntune.system.sealed import DamagedError
from lntune.versions import Code


class Key(msgspec.Struct, frozen=True):
    """What a kernel is built from, which any machine knows that looks for it. Timings and the log
    are not among it, nor what it is built with: a kernel that comes from elsewhere is found where
    there is neither TVM nor a compiler. That is kept with the file, see `Tools`.
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
    target = {**device.target(), "blocks": case.blocks(device.cores)}
    target.pop("num-cores", None)
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
        runtime.source_hash() if device.kind == "cpu" else "",
    )


def path_of(key: Key) -> Path:
    """Where the kernel of this key lies once built."""
    return paths.cached(
        "kernels",
        key.op,
        f"{key.digest}.{native.FORMAT}.{'gpu' if key.target['kind'] == 'cuda' else 'so'}",
    )


def _tools(kind: str) -> sealed.Facts:
    """What this machine builds kernels with, by name; nothing of what it lacks."""
    tools = {
        "apache-tvm": toolchain.installed("apache-tvm"),
        "cuda": cuda.stamp() if kind == "gpu" else "",
    }
    return {name: tool for name, tool in tools.items() if tool not in ("", toolchain.MISSING)}


def _outdated(facts: sealed.Facts, schedule: Schedule) -> bool:
    """True for a kernel that was built by other tools than this machine has, or of code that was
    edited since without a new version, where this machine has all that it takes to build it anew.
    """
    tools = _tools(schedule.kind)
    if (
        "apache-tvm" not in tools
        or (schedule.kind == "gpu" and "cuda" not in tools)
        or toolchain.incompatible()
    ):
        return False
    if not sources.unchanged(facts, schedule.path):
        return True
    if tools.items() <= facts.items():
        return False
    # The same CUDA compiler may lie elsewhere; what it is takes long to ask, and is asked only
    # then.
    return tools["apache-tvm"] != facts.get("apache-tvm") or cuda.identity() != facts.get(
        "compiler"
    )


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
    return _holds(
        path_of(key_of(case.typical, schedule, setting, device, strided)), schedule, archs
    )


def _holds(path: Path, schedule: Schedule, archs: tuple[str, ...]) -> bool:
    """True when a sound file is there, and has code for some architectures beside that of its
    own.
    """
    try:
        facts = sealed.read(path).facts
    except (DamagedError, OSError):
        return False
    return not _outdated(facts, schedule) and (not archs or _architectures(path) >= set(archs))


def _architectures(path: Path) -> set[str]:
    """What a stored GPU kernel has code for; nothing where there is none, or a damaged one."""
    try:
        return set(read(path).images)
    except DamagedError:
        return set()


def prepare(
    case: Case,
    schedule: Schedule,
    setting: Any,
    device: Device,
    archs: tuple[str, ...] = (),
    strided: bool = False,
) -> Path:
    """The file of a kernel, built now if it is not in the cache; nothing is loaded, and a GPU need
    not be here.

    `archs` are architectures whose code a GPU's kernel holds beside that of the device's own and
    what it held before, for those who load the file themselves (launcher.load(read(path))): a GPU
    of another architecture looks for a kernel with the knobs that are best there. `strided` is as
    kernel's.

    Raises:
        BuildError: it cannot be built or stored.
        ScheduleError: the knobs do not fit.
    """
    case = case.typical
    key = key_of(case, schedule, setting, device, strided)
    path = path_of(key)
    if path.is_file():
        with contextlib.suppress(OSError):
            try:
                sealed.read(path)
            except DamagedError as e:
                sealed.put_aside(path, str(e))
    if not _holds(path, schedule, archs):
        _build(key, case, schedule, setting, device, archs, strided, path)
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
) -> None:
    """Build a kernel and store it under its name; arguments as prepare's."""
    # the compiler is imported only when something must be built
    from lntune.kernels import compiler as build

    facts = {
        **_tools(device.kind),
        **sources.stamp(schedule.path),
        "key": msgspec.json.encode(key, order="sorted").decode(),
    }
    if device.kind == "gpu":
        # what one call asked for is not lost when another asks for more
        kept = _architectures(path)
        with native.atomic(path) as temporary:
            binary = build.binary(
                case, schedule, setting, device, sorted({device.isa, *archs, *kept}), strided
            )
            temporary.write_bytes(msgspec.msgpack.encode(binary))
            sealed.seal(temporary, {**facts, "compiler": binary.compiler})
    else:
        build.to_library(case, schedule, setting, device, path, strided, facts)


def kernel(
    case: Case, schedule: Schedule, setting: Any, device: Device, strided: bool = False
) -> Callable[..., None]:
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
    path = path_of(key)
    load: Callable[[], Callable[..., None]] = functools.partial(runtime.load, path)
    if device.kind == "gpu":
        # What the driver says against a file that is whole would be said of a new one too.
        if launcher.missing() and not launcher.count():
            raise ToolchainError(
                f"{case} ({schedule.name}): no GPU can be used here: {launcher.missing()}"
            )
        load = functools.partial(_launchable, path)

    def make() -> None:
        _build(key, case, schedule, setting, device, (), strided, path)

    if not _there(path, schedule, make):
        make()
    return native.fetch(path, load, make)


def _there(path: Path, schedule: Schedule, make: Callable[[], None]) -> bool:
    """True when a file is there for `native.fetch`. One of other tools than this machine's, or of
    other code, is made anew before, where that succeeds.
    """
    try:
        outdated = _outdated(sealed.facts(path), schedule)
    except DamagedError:
        return path.is_file()
    if outdated:
        with contextlib.suppress(BuildError, ScheduleError):
            make()
    return True


def _launchable(path: Path) -> Callable[..., None]:
    return launcher.load(read(path))


def read(path: Path) -> Binary:
    """A stored GPU kernel.

    Raises:
        DamagedError: the file is missing, damaged, or of another release of lntune.
    """
    try:
        return msgspec.msgpack.decode(sealed.read(path).content, type=Binary)
    except DamagedError as e:
        raise DamagedError(f"cannot load the kernel {e}") from e
    except (OSError, msgspec.MsgspecError) as e:
        raise DamagedError(f"cannot load the kernel {path}: {e}") from e
