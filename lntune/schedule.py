"""What a schedule is, a way to turn an operator's definition into code, and how files of schedules
are found and loaded.

A schedule file lies in a folder named after the device kind (`schedules/cpu/`) and exports
`SCHEDULES`, a tuple of Schedule. It imports from lntune only what lies below this module, and does
nothing when imported. A file of the user's may do anything else: what cannot be used is left out,
which is said once, and the others serve.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

from lntune import knobs, ops
from lntune.case import Case
from lntune.device import Device
from lntune.errors import LntuneError, ScheduleError, UnknownNameError, got_expected, unknown
from lntune.system import callers, moved, paths, sources
from lntune.versions import LOWERING, Code


@dataclass(frozen=True)
class Schedule:
    """One way to turn an operator's definition into code."""

    name: str
    op: str
    kind: str
    """Device kind: "cpu" or "gpu"."""
    knobs: type
    """Frozen dataclass made of `knobs.knob` fields."""
    default: Callable[[Case, Device], Any]
    """(case, device) -> knobs that are valid and good without any tuning."""
    valid: Callable[[Any, Case, Device], str | None]
    """(knobs, case, device) -> why they do not fit, or None."""
    apply: Callable[[Case, Any, Device], Any]
    """(case, knobs, device) -> the scheduled IRModule. Pure: the same arguments give the same
    code.
    """
    version: int = 0
    """Raised when the code that `apply` makes changes; 0 where none is declared, and a hash of the
    file serves instead.
    """
    path: Path = field(default=Path(), compare=False)
    code: Code = field(default=Code(), compare=False)
    """What tells the code it makes from that of other versions; filled in by the loader."""

    @property
    def shipped(self) -> bool:
        """True for a schedule that comes with lntune, whose tests ask it all there is to ask."""
        return self.path.is_relative_to(paths.content("schedules"))

    def untuned(self, case: Case, device: Device) -> Any:
        """The default knobs for a case.

        Raises:
            ScheduleError: `default` fails or gives something else.
        """
        try:
            setting = self.default(case, device)
        except Exception as e:
            self._failed("default", case, e)
        if not isinstance(setting, self.knobs):
            raise ScheduleError(
                f"{self.path}: default() of {self.name!r} gave {setting!r} for {case}, expected"
                f" {self.knobs.__name__}."
            )
        return setting

    def setting(self, given: Mapping[str, Any]) -> Any:
        """The knobs that a dictionary stands for, as a log or another process has it.

        Raises:
            UnknownNameError: a name that is no knob of this schedule.
            InputError: a value the knob may not take.
        """
        return knobs.from_dict(self.knobs, given)

    def reason_invalid(self, setting: Any, case: Case, device: Device) -> str | None:
        """Why the knobs do not fit, or None.

        Raises:
            ScheduleError: `valid` fails or gives something else.
        """
        try:
            reason = self.valid(setting, case, device)
        except Exception as e:
            self._failed("valid", case, e)
        if reason is not None and not isinstance(reason, str):
            expected = "why the knobs do not fit, or None"
            raise ScheduleError(
                f"{self.path}: valid() of {self.name!r} gave {reason!r} for {case}, expected"
                f" {expected}."
            )
        return reason

    def space(self, case: Case, device: Device) -> list[Any]:
        """Every valid knob setting for the case.

        Raises:
            ScheduleError: the settings cannot be made, or `valid` fails.
        """
        try:
            return list(
                knobs.enumerate_space(self.knobs, lambda k: self.reason_invalid(k, case, device))
            )
        except ScheduleError:
            raise
        except Exception as e:
            self._failed(self.knobs.__name__, case, e)

    def _failed(self, function: str, case: Case, e: Exception) -> NoReturn:
        raise ScheduleError(
            f"{self.path}: {function}() of {self.name!r} failed on {case}{self.line(e)}:"
            f" {type(e).__name__}: {e}"
        ) from e

    def line(self, e: Exception) -> str:
        """Where in the schedule's file an error comes from, as " in line 12"; empty where it comes
        from elsewhere.
        """
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(e.__traceback__)
            if Path(frame.filename) == self.path
        ]
        return f" in line {lines[-1]}" if lines else ""


def _import(path: Path, kind: str) -> ModuleType:
    """The schedule file as a module, under a name that says where it belongs."""
    tag = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    name = f"lntune_schedules.{kind}.{path.stem}_{tag}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ScheduleError(f"{path}: not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        sys.modules.pop(name, None)
        reason = f"{type(e).__name__}: {e}"
        if remedy := moved.remedy(e):
            reason = f"{reason.rstrip('.')}. {remedy}"
        raise ScheduleError(f"{path}: the schedule file does not load: {reason}") from e
    return module


