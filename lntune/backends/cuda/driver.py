"""NVIDIA's driver (libcuda): which GPUs this machine has, and what they are.

It is opened through launcher.c when it is first needed. A process that forks after that cannot use
CUDA in the child, so nothing opens it while modules are imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import threading
import time
from pathlib import Path
from typing import Any

from lntune.architectures import ARCHITECTURES, Architecture
from lntune.device import Device
from lntune.errors import InputError, LntuneError, ToolchainError, got_expected
from lntune.system import exchange, native, paths
from lntune.system.later import Later, passes

SOURCE = paths.PACKAGE / "backends" / "cuda" / "launcher.c"
LIBRARY = "libcuda.so.1"
CPU, CUDA = 1, 2
"""DLPack's device types."""
# CUdevice_attribute, from cuda.h
_MULTIPROCESSORS, _L2, _MAJOR, _MINOR, _SHARED = 16, 38, 75, 76, 97
_KERNEL_MODULE = re.compile(r"Kernel Module\D*?(\d[\d.]+)")
_lock = threading.RLock()


def ensure_library() -> Path:
    """Compile launcher.c if it is not there yet (once per machine); the answer is its file."""
    return native.compiled(SOURCE, native.Build(tuple(exchange.includes())))


@functools.cache
def library() -> ctypes.CDLL:
    """launcher.c, connected to torch and tvm_ffi.

    Raises:
        BuildError: it cannot be compiled, stored or loaded.
        ToolchainError: this PyTorch has no DLPack exchange table.
    """
    if (table := exchange.table()) is None:
        raise ToolchainError(
            "this PyTorch has no DLPack exchange table; GPU kernels need torch 2.10 or newer."
        )
    launcher = native.load(SOURCE, ctypes.CDLL, native.Build(tuple(exchange.includes())))
    launcher.lntune_launcher_init(
        table, *exchange.functions("TVMFFIErrorSetRaisedFromCStr", "TVMFFIFunctionCreate")
    )
    launcher.lntune_driver_open.restype = ctypes.c_void_p
    launcher.lntune_program.restype = ctypes.c_void_p
    return launcher


class Driver:
    """An open driver. `handle` is launcher.c's, null where there is none that can be used;
    `missing` then says why, and `fault` is the exception, where there was one.
    """

    def __init__(self, path: str, device_type: int) -> None:
        self.path, self.count, self.version, self.missing = path, 0, 0, ""
        self.device_type = device_type
        self.handle: ctypes.c_void_p | None = None
        self.fault: Exception | None = None
        self.later = Later()
        try:
            ctypes.CDLL(path)  # where there is no driver, nothing is compiled to ask it
        except OSError as e:
            self.missing = f"no NVIDIA driver ({e})."
            return
        try:
            calls = library()
        except Exception as e:
            self.fault = e
            self.missing = str(e) if isinstance(e, LntuneError) else f"{type(e).__name__}: {e}"
            return
        why = ctypes.create_string_buffer(1024)
        handle = calls.lntune_driver_open(path.encode(), device_type, why, len(why))
        if not handle:
            self.missing = f"{why.value.decode(errors='replace')}."
            return
        self.handle = ctypes.c_void_p(handle)
        self.count = calls.lntune_driver_count(self.handle)
        self.version = calls.lntune_driver_version(self.handle)

    @property
    def release(self) -> str:
        """The CUDA release the driver is for, such as "13.0"."""
        return f"{self.version // 1000}.{self.version % 1000 // 10}"

    def attribute(self, ordinal: int, number: int) -> int:
        """One of CUdevice_attribute of a GPU; -1 where the driver does not know it."""
        return int(library().lntune_device_attribute(self.handle, ordinal, number))

    def capability(self, ordinal: int) -> tuple[int, int]:
        """The compute capability of a GPU, such as (9, 0)."""
        return self.attribute(ordinal, _MAJOR), self.attribute(ordinal, _MINOR)

    @functools.cached_property
    def devices(self) -> tuple[Device | str, ...]:
        """The GPUs in the order of their ordinals; in the place of one that cannot be used, why
        not.
        """
        return tuple(self._device(i) for i in range(self.count))

    def _device(self, ordinal: int) -> Device | str:
        text = ctypes.create_string_buffer(256)
        library().lntune_device_name(self.handle, ordinal, text, len(text))
        name, capability = text.value.decode(errors="replace"), self.capability(ordinal)
        architecture = nearest(capability)
        if isinstance(architecture, str):
            return (
                f"{name} (cuda:{ordinal}) is of compute capability {capability[0]}.{capability[1]};"
                f" {architecture}"
            )
        shared = self.attribute(ordinal, _SHARED)
        return Device(
            "gpu",
            name,
            architecture.name,
            self.attribute(ordinal, _MULTIPROCESSORS),
            l2=max(self.attribute(ordinal, _L2), 0),
            shared_memory=shared if shared > 0 else architecture.shared_block,
        )


