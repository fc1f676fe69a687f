"""operator x schedule x knobs x device -> code. The only caller of TVM's compiler."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lntune import knobs as knobs_module
from lntune import ops
from lntune.backends import cuda
from lntune.backends.cpu import runtime
from lntune.backends.cuda import device_code
from lntune.case import Case
from lntune.device import Device
from lntune.errors import BuildError, LntuneError, ScheduleError, ToolchainError, UnfitError, gist
from lntune.schedule import Schedule
from lntune.system import native, sealed, toolchain
from lntune.transforms import strides
from lntune.transforms.cpu import streaming

_lock = threading.Lock()

FORMS = ("te", "tir", "source", "asm")
"""What `show` can print: the definition, the scheduled loops, the code TVM makes of them (LLVM IR
or CUDA C++), assembly (PTX).
"""


def _tvm() -> Any:
    """TVM, imported once, with a clear error where it does not fit."""
    if "tvm" not in sys.modules and (problems := toolchain.incompatible()):
        raise ToolchainError("; ".join(problems) + ".")
    try:
        import tvm
    except Exception as e:  # half an installation, a library of the system that is missing
        raise ToolchainError(
            f"TVM cannot be imported: {type(e).__name__}: {gist(e)}. Install apache-tvm again."
        ) from e

    return tvm


def warm_up() -> None:
    """Import the compiler now, so that no later call pays for it.

    Raises:
        ToolchainError: the installed TVM does not fit.
    """
    _tvm()


def scheduled(
    case: Case, schedule: Schedule, setting: Any, device: Device, strided: bool = False
) -> Any:
    """The scheduled IRModule; `strided`: for matrices whose rows may lie anywhere.

    Raises:
        UnfitError: the knobs do not fit the case.
        ScheduleError: the schedule itself failed.
    """
    if reason := schedule.reason_invalid(setting, case, device):
        what = f"{schedule.name} ({knobs_module.describe(setting)}) does not fit {case}"
        raise UnfitError(f"{what}: {reason}.", reason)
    _tvm()
    try:
        module = schedule.apply(case, setting, device)
        if not strided:
            return module
        access = (
            min(_access(setting), device_code.WIDEST // case.itemsize)
            if device.kind == "gpu"
            else None
        )
        return strides.free_rows(module, ops.get(case.op).arguments(case), access)
    except LntuneError:
        raise
    except Exception as e:
        what = (
            f"{schedule.name} ({knobs_module.describe(setting)}) failed on {case}{schedule.line(e)}"
        )
        raise ScheduleError(f"{what}: {type(e).__name__}: {gist(e)}") from e


def program(
    case: Case, schedule: Schedule, setting: Any, device: Device, strided: bool = False
) -> device_code.Program:
    """A kernel for a GPU, which need not be here, as CUDA source and its launches; `strided` is as
    in scheduled.

    Raises:
        ScheduleError: the knobs do not fit the case, or the schedule itself failed.
        BuildError: TVM cannot compile what came of it.
    """
    with _lock:
        free = strides.names(ops.get(case.op).arguments(case)) if strided else {}
        return device_code.generate(
            scheduled(case, schedule, setting, device, strided),
            device.target(),
            tuple(free.values()),
        )


def _access(setting: Any) -> int:
    """Elements of the widest access of a GPU's kernel, by its knobs."""
    return int(knobs_module.to_dict(setting).get("vector_width", device_code.WIDEST))