def load_file(path: Path, kind: str) -> list[Schedule]:
    """The schedules of one file, with what tells their code from that of other versions."""
    module = _import(path, kind)
    schedules = getattr(module, "SCHEDULES", None)
    if not isinstance(schedules, tuple) or not all(
        isinstance(s, Schedule) and isinstance(s.name, str) for s in schedules
    ):
        raise ScheduleError(f"{path}: expected SCHEDULES, a tuple of lntune.schedule.Schedule.")
    for s in schedules:
        if s.kind != kind:
            raise ScheduleError(
                f"{path}: schedule {s.name!r} is for {s.kind!r} but lies in the folder {kind!r}."
            )
        try:
            ops.get(s.op)
        except UnknownNameError as e:
            raise ScheduleError(f"{path}: schedule {s.name!r}: {e}") from e
        if not isinstance(s.version, int) or s.version < 0:
            expected = "a whole number from 1 on, or none"
            what = got_expected(f"version of schedule {s.name!r}", repr(s.version), expected)
            raise ScheduleError(f"{path}: {what}")

    def code(s: Schedule) -> Code:
        return Code(s.version or sources.code_hash(path), ops.get(s.op).version, LOWERING[kind])

    return [replace(s, path=path, code=code(s)) for s in schedules]


KINDS = ("cpu", "gpu")
"""Kinds of device, and what the folders of their schedules are called."""


class ScheduleWarning(UserWarning):
    """A schedule, a file or a folder of them is left out, or hides another one of the same name."""


class LeftOut(NamedTuple):
    """What cannot be used of the schedule folders: a folder, a file, or one schedule of a file,
    whose operator and name are known then.
    """

    path: Path
    reason: str
    op: str = ""
    name: str = ""
    state: tuple[int, ...] = ()
    """Of the file or folder, by which it is known when it has been mended."""


class _Loaded(NamedTuple):
    """What the schedule folders hold, and what is to be said of them."""

    schedules: dict[str, Schedule]
    left_out: list[LeftOut]
    empty: list[Path]
    warnings: list[str]

    def leave_out(self, path: Path, reason: str, op: str = "", name: str = "") -> None:
        """Leave out a folder, a file or a schedule."""
        self.left_out.append(LeftOut(path, reason, op, name, _state(path)))
        self.warnings.append(f"left out: {reason}")