def capability_of(arch: str) -> tuple[int, int]:
    """The compute capability of an architecture: (9, 0) of "sm_90"."""
    number = int(arch.removeprefix("sm_"))
    return number // 10, number % 10


def nearest(capability: tuple[int, int]) -> Architecture | str:
    """The architecture whose code runs best on a compute capability: of the same major number, the
    highest minor not above it.

    The answer is text, and says why, where there is none.
    """
    major, minor = capability
    fitting = [
        a
        for a in ARCHITECTURES.values()
        if capability_of(a.name)[0] == major and capability_of(a.name)[1] <= minor
    ]
    if fitting:
        return max(fitting, key=lambda a: capability_of(a.name))
    oldest, newest = (
        capability_of(a) for a in (next(iter(ARCHITECTURES)), list(ARCHITECTURES)[-1])
    )
    if capability < oldest:
        return f"kernels are built for {oldest[0]}.{oldest[1]} and newer. Eager mode serves it."
    update = "Update lntune, if there is a newer release. " if capability > newest else ""
    return (
        f"no architecture kernels are built for is of that family ({', '.join(ARCHITECTURES)})."
        f" {update}Eager mode serves it."
    )


def place(ordinal: int) -> str:
    """PyTorch's name of a GPU that is here: "cuda:1"; "cpu" where `use` says that its tensors are
    the CPU's.
    """
    return "cpu" if opened().device_type == CPU else f"cuda:{ordinal}"


_chosen: tuple[str, int] = (LIBRARY, CUDA)
_opened: dict[tuple[str, int], Driver] = {}


def use(path: Any = None, device_type: int = CUDA) -> None:
    """Take another driver's library from now on, and tensors of a DLPack device type; without
    arguments, NVIDIA's again.

    For tests: a driver that runs kernels on the CPU takes tensors of the CPU. Kernels loaded before
    stay with the driver they were loaded by.
    """
    global _chosen  # noqa: PLW0603 (one driver to a process, as CUDA has it)
    _chosen = (LIBRARY, CUDA) if path is None else (str(path), device_type)


def opened() -> Driver:
    """The driver, opened at the first call; `missing` says why it cannot be used, if so. A failure
    that may be temporary is tried again later.
    """
    with _lock:
        driver = _opened.get(_chosen)
        if driver is None or (
            driver.fault is not None and passes(driver.fault) and driver.later.due
        ):
            begun, later = time.monotonic(), Later() if driver is None else driver.later
            driver = _opened[_chosen] = Driver(*_chosen)
            driver.later = later
            if driver.fault is not None:
                later.failed(time.monotonic() - begun)
        return driver


def release() -> str:
    """The driver's own release where the system tells it, such as "550.54.15", and the CUDA release
    that it is for.
    """
    with contextlib.suppress(OSError):
        if found := _KERNEL_MODULE.search(Path("/proc/driver/nvidia/version").read_text()):
            return f"{found[1]} (CUDA {opened().release})"
    return f"CUDA {opened().release}"


def missing() -> str:
    """Why no GPU can be used here; empty when one can."""
    driver = opened()
    reasons = [entry for entry in driver.devices if isinstance(entry, str)]
    if driver.missing or len(reasons) < driver.count:
        return driver.missing
    return " ".join(reasons)


def count() -> int:
    """GPUs that the driver shows (CUDA_VISIBLE_DEVICES counts); 0 where there is no driver that can
    be used, see `missing`.
    """
    return opened().count


def device(ordinal: int) -> Device:
    """A GPU that is here, by the number that PyTorch has for it.

    `isa` is the best known architecture whose code it runs, `shared_memory` what a block may opt
    into, in bytes.

    Raises:
        InputError: there is no such GPU.
        ToolchainError: there is no driver that can be used, or no code can be made for this GPU.
    """
    driver = opened()
    if driver.missing:
        remedy = "One that is elsewhere is named by its architecture (cuda:sm_90), for dry runs."
        raise ToolchainError(
            f"no GPU can be used here: {driver.missing} {remedy}"
        ) from driver.fault
    if not 0 <= ordinal < driver.count:
        raise InputError(
            got_expected(
                "device",
                f"cuda:{ordinal}",
                f"cuda:0 to cuda:{driver.count - 1}",
                "See CUDA_VISIBLE_DEVICES.",
            )
        )
    gpu = driver.devices[ordinal]
    if isinstance(gpu, str):  # why it cannot be used
        raise ToolchainError(gpu)
    return gpu


def ordinal_of(wanted: Device) -> int | None:
    """The first GPU here that is this device; None where there is none."""
    return next(
        (
            i
            for i, gpu in enumerate(opened().devices)
            if isinstance(gpu, Device) and not gpu.differences(wanted)
        ),
        None,
    )
