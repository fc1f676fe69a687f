"""The Schedule contract, and how schedule files are found and loaded.

A schedule file lies in a folder named after the device kind (`schedules/cpu/`) and exports `SCHEDULES`, a tuple of
Schedule. It imports from lntune only what lies below this module, and does nothing when imported.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import re
import sys
import tokenize
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from lntune import callers, knobs, ops, paths
from lntune.case import Case
from lntune.device import Device
from lntune.errors import ScheduleError, UnknownNameError, got_expected, unknown


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
    """(case, knobs, device) -> the scheduled IRModule. Pure: the same arguments give the same code."""
    path: Path = field(default=Path(), compare=False)
    source: str = field(default="", compare=False)
    """Hash of everything the generated code depends on; filled in by the loader."""

    def reason_invalid(self, setting: Any, case: Case, device: Device) -> str | None:
        """Why the knobs do not fit, or None."""
        return self.valid(setting, case, device)

    def space(self, case: Case, device: Device) -> list[Any]:
        """Every valid knob setting for the case."""
        return list(knobs.enumerate_space(self.knobs, lambda k: self.valid(k, case, device)))


_MAKES_CODE: tuple[str, ...] = ("loops.py", "gpu/threads.py", "gpu/columns.py", "gpu/gates.py", "gpu/turns.py", "streaming.py", "sums.py")
_MAKES_CODE += ("gpu/functions.py", "gpu/lowering.py", "gpu/phases.py", "gpu/ragged.py", "cuda/hints.py", "cuda/private.py")
_MAKES_CODE += ("ops/activations.py", "ops/dtypes.py", "ops/moments.py")
"""Modules whose content decides what kernels are made of, where a schedule, an operator or another of them imports them."""
_EVERY_GPU_KERNEL = ("gpu/threads.py", "gpu/lowering.py", "device_code.py")
"""What every kernel of a GPU goes through."""
_IMPORTS = re.compile(r"^\s*from lntune\S* import (?:\([^)]*\)|.*)", re.MULTILINE)


def _text(path: Path) -> str:
    """A Python file's text, in the encoding that it says it is in."""
    with tokenize.open(path) as file:
        return file.read()


def _source_hash(path: Path, op: str, kind: str) -> str:
    """Hash of the schedule's file, its operator's file, the transformations that they import, directly or not, and for GPUs the way to CUDA
    source.
    """
    package = Path(ops.__file__).parent.parent
    texts = [_text(part) for part in (path, package / "ops" / f"{op}.py") if part.is_file()]
    used: dict[str, str] = {}

    def use(name: str) -> None:
        if name not in used:
            used[name] = (package / name).read_text(encoding="utf-8")
            follow(used[name])

    def follow(text: str) -> None:
        imports = "\n".join(_IMPORTS.findall(text))
        for name in _MAKES_CODE:
            if re.search(rf"\b{Path(name).stem}\b", imports):
                use(name)

    for text in texts:
        follow(text)
    for name in _EVERY_GPU_KERNEL if kind == "gpu" else ():
        use(name)
    digest = hashlib.sha256()
    for text in [*texts, *(used[name] for name in dict.fromkeys((*_MAKES_CODE, *_EVERY_GPU_KERNEL)) if name in used)]:
        digest.update(_code(text).encode())
    return digest.hexdigest()[:12]


@functools.cache  # most of the files are in several schedules' hashes
def _code(text: str) -> str:
    """Python source without comments, docstrings and blank lines, so that rewording does not make measurements stale.

    Cut out by position: the text of tokens and syntax trees differs between Python versions.
    """
    lines = text.splitlines()
    cuts: list[tuple[tuple[int, int], tuple[int, int]]] = []
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING)
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    cuts += [(t.start, t.end) for t in tokens if t.type == tokenize.COMMENT]
    said = [t for t in tokens if t.type not in skipped]
    for before, token, after in zip([None, *said], said, said[1:], strict=False):
        if token.type == tokenize.STRING and after.type == tokenize.NEWLINE and (before is None or before.type == tokenize.NEWLINE):
            cuts.append((token.start, token.end))
    for (top, left), (bottom, right) in sorted(cuts, reverse=True):
        kept = lines[top - 1][:left] + lines[bottom - 1][right:]
        lines[top - 1 : bottom] = [kept]
    return "\n".join(line.rstrip() for line in lines if line.strip())


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
    except Exception as e:
        del sys.modules[name]
        raise ScheduleError(f"{path}: the schedule file does not load: {type(e).__name__}: {e}") from e
    return module


