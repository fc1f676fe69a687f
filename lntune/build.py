"""operator x schedule x knobs x device -> code. The only caller of TVM's compiler."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lntune import cuda, device_code, native, runtime, streaming, toolchain
from lntune import knobs as knobs_module
from lntune.case import Case
from lntune.device import Device
from lntune.errors import BuildError, LntuneError, ScheduleError, ToolchainError, gist
from lntune.schedule import Schedule

_lock = threading.Lock()

FORMS = ("te", "tir", "source", "asm")
"""What `show` can print: the definition, the scheduled loops, the code TVM makes of them (LLVM IR or CUDA C++), assembly (PTX)."""


def _tvm() -> Any:
    """TVM, imported once, with a clear error where it does not fit."""
    if "tvm" not in sys.modules and (problems := toolchain.incompatible()):
        raise ToolchainError("; ".join(problems) + ".")
    import tvm

    return tvm


def warm_up() -> None:
    """Import the compiler now, so that no later call pays for it.

    Raises:
        ToolchainError: the installed TVM does not fit.
    """
    _tvm()


def scheduled(case: Case, schedule: Schedule, setting: Any, device: Device) -> Any:
    """The scheduled IRModule.

    Raises:
        ScheduleError: the knobs do not fit the case, or the schedule itself failed.
    """
    if reason := schedule.reason_invalid(setting, case, device):
        raise ScheduleError(f"{schedule.name} ({knobs_module.describe(setting)}) does not fit {case}: {reason}.")
    _tvm()
    try:
        return schedule.apply(case, setting, device)
    except LntuneError:
        raise
    except Exception as e:
        raise ScheduleError(f"{schedule.name} ({knobs_module.describe(setting)}) failed on {case}: {type(e).__name__}: {gist(e)}") from e


def program(case: Case, schedule: Schedule, setting: Any, device: Device) -> device_code.Program:
    """A kernel for a GPU, which need not be here, as CUDA source and its launches.

    Raises:
        ScheduleError: the knobs do not fit the case, or the schedule itself failed.
        BuildError: TVM cannot compile what came of it.
    """
    with _lock:
        return device_code.generate(scheduled(case, schedule, setting, device), device.target())


def _compile(module: Any, device: Device) -> Any:
    tvm = _tvm()
    target = tvm.target.Target(device.target())
    try:
        executable = tvm.compile(module, target=target)
    except Exception as e:
        raise BuildError(f"TVM failed to compile: {type(e).__name__}: {gist(e)}") from e
    parameter = streaming.requested(module)
    return tvm.runtime.Executable(streaming.apply(executable.mod, parameter, device.vector_bytes)) if parameter else executable


def in_memory(case: Case, schedule: Schedule, setting: Any, device: Device) -> Callable[..., None]:
    """A kernel compiled into this process without touching the disk: what a trial runs."""
    with _lock:
        executable = _compile(scheduled(case, schedule, setting, device), device)
        with runtime.own_symbols():
            function = executable["main"]
    runtime._keep.append(executable)
    return function  # type: ignore[no-any-return]


def to_library(case: Case, schedule: Schedule, setting: Any, device: Device, path: Path) -> None:
    """A kernel as a shared library at `path`, written whole or not at all."""
    linker = toolchain.compiler()
    with _lock:
        executable = _compile(scheduled(case, schedule, setting, device), device)
        with native.atomic(path) as temporary:
            try:
                executable.export_library(os.fspath(temporary), cc=linker)
            except OSError:
                raise
            except Exception as e:
                raise BuildError(f"linking {path.name} with {linker} failed: {e}") from e


def show(case: Case, schedule: Schedule, setting: Any, device: Device, form: str) -> str:
    """The kernel as text, in one of FORMS."""
    if form == "te":
        from lntune import loops, ops

        _tvm()
        return str(ops.get(case.op).define(case, loops.plain_sum).script())
    module = scheduled(case, schedule, setting, device)
    if form == "tir":
        return str(module.script())
    if device.kind == "gpu":
        source = program(case, schedule, setting, device).source
        return source if form == "source" else cuda.to_cubin(source, device.isa).ptx
    executable = _compile(module, device)
    return str(executable.mod.inspect_source({"source": "ll", "asm": "asm"}[form]))
