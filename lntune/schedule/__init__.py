"""Schedules, ways to turn an operator's definition into code: those that are here, by name.

`contract` has what a schedule is, `files` how a file of them is loaded. A schedule file lies in a
folder named after the device kind (`schedules/cpu/`) and exports `SCHEDULES`, a tuple of Schedule.
It imports from lntune only what lies below this package, and does nothing when imported. A file of
the user's may do anything else: what cannot be used is left out, which is said once, and the others
serve.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lntune.errors import LntuneError, ScheduleError, UnknownNameError, got_expected, unknown
from lntune.schedule import files
from lntune.schedule.contract import Schedule
from lntune.schedule.files import KINDS, load_file
from lntune.system import callers, paths
from lntune.versions import Code

__all__ = [
    "KINDS",
    "LeftOut",
    "Schedule",
    "ScheduleWarning",
    "all_schedules",
    "code_of",
    "empty_folders",
    "for_op",
    "get",
    "left_out",
    "listing",
    "load_file",
    "resolve",
]


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
            schedule_files = files.files_of(folder)
        except (OSError, ScheduleError) as e:
            loaded.leave_out(folder, str(e))
            continue
        if not schedule_files:
            loaded.empty.append(folder)
            loaded.warnings.append(
                got_expected(
                    "LNTUNE_SCHEDULES",
                    f"{folder}, in which there is no schedule file",
                    files.EXPECTED,
                )
            )
        for path in schedule_files:
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


def listing(op: str, kind: str) -> dict[str, Schedule]:
    """Those of for_op that are tuned where none is named, and whose default knobs serve what is not
    tuned.
    """
    return {name: s for name, s in for_op(op, kind).items() if s.propose is None}


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
    """True when a file that does not load, or one of a folder, seems to define a schedule of that
    name.
    """
    try:
        if file.is_dir():
            return any(_mentions(one, name) for one in file.glob("*/*.py"))
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return f'"{name}"' in text or f"'{name}'" in text