def _state(path: Path) -> tuple[int, ...]:
    """What changes when a file or folder does."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@functools.cache
def _load(folders: tuple[Path, ...]) -> _Loaded:
    loaded = _Loaded({}, [], [], [])
    for folder in folders:
        in_folder: dict[str, Schedule] = {}
        try:
            files = _files(folder)
        except (OSError, ScheduleError) as e:
            loaded.leave_out(folder, str(e))
            continue
        if not files:
            loaded.empty.append(folder)
            loaded.warnings.append(
                got_expected(
                    "LNTUNE_SCHEDULES", f"{folder}, in which there is no schedule file", _EXPECTED
                )
            )
        for path in files:
            try:
                schedules = load_file(path, path.parent.name)
            except Exception as e:
                reason = (
                    str(e)
                    if isinstance(e, LntuneError)
                    else f"{path}: the schedule file does not load: {type(e).__name__}: {e}"
                )
                loaded.leave_out(path, reason)
                continue
            for s in schedules:
                if s.name in in_folder:
                    other = in_folder[s.name].path
                    reason = f"{path}: there is a schedule {s.name!r} already, in {other}."
                    loaded.leave_out(path, reason, s.op, s.name)
                else:
                    in_folder[s.name] = s
        for s in in_folder.values():
            _add(s, loaded)
    return loaded


def _add(s: Schedule, loaded: _Loaded) -> None:
    """Take in a schedule. The folders come in order of precedence, so one of the user's hides a
    later one of its name; but not one that is for something else, which nobody can have meant: then
    the user's is left out.
    """
    by_name = loaded.schedules
    first = by_name.setdefault(s.name, s)
    if first is s:
        return
    if (s.op, s.kind) == (first.op, first.kind):
        loaded.warnings.append(f"schedule {s.name!r} is taken from {first.path}, not from {s.path}")
        return
    purpose = f"{s.op} on a {s.kind}, and this one is for {first.op} on a {first.kind}"
    reason = (
        f"{first.path}: a schedule {s.name!r} is there already, in {s.path}, for {purpose}. Give it"
        " another name."
    )
    loaded.leave_out(first.path, reason, first.op, first.name)
    by_name[s.name] = s


_EXPECTED = "a folder that has folders cpu or gpu with schedule files in them"


def _files(folder: Path) -> list[Path]:
    """The schedule files of a folder.

    Raises:
        ScheduleError: it is not such a folder, with the one that was probably meant.
    """
    if folder.is_file():
        raise ScheduleError(
            got_expected("LNTUNE_SCHEDULES", f"{folder}, a file", _EXPECTED, _remedy(folder))
        )
    if not folder.is_dir():
        remedy = (
            "Install lntune again."
            if folder == paths.content("schedules")
            else "Correct LNTUNE_SCHEDULES."
        )
        if folder.parts[:1] == ("~",):
            remedy = "The user has no home folder: set HOME, or give the whole path."
        raise ScheduleError(f"the folder of schedules {folder} does not exist. {remedy}")
    if not any((folder / kind).is_dir() for kind in KINDS):
        for pattern in ("[!_]*.py", *(f"*/{kind}/[!_]*.py" for kind in KINDS), "*/[!_]*.py"):
            if elsewhere := next(folder.glob(pattern), None):
                got = f"{folder}, which has {elsewhere.relative_to(folder)}"
                raise ScheduleError(
                    got_expected("LNTUNE_SCHEDULES", got, _EXPECTED, _remedy(elsewhere))
                )
    return sorted(path for kind in KINDS for path in folder.glob(f"{kind}/[!_]*.py"))


def _remedy(file: Path) -> str:
    """Where a schedule file lies as it should, the folder to name."""
    right = file.parent.name in KINDS
    return (
        f"Did you mean {file.parent.parent}?"
        if right
        else f"Put {file.name} into a folder cpu or gpu, and name the folder above."
    )


def _current() -> _Loaded:
    """What the schedule folders hold; read again when something that was left out has changed
    since.
    """
    folders = tuple(paths.schedule_dirs())
    loaded = _load(folders)
    if any(_state(one.path) != one.state for one in loaded.left_out):
        _load.cache_clear()
        loaded = _load(folders)
    while loaded.warnings:
        callers.warn(loaded.warnings.pop(0), ScheduleWarning)
    return loaded


def all_schedules() -> dict[str, Schedule]:
    """Every schedule by name, from all schedule folders. What cannot be used is left out, which is
    said once.
    """
    return _current().schedules


def left_out() -> list[LeftOut]:
    """What cannot be used of the schedule folders."""
    return _current().left_out


def empty_folders() -> list[Path]:
    """Schedule folders in which there is no schedule file."""
    return _current().empty


def for_op(op: str, kind: str) -> dict[str, Schedule]:
    """The schedules of one operator for one kind of device, the shipped default first."""
    fitting = [s for s in all_schedules().values() if s.op == op and s.kind == kind]
    return {s.name: s for s in sorted(fitting, key=lambda s: not s.shipped)}


def get(name: str, op: str | None = None, kind: str | None = None) -> Schedule:
    """The schedule `name`.

    Raises:
        ScheduleError: it is left out, with the reason.
        UnknownNameError: there is none (for `op`), with the near miss, of those for `kind` where it
            is given.
    """
    by_name = {n: s for n, s in all_schedules().items() if op in (None, s.op)}
    if name not in by_name:
        for one in left_out():
            if one.name == name or (not one.name and _mentions(one.path, name)):
                raise ScheduleError(one.reason)
        fitting = [n for n, s in by_name.items() if kind in (None, s.kind)]
        raise unknown(f"{op} schedule" if op else "schedule", name, fitting)
    return by_name[name]


def resolve(name: str, op: str, given: Mapping[str, Any]) -> tuple[Schedule, Any]:
    """The schedule `name` of an operator and its knobs, from what a log or another process has of
    them. Whether they fit a case is asked where code is made of them.

    Raises:
        ScheduleError: the schedule is left out, with the reason.
        UnknownNameError: there is none for the operator, or a name that is no knob of it.
        InputError: a value the knob may not take.
    """
    schedule = get(name, op)
    return schedule, schedule.setting(given)


def code_of(name: str) -> Code:
    """What tells a schedule's code as it is now; Code() where there is none of that name that can
    be used, as for eager mode.
    """
    try:
        return get(name).code
    except (UnknownNameError, ScheduleError):
        return Code()


def _mentions(file: Path, name: str) -> bool:
    """True when a file that does not load seems to define a schedule of that name."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return f'"{name}"' in text or f"'{name}'" in text
