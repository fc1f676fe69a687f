"""The on-disk cache of built kernels. Deleting it costs only time."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from lntune import cuda, native, paths, runtime, toolchain
from lntune import knobs as knobs_module
from lntune.case import Case
from lntune.cuda import launcher
from lntune.device import Device
from lntune.device_code import Binary
from lntune.errors import BuildError, ToolchainError
from lntune.schedule import Schedule

_FORMAT = 1
"""Of the files of GPU kernels; part of their key."""
_CHECKSUM = 32
"""Bytes of SHA-256, with which such a file begins."""


class DamagedError(BuildError):
    """A file in the cache is not a whole kernel."""


class Key(msgspec.Struct, frozen=True):
    """Everything the bytes of a kernel depend on. Timings and the log are not among it."""

    op: str
    hidden: int
    dtype: str
    variant: str
    bucket: int  # kernels take any number of rows, but a schedule may look at the bucket it is for
    schedule: str
    source: str
    knobs: dict[str, Any]
    target: dict[str, Any]
    versions: dict[str, str]
    runtime: str

    @property
    def digest(self) -> str:
        """The file name this key stands for."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()[:24]


def key_of(case: Case, schedule: Schedule, setting: Any, device: Device, strided: bool = False) -> Key:
    """The key of one kernel; `strided` is as kernel's."""
    versions = {package: toolchain.installed(package) for package in toolchain.COMPATIBLE}
    target = device.target()
    if device.kind == "gpu":
        versions["format"] = str(_FORMAT)
        # Sums have a row for each multiprocessor, or for fewer.
        target["blocks"] = case.blocks(device.cores)
    if strided:
        target["strided"] = native.source_hash(paths.PACKAGE / "strides.py")
    return Key(
        case.op,
        case.hidden,
        case.dtype,
        case.variant,
        case.bucket,
        schedule.name,
        schedule.source,
        knobs_module.to_dict(setting),
        target,
        versions,
        runtime.source_hash() if device.kind == "cpu" else "",
    )


def path_of(key: Key) -> Path:
    """Where the kernel of this key lies once built. A GPU's has the compiler in its name too; where there is none, any will do."""
    folder = paths.cache_dir() / "kernels" / key.op
    if key.target["kind"] != "cuda":
        return folder / f"{key.digest}.so"
    if compiler := cuda.stamp():
        return folder / f"{key.digest}-{hashlib.sha256(compiler.encode()).hexdigest()[:8]}.gpu"
    found = sorted(folder.glob(f"{key.digest}-*.gpu"), key=lambda p: p.stat().st_mtime)
    return found[-1] if found else folder / f"{key.digest}-none.gpu"


def built(case: Case, schedule: Schedule, setting: Any, device: Device, archs: tuple[str, ...] = (), strided: bool = False) -> bool:
    """True when the kernel lies in the cache; arguments as prepare's."""
    return _holds(path_of(key_of(case.typical, schedule, setting, device, strided)), archs)


def _holds(path: Path, archs: tuple[str, ...]) -> bool:
    """True when a file is there, and has code for some architectures beside that of its own."""
    return path.is_file() and (not archs or _architectures(path) >= set(archs))


def _architectures(path: Path) -> set[str]:
    """What a stored GPU kernel has code for; nothing where there is none, or a damaged one."""
    try:
        return set(read(path).images)
    except DamagedError:
        return set()


def prepare(case: Case, schedule: Schedule, setting: Any, device: Device, archs: tuple[str, ...] = (), strided: bool = False) -> Path:
    """The file of a kernel, built now if it is not in the cache; nothing is loaded, and a GPU need not be here.

    `archs` are architectures whose code a GPU's kernel holds beside that of the device's own and what it held before, for those who load
    the file themselves (launcher.load(read(path))): a GPU of another architecture looks for a kernel with the knobs that are best there.
    `strided` is as kernel's.

    Raises:
        BuildError: it cannot be built or stored.
        ScheduleError: the knobs do not fit.
    """
    case = case.typical
    key = key_of(case, schedule, setting, device, strided)
    path = path_of(key)
    if _holds(path, archs):
        return path
    from lntune import build  # the compiler is imported only when something must be built

    if device.kind == "gpu":
        kept = _architectures(path)  # what one call asked for is not lost when another asks for more
        _store(build.binary(case, schedule, setting, device, sorted({device.isa, *archs, *kept}), strided), path)
    else:
        build.to_library(case, schedule, setting, device, path, strided)
    with contextlib.suppress(BuildError), native.atomic(path.with_suffix(".json")) as temporary:
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(key, order="sorted"), indent=1))
    return path


def kernel(case: Case, schedule: Schedule, setting: Any, device: Device, strided: bool = False) -> Callable[..., None]:
    """The kernel for a case, from the cache or built now and put there: a function of tensors in the operator's order.

    `strided`: one that reads matrices whose rows lie anywhere; others want them one behind the other.
    A cached file that does not load (half a disk, another libc) is thrown away and built again.

    Raises:
        BuildError: it is not cached and cannot be built or stored, or no GPU is here that runs it.
        ScheduleError: the knobs do not fit.
    """
    path = path_of(key_of(case.typical, schedule, setting, device, strided=strided))
    if device.kind == "gpu":
        return _gpu_kernel(case, schedule, setting, device, strided, path)
    if path.is_file():
        try:
            return runtime.load(path)
        except ToolchainError:  # the runtime, not this file, is what is missing
            raise
        except BuildError:
            with contextlib.suppress(OSError):
                path.unlink()
    return runtime.load(prepare(case, schedule, setting, device, strided=strided))


def _gpu_kernel(case: Case, schedule: Schedule, setting: Any, device: Device, strided: bool, path: Path) -> Callable[..., None]:
    """The kernel in a file; what the driver says against a file that is whole would be said of a new one too."""
    if launcher.missing() and not launcher.count():
        raise ToolchainError(f"{case} ({schedule.name}): no GPU can be used here: {launcher.missing()}")
    if path.is_file():
        try:
            return launcher.load(read(path))
        except DamagedError:
            with contextlib.suppress(OSError):
                path.unlink()
    return launcher.load(read(prepare(case, schedule, setting, device, strided=strided)))


def _store(binary: Binary, path: Path) -> None:
    """Write a GPU's kernel, whole or not at all.

    Raises:
        BuildError: the folder cannot be written or the disk is full.
    """
    content = msgspec.msgpack.encode(binary)
    with native.atomic(path) as temporary:
        temporary.write_bytes(hashlib.sha256(content).digest() + content)


def read(path: Path) -> Binary:
    """A stored GPU kernel.

    Raises:
        DamagedError: the file is missing, damaged, or of another release of lntune.
    """
    try:
        content = path.read_bytes()
        if hashlib.sha256(content[_CHECKSUM:]).digest() != content[:_CHECKSUM]:
            raise DamagedError(f"cannot load the kernel {path}: it is damaged.")
        return msgspec.msgpack.decode(content[_CHECKSUM:], type=Binary)
    except (OSError, msgspec.MsgspecError) as e:
        raise DamagedError(f"cannot load the kernel {path}: {e}") from e
