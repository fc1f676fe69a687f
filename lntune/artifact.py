"""The on-disk cache of built kernels. Deleting it costs only time."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from lntune import knobs as knobs_module
from lntune import native, paths, runtime, toolchain
from lntune.case import Case
from lntune.device import Device
from lntune.errors import BuildError, ToolchainError
from lntune.schedule import Schedule


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


def key_of(case: Case, schedule: Schedule, setting: Any, device: Device) -> Key:
    """The key of one kernel."""
    versions = {package: toolchain.installed(package) for package in toolchain.COMPATIBLE}
    return Key(
        case.op,
        case.hidden,
        case.dtype,
        case.variant,
        case.bucket,
        schedule.name,
        schedule.source,
        knobs_module.to_dict(setting),
        device.target(),
        versions,
        runtime.source_hash(),
    )


def path_of(key: Key) -> Path:
    """Where the kernel of this key lies once built."""
    return paths.cache_dir() / "kernels" / key.op / f"{key.digest}.so"


def kernel(case: Case, schedule: Schedule, setting: Any, device: Device) -> Callable[..., None]:
    """The kernel for a case, from the cache or built now and put there.

    A cached file that does not load (half a disk, another libc) is thrown away and built again.

    Raises:
        BuildError: it is not cached and cannot be built or stored.
        ScheduleError: the knobs do not fit.
    """
    case = case.typical
    key = key_of(case, schedule, setting, device)
    path = path_of(key)
    if path.is_file():
        try:
            return runtime.load(path)
        except ToolchainError:  # the runtime, not this file, is what is missing
            raise
        except BuildError:
            with contextlib.suppress(OSError):
                path.unlink()
    from lntune import build  # the compiler is imported only when something must be built

    build.to_library(case, schedule, setting, device, path)
    with contextlib.suppress(BuildError), native.atomic(path.with_suffix(".json")) as temporary:
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(key, order="sorted"), indent=1))
    return runtime.load(path)
