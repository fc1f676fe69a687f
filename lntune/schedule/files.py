"""Which files of a folder are schedule files, and what schedules such a file has."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from lntune import ops
from lntune.errors import ScheduleError, UnknownNameError, got_expected
from lntune.schedule.contract import Schedule
from lntune.system import moved, paths, sources, trust
from lntune.versions import LOWERING, Code

KINDS = ("cpu", "gpu")
"""Kinds of device, and what the folders of their schedules are called."""
EXPECTED = "a folder that has folders cpu or gpu with schedule files in them"
"""What LNTUNE_SCHEDULES has to name."""


def files_of(folder: Path) -> list[Path]:
    """The schedule files of a folder.

    Raises:
        ScheduleError: it is not such a folder, with the one that was probably meant; or others can
            write to it.
    """
    if folder.is_file():
        raise ScheduleError(
            got_expected("LNTUNE_SCHEDULES", f"{folder}, a file", EXPECTED, _remedy(folder))
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
                    got_expected("LNTUNE_SCHEDULES", got, EXPECTED, _remedy(elsewhere))
                )
    if folder != paths.content("schedules"):
        for place in (folder, *(folder / kind for kind in KINDS)):
            _refuse(trust.doubt_folder(place) if place.is_dir() else None, folder)
    return sorted(path for kind in KINDS for path in folder.glob(f"{kind}/[!_]*.py"))


def _refuse(doubt: trust.Doubt | None, folder: Path) -> None:
    """Refuse schedules of the user's that others can change: they are programs.

    Raises:
        ScheduleError: there is a doubt; with what to do about it.
    """
    if doubt:
        why = f"the schedules in {folder} are not run, since others can change them"
        remedy = doubt.remedy(folder, "LNTUNE_SCHEDULES")
        raise ScheduleError(f"{why}: {doubt.reason}. {remedy}")


def _remedy(file: Path) -> str:
    """Where a schedule file lies as it should, the folder to name."""
    right = file.parent.name in KINDS
    return (
        f"Did you mean {file.parent.parent}?"
        if right
        else f"Put {file.name} into a folder cpu or gpu, and name the folder above."
    )


class _SourceAlone(SourceFileLoader):
    """Leaves out Python's files of bytecode, which lie in a folder that others may be able to
    write.
    """

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def _import(path: Path, kind: str) -> ModuleType:
    """The schedule file as a module, under a name that says where it belongs."""
    tag = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    name = f"lntune_schedules.{kind}.{path.stem}_{tag}"
    shipped = path.is_relative_to(paths.content("schedules"))
    loader = None if shipped else _SourceAlone(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
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
    """The schedules of one file, with what tells their code from that of other versions.

    Raises:
        ScheduleError: it does not load, has something else, or others can write to it.
    """
    if not path.is_relative_to(paths.content("schedules")):
        _refuse(trust.doubt_file(path), path.parent.parent)
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