def load_file(path: Path, kind: str) -> list[Schedule]:
    """The schedules of one file, with their source hashes."""
    module = _import(path, kind)
    found = getattr(module, "SCHEDULES", None)
    if not isinstance(found, tuple) or not all(isinstance(s, Schedule) for s in found):
        raise ScheduleError(f"{path}: expected SCHEDULES, a tuple of lntune.schedule.Schedule.")
    for s in found:
        if s.kind != kind:
            raise ScheduleError(f"{path}: schedule {s.name!r} is for {s.kind!r} but lies in the folder {kind!r}.")
        try:
            ops.get(s.op)
        except UnknownNameError as e:
            raise ScheduleError(f"{path}: schedule {s.name!r}: {e}") from e

    return [replace(s, path=path, source=_source_hash(path, s.op, kind)) for s in found]


KINDS = ("cpu", "gpu")
"""Kinds of device, and what the folders of their schedules are called."""


class ScheduleWarning(UserWarning):
    """A schedule hides another one of the same name."""


@functools.cache
def _load(folders: tuple[Path, ...]) -> dict[str, Schedule]:
    found: dict[str, Schedule] = {}
    for folder in folders:
        here: dict[str, Schedule] = {}
        for path in _files(folder):
            for s in load_file(path, path.parent.name):
                if s.name in here:
                    raise ScheduleError(f"{path}: there is a schedule {s.name!r} already, in {here[s.name].path}.")
                here[s.name] = s
        for s in here.values():
            wins = found.setdefault(s.name, s)  # the folders come in order of precedence: a user's file wins
            if wins is not s:
                _hidden(s, wins)
    return found


def _hidden(s: Schedule, by: Schedule) -> None:
    """Say that a schedule is hidden by another of its name.

    Raises:
        ScheduleError: by one that is for something else, which nobody can have meant.
    """
    if (s.op, s.kind) != (by.op, by.kind):
        what = f"{s.op} on a {s.kind}, and this one is for {by.op} on a {by.kind}"
        raise ScheduleError(f"{by.path}: a schedule {s.name!r} is there already, in {s.path}, for {what}. Give it another name.")
    callers.warn(f"schedule {s.name!r} is taken from {by.path}, not from {s.path}", ScheduleWarning)


def _files(folder: Path) -> list[Path]:
    """The schedule files of a folder.

    Raises:
        ScheduleError: it is not such a folder, with the one that was probably meant.
    """
    expected = "a folder that has folders cpu or gpu with schedule files in them"
    if folder.is_file():
        raise ScheduleError(got_expected("LNTUNE_SCHEDULES", f"{folder}, a file", expected, _meant(folder)))
    if not folder.is_dir():
        raise ScheduleError(f"the folder of schedules {folder} does not exist. Correct LNTUNE_SCHEDULES.")
    if not any((folder / kind).is_dir() for kind in KINDS):
        for pattern in ("[!_]*.py", *(f"*/{kind}/[!_]*.py" for kind in KINDS), "*/[!_]*.py"):
            if elsewhere := next(folder.glob(pattern), None):
                got = f"{folder}, which has {elsewhere.relative_to(folder)}"
                raise ScheduleError(got_expected("LNTUNE_SCHEDULES", got, expected, _meant(elsewhere)))
    return sorted(path for kind in KINDS for path in folder.glob(f"{kind}/[!_]*.py"))


def _meant(file: Path) -> str:
    """Where a schedule file lies as it should, the folder to name."""
    right = file.parent.name in KINDS
    return f"Did you mean {file.parent.parent}?" if right else f"Put {file.name} into a folder cpu or gpu, and name the folder above."


def all_schedules() -> dict[str, Schedule]:
    """Every schedule by name, from all schedule folders."""
    return _load(tuple(paths.schedule_dirs()))


def for_op(op: str, kind: str) -> dict[str, Schedule]:
    """The schedules of one operator for one kind of device, the shipped default first."""
    shipped = paths.content("schedules")
    found = [s for s in all_schedules().values() if s.op == op and s.kind == kind]
    return {s.name: s for s in sorted(found, key=lambda s: not s.path.is_relative_to(shipped))}


def get(name: str, op: str | None = None, kind: str | None = None) -> Schedule:
    """The schedule `name`; UnknownNameError with the near miss when there is none (for `op`), of those for `kind` where it is given."""
    known = {n: s for n, s in all_schedules().items() if op in (None, s.op)}
    if name not in known:
        fitting = [n for n, s in known.items() if kind in (None, s.kind)]
        raise unknown(f"{op} schedule" if op else "schedule", name, fitting)
    return known[name]
