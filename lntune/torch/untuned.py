"""Counting the cases that calls of a process met and that nobody has measured on this device, and
warning of them in one line, not case by case.
"""

from __future__ import annotations

import atexit
import os
import shlex
import threading
from collections.abc import Iterable

import msgspec

from lntune import backends
from lntune.case import Case, bucket_label
from lntune.device import Device
from lntune.log.records import Key
from lntune.system import callers
from lntune.system.forks import INNER, held_at_fork
from lntune.torch import recording
from lntune.torch.reloading import on_reload
from lntune.words import counted


class UntunedWarning(UserWarning):
    """Calls are not served by a measurement of their own case. Said for the first such case of a
    process, and once for all when it ends; `lntune.untuned()` lists them, `lntune why` explains
    one.
    """


class Untuned(msgspec.Struct, frozen=True):
    """A case that a call met and that was not measured on its device; `served` says what serves it:
    "default knobs", "eager mode". `outlived` is true where it was measured, and its schedule has
    changed since.
    """

    case: Case
    device: Device
    served: str
    outlived: bool = False

    @property
    def command(self) -> str:
        """What tunes it."""
        return command([self])


class UntunedCases(list[Untuned]):
    """The cases that calls met and nobody measured: a list, which prints as lines for people."""

    @property
    def command(self) -> str:
        """What tunes all of them, a line for a shell; empty where there are none."""
        return command(self)

    def __repr__(self) -> str:
        if not self:
            return "no call has met a case that is not tuned on its device"
        whose = "its" if len(self) == 1 else "their"
        many = f"{counted(len(self), 'case')} not tuned on {whose} device"
        names = [name(one.case) + backends.option(one.device) for one in self]
        width = max(map(len, names))
        lines = [
            f"  {which:{width}}  served by {one.served}{OUTLIVED if one.outlived else ''}"
            for which, one in zip(names, self, strict=True)
        ]
        return "\n".join([f"{many}:", *lines, f"Run: {self.command}"])

    __str__ = __repr__


OUTLIVED = ", tuned before its schedule changed"
_lock = held_at_fork(threading.Lock(), INNER)
_cases: dict[tuple[Device, Key], Untuned] = {}
_shown: set[tuple[Device, Key]] = set()
"""Those of which the user's filters let a warning through."""
_lines: list[callers.Place] = []
"""The user's lines that met these, in order."""
_process: list[int] = []


def untuned() -> UntunedCases:
    """The cases that calls of this process have met since it began, or since `lntune.reload()`, and
    that were not measured on their device, in the order in which they were met; one for each
    operator, hidden size, dtype and row bucket. The list prints as lines with the command that
    tunes them; each has its `case`, `device`, `served`, `outlived` and `command`.
    """
    with _lock:
        return UntunedCases(_cases.values())


@on_reload
def forget() -> None:
    """Begin to count anew."""
    with _lock:
        _cases.clear()
        _shown.clear()
        _lines.clear()


def name(case: Case) -> str:
    """A case as warnings call it: all its variants, and all rows of its bucket."""
    return f"{case.op} hidden {case.hidden} {case.dtype} rows {bucket_label(case.bucket)}"


def command(cases: Iterable[Untuned]) -> str:
    """One line for a shell that tunes cases, and what lies between them: a command for each
    operator and kind of device.
    """
    groups: dict[tuple[str, str], list[Case]] = {}
    for one in cases:
        groups.setdefault((one.case.op, backends.option(one.device)), []).append(one.case)
    lines = []
    for (op, target), group in groups.items():
        hidden, rows = (
            ",".join(map(str, sorted(sizes)))
            for sizes in ({c.hidden for c in group}, {c.rows for c in group})
        )
        dtypes = ",".join(dict.fromkeys(c.dtype for c in group))
        lines.append(f"lntune tune {op} --hidden {hidden} --dtype {dtypes} --rows {rows}{target}")
    return " && ".join(lines)


_WAY = "LNTUNE_RECORD_CASES=cases.jsonl notes what a program uses, for lntune tune --cases"
"""How to tune all that a model uses, as warnings have it."""


def _of_recorded() -> str:
    """What tunes all cases where they are recorded."""
    names = [shlex.quote(str(path)) for path in recording.files()]
    return f"lntune tune --cases {names[-1]}" if names else ""


def count(case: Case, device: Device, served: str, outlived: bool = False) -> None:
    """Count a case that was not measured; its variants are one. The first is warned of."""
    key = device, Key.of(case)
    line = callers.place()
    with _lock:
        if key in _cases:
            return
        untuned_case = _cases[key] = Untuned(case.typical, device, served, outlived)
        state = (
            "was tuned before its schedule changed" if outlived else "is not tuned on this device"
        )
        run = _of_recorded() or untuned_case.command
        text = f"{name(case)} {state}; served by {served}. Run: {run}"
        text += " (further cases are counted, see lntune.untuned()"
        text += ")" if recording.SINKS else f"; {_WAY})"
        action = callers.action(text, UntunedWarning, line)
        if action == "ignore":
            return
        _shown.add(key)
        first = not _lines
        _lines.append(line)
        if not _process:
            atexit.register(_summary)
        _process[:] = [os.getpid()]
    if first or action == "error":  # where a warning is an error, each case is one
        callers.warn(text, UntunedWarning, line)


def _summary() -> None:
    """The line at the end of a process that met several cases."""
    with _lock:
        shown = [one for key, one in _cases.items() if key in _shown]
    if len(shown) < 2 or _process != [os.getpid()]:  # noqa: PLR2004
        return
    outlived = sum(one.outlived for one in shown)
    since = f" ({outlived} were before their schedules changed)" if outlived else ""
    run = _of_recorded() or f"{command(shown)} (or {_WAY})"
    text = f"{counted(len(shown), 'case')} were not tuned on this device{since}. Run: {run}"
    if callers.action(text, UntunedWarning, _lines[0]) != "error":
        callers.warn(text, UntunedWarning, _lines[0]._replace(registry={}))
