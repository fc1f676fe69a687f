"""From an operator, a schedule, knobs and a device to a compiled kernel. No other module calls
schedules.

What a kind of device makes of a scheduled kernel is its backend's business.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lntune import backends, ops
from lntune import knobs as knobs_module
from lntune.backends.backend import TVM, Kernel, Scheduled
from lntune.backends.cuda import program as programs
from lntune.backends.cuda.device_code import Program
from lntune.case import Case
from lntune.device import Device
from lntune.errors import LntuneError, ScheduleError, ToolchainError, UnfitError, gist
from lntune.schedule import Schedule
from lntune.system import native, sealed, toolchain
from lntune.transforms import strides
from lntune.words import counted

FORMS = ("te", "tir", "source", "asm")
"""What `show` can print: the definition, the scheduled loops, the code TVM makes of them (LLVM IR
or CUDA C++), assembly (PTX).
"""


def _ensure_tvm() -> None:
    """Complain where TVM is not installed, or does not fit, without importing it."""
    if "tvm" not in sys.modules and (problems := toolchain.incompatible()):
        raise ToolchainError("; ".join(problems) + ".")


def _tvm() -> Any:
    """TVM, imported once, with a clear error where it does not fit."""
    _ensure_tvm()
    try:
        import tvm
    except Exception as e:  # half an installation, a library of the system that is missing
        why = f"{type(e).__name__}: {gist(e)}"
        raise ToolchainError(
            f"TVM cannot be imported: {why}. Install apache-tvm again: {toolchain.TUNE}."
        ) from e
    _remember_types()
    return tvm


@functools.cache
def _remember_types() -> None:
    """Have TVM remember what the annotations of a schedule's methods mean, which it finds out anew
    at each call: a quarter of what scheduling takes. Arguments are checked as before.
    """
    from tvm.s_tir.schedule import _type_checker as checker

    for name in ("_dispatcher", "_type2str"):
        function = getattr(checker, name, None)
        if function is not None:  # else another release, where it is slow at worst
            setattr(checker, name, remembered(function))


def remembered(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of one argument whose answers are kept, but for arguments that cannot be keys."""
    kept = functools.cache(function)

    @functools.wraps(function)
    def ask(argument: Any) -> Any:
        try:
            return kept(argument)
        except TypeError:
            return function(argument)

    return ask


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
    name = f"{schedule.name} ({knobs_module.describe(setting)})"
    if reason := schedule.reason_invalid(setting, case, device):
        raise UnfitError(f"{name} does not fit {case}: {reason}.", reason)
    _tvm()
    try:
        with TVM:
            if not strided:
                return schedule.apply(case, setting, device)
            module = schedule.apply(case, schedule.apart(setting), device)
            widest = backends.of(device).widest(setting, case)
            return strides.free_rows(module, ops.get(case.op).arguments(case), widest)
    except LntuneError:
        raise
    except Exception as e:
        what = f"{name} failed on {case}{schedule.line(e)}"
        raise ScheduleError(f"{what}: {type(e).__name__}: {gist(e)}") from e


def _scheduled(
    case: Case, schedule: Schedule, setting: Any, device: Device, strided: bool = False
) -> Scheduled:
    module = scheduled(case, schedule, setting, device, strided)
    return Scheduled(case, schedule, setting, device, module, strided)


def program(
    case: Case, schedule: Schedule, setting: Any, device: Device, strided: bool = False
) -> Program:
    """A kernel for a GPU, which need not be here, as CUDA source and its launches; `strided` is as
    in scheduled.

    Raises:
        ScheduleError: the knobs do not fit the case, or the schedule itself failed.
        BuildError: TVM cannot compile what came of it.
    """
    return programs.program(_scheduled(case, schedule, setting, device, strided))


def lowered(case: Case, schedule: Schedule, setting: Any, device: Device) -> Scheduled:
    """A kernel for a GPU with its program, for those who need that more than once.

    Raises:
        ScheduleError, BuildError: as program.
    """
    one = _scheduled(case, schedule, setting, device)
    return dataclasses.replace(one, program=programs.program(one))


def in_memory(
    case: Case,
    schedule: Schedule,
    setting: Any,
    device: Device,
    strided: bool = False,
    checked: bool = True,
) -> Kernel:
    """A kernel compiled into this process without touching the disk; `strided` is as in scheduled,
    `checked` as in Scheduled.

    Raises:
        ScheduleError, BuildError: as program.
    """
    one = _scheduled(case, schedule, setting, device, strided)
    return backends.of(device).in_memory(dataclasses.replace(one, checked=checked))


def stand_in(case: Case, schedule: Schedule, setting: Any, device: Device) -> Kernel:
    """A function of the CPU's tensors that computes what a kernel does, without its device.

    Raises:
        ScheduleError, BuildError: as program.
    """
    return backends.of(device).stand_in(_scheduled(case, schedule, setting, device))


def to_file(
    case: Case,
    schedule: Schedule,
    setting: Any,
    device: Device,
    path: Path,
    strided: bool = False,
    facts: Mapping[str, str] = MappingProxyType({}),
    archs: Sequence[str] = (),
    known: Scheduled | None = None,
) -> None:
    """A kernel in a file at `path`, written whole or not at all, with a digest and facts behind it,
    see `sealed`; `strided` is as in scheduled, `archs` as in Backend.store. `known` is the same
    kernel where it was scheduled before.

    Raises:
        ScheduleError: the knobs do not fit the case, or the schedule itself failed.
        BuildError: it cannot be compiled or stored; ToolchainError: there is no compiler.
    """
    backend = backends.of(device)
    _ensure_tvm()
    backend.ensure_compiler()  # where there is none, nothing is scheduled first
    # what one call asked for is not lost when another asks for more
    wanted = sorted({*archs, *backend.architectures(path)})
    with native.atomic(path) as temporary:  # where it cannot be written, nothing is scheduled first
        one = known or _scheduled(case, schedule, setting, device, strided)
        sealed.seal(temporary, {**facts, **backend.store(one, temporary, wanted)})


def show(case: Case, schedule: Schedule, setting: Any, device: Device, form: str) -> str:
    """The kernel as text, in one of FORMS.

    Raises:
        ScheduleError, BuildError: as program.
    """
    if form == "te":
        from lntune.transforms.cpu import row_sums

        _tvm()
        return str(ops.get(case.op).define(case, row_sums.plain_sum).script())
    one = _scheduled(case, schedule, setting, device)
    return str(one.module.script()) if form == "tir" else backends.of(device).show(one, form)


def without_prelude(text: str) -> str:
    """CUDA source from its first kernel on, and how much stood before it: headers, and types that
    TVM defines where those do not. Any other text as it is.
    """
    prelude, kernel, rest = text.partition('extern "C" __global__')
    if not kernel:
        return text
    left_out = counted(prelude.count("\n"), "line")
    return f"// {left_out} of headers and types left out; --full shows them\n\n{kernel}{rest}"