def binary(
    case: Case,
    schedule: Schedule,
    setting: Any,
    device: Device,
    archs: Sequence[str] | None = None,
    strided: bool = False,
) -> device_code.Binary:
    """A kernel for GPUs, which need not be here, as it is stored: device code for each of `archs`
    (the device's alone if not given); `strided` is as in scheduled.

    Raises:
        ScheduleError: the knobs do not fit the case, or the schedule itself failed.
        BuildError: TVM or the CUDA compiler cannot compile what came of it; ToolchainError: there
            is no CUDA compiler.
        UnknownNameError: there is no such architecture.
    """
    wanted = sorted(
        {cuda.architecture(arch).name for arch in archs or (device.isa,)},
        key=list(cuda.ARCHITECTURES).index,
    )
    made = program(case, schedule, setting, device, strided)
    compiled = {arch: cuda.to_cubin(made.source, arch) for arch in wanted}
    listed = ops.get(case.op).arguments(case)
    free = strides.names(listed) if strided else {}
    sizes = {a.name: a.sizes(0, case.hidden, case.blocks(device.cores)) for a in listed}
    shapes = {
        a.name: tuple(
            "rows" if axis == "rows" else str(n)
            for axis, n in zip(a.shape, sizes[a.name], strict=True)
        )
        for a in listed
    }
    return device_code.Binary(
        title=(
            f"{case.op} of hidden size {case.hidden},"
            f" {case.dtype}{', ' + case.variant if case.variant else ''} ({schedule.name})"
        ),
        arguments=tuple(
            device_code.Argument(a.name, a.role, a.dtype, shapes[a.name], free.get(a.name, ""))
            for a in listed
        ),
        access=_access(setting),
        launches=made.launches,
        scratch=made.scratch,
        images={arch: one.cubin for arch, one in compiled.items()},
        ptx=compiled[wanted[-1]].ptx,
        compiler=cuda.identity(),
    )


def _compile(module: Any, device: Device) -> Any:
    tvm = _tvm()
    target = tvm.target.Target(device.target())
    try:
        executable = tvm.compile(module, target=target)
    except Exception as e:
        raise BuildError(f"TVM failed to compile: {type(e).__name__}: {gist(e)}") from e
    parameter = streaming.requested(module)
    return (
        tvm.runtime.Executable(streaming.apply(executable.mod, parameter, device.vector_bytes))
        if parameter
        else executable
    )


def in_memory(
    case: Case, schedule: Schedule, setting: Any, device: Device, strided: bool = False
) -> Callable[..., None]:
    """A kernel compiled into this process without touching the disk: what a trial runs; `strided`
    is as in scheduled.
    """
    with _lock:
        executable = _compile(scheduled(case, schedule, setting, device, strided), device)
        with runtime.own_symbols():
            function = executable["main"]
    runtime._keep.append(executable)
    return function  # type: ignore[no-any-return]


def _link(output: str, objects: list[str], options: Sequence[str] = ()) -> None:
    """What TVM calls to make a shared library of object files."""
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    toolchain.run_compiler(["-shared", "-fPIC", *undefined, *options, *objects], Path(output))


def to_library(
    case: Case,
    schedule: Schedule,
    setting: Any,
    device: Device,
    path: Path,
    strided: bool = False,
    facts: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """A kernel as a shared library at `path`, written whole or not at all, with a digest and facts
    behind it, see `sealed`; `strided` is as in scheduled.
    """
    linker = toolchain.compiler()  # where there is none, nothing is compiled first
    with _lock, native.atomic(path) as temporary:
        executable = _compile(scheduled(case, schedule, setting, device, strided), device)
        try:
            executable.export_library(os.fspath(temporary), fcompile=_link)
            sealed.seal(temporary, facts)
        except OSError:
            raise
        except Exception as e:
            raise BuildError(f"linking {path.name} with {linker} failed: {e}") from e


def show(case: Case, schedule: Schedule, setting: Any, device: Device, form: str) -> str:
    """The kernel as text, in one of FORMS."""
    if form == "te":
        from lntune.transforms.cpu import row_sums

        _tvm()
        return str(ops.get(case.op).define(case, row_sums.plain_sum).script())
    if device.kind == "gpu" and form != "tir":
        source = program(case, schedule, setting, device).source
        return source if form == "source" else cuda.to_cubin(source, device.isa).ptx
    module = scheduled(case, schedule, setting, device)
    if form == "tir":
        return str(module.script())
    executable = _compile(module, device)
    return str(executable.mod.inspect_source({"source": "ll", "asm": "asm"}[form]))
