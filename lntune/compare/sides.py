"""What is compared, as people name it: a schedule, with some of its knobs; what every measurement
has beside it; or measurements of somewhere else.

    cached_rows
    cached_rows:write=streamed,lanes=4
    default, tuned, eager, compile, copy
    before.json, tuning_logs, tuning_logs/amd-epyc-x86-64-v4-2c, rev:HEAD~1
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from lntune import knobs, schedule
from lntune.case import Case
from lntune.compare import sources
from lntune.device import Device
from lntune.errors import InputError, LntuneError, UnknownNameError, got_expected, unknown
from lntune.knobs import Value
from lntune.log.records import Record, Timing
from lntune.versions import Code

WORDS = {
    "default": "what serves where nothing is tuned: a schedule's default knobs",
    "tuned": "what was measured as best",
    "eager": "PyTorch's eager mode",
    "compile": "torch.compile",
    "copy": "a plain copy of the input",
}
"""The contenders of a measurement beside schedules, and what they are."""
_REVISION = "rev:"


class Held(NamedTuple):
    """What a record holds of a side. `schedule` is empty of PyTorch's own; `instructions` are for
    an element of a row, where they are known.
    """

    record: Record
    timing: Timing
    schedule: str = ""
    knobs: dict[str, Value] = {}  # noqa: RUF012 (never changed)
    code: Code = Code()
    instructions: float | None = None

    @property
    def stale(self) -> bool:
        """Whether the code of its schedule has changed since; False where that is not known."""
        now = schedule.all_schedules().get(self.schedule)
        return now is not None and self.code not in (Code(), now.code)


class Contender(msgspec.Struct, frozen=True):
    """One way to do it: one of WORDS, or a schedule with some knobs fixed, of whose other knobs the
    best measured count. `op` is the schedule's operator.
    """

    name: str
    word: str = ""
    schedule: str = ""
    knobs: dict[str, Value] = {}
    op: str = ""

    def held(self, record: Record) -> Held | None:
        """What a record holds of it, None where that is nothing."""
        if self.schedule:
            own = (h for h in _tried(record) if h.schedule == self.schedule)
            held = [h for h in own if self.takes(h.knobs)]
            return min(held, key=lambda h: h.timing.median_us, default=None)
        timing = record.timings.get(self.word)
        if timing is None:
            return None
        if self.word == "tuned":
            return _winner(record)
        if self.word == "default" and record.default is not None:
            # its code is known where it is of the winner's schedule
            code = record.code if record.default.schedule == record.schedule else Code()
            return Held(record, timing, record.default.schedule, record.default.knobs, code)
        return Held(record, timing)

    def takes(self, setting: dict[str, Value]) -> bool:
        """Whether a setting of the schedule has the fixed knobs."""
        return all(name in setting and setting[name] == v for name, v in self.knobs.items())

    def default(self, case: Case, device: Device) -> Any:
        """The schedule's default knobs for a case, but for those that are fixed, and for those that
        do not go with them, which have the nearest values that do.

        Raises:
            ScheduleError: the schedule is a user's and fails.
        """
        chosen = schedule.get(self.schedule)
        setting = dataclasses.replace(chosen.untuned(case, device), **self.knobs)
        if not self.knobs:
            return setting

        def fits(other: Any) -> bool:
            return chosen.reason_invalid(other, case, device) is None

        found = knobs.nearest(setting, self.knobs, fits)
        return setting if found is None else found

    def unfit(self, case: Case, device: Device) -> str:
        """Why a schedule does not fit a case, as far as its default knobs tell; empty where it
        does, and of what is no schedule.
        """
        if not self.schedule:
            return ""
        try:
            chosen = schedule.get(self.schedule)
            reason = chosen.reason_invalid(self.default(case, device), case, device)
        except LntuneError as e:
            return str(e)
        return f"does not fit: {reason}" if reason else ""


def _winner(record: Record) -> Held:
    r = record
    return Held(r, r.timings["tuned"], r.schedule, r.knobs, r.code, r.instructions)


def _tried(record: Record) -> list[Held]:
    """The schedules that a record holds, each with its knobs."""
    rivals = [
        Held(record, r.timing, r.schedule, r.knobs, r.code, r.instructions) for r in record.rivals
    ]
    return [_winner(record), *rivals] if "tuned" in record.timings else rivals


class Runs(msgspec.Struct, frozen=True):
    """Measurements of somewhere else, of which each case's tuned time counts. `folder` is that of
    the logs where it is one that tuning can write to.
    """

    name: str
    records: list[Record]
    folder: str = ""
    op: str = ""

    def held(self, record: Record) -> Held:
        """What a record holds of it."""
        return _winner(record)


Side = Contender | Runs


def parse(text: str | Path, kind: str, folders: Sequence[Path]) -> Side:
    """The side that a text names, on a kind of device; `folders` are those of logs, for revisions.
    A word or a schedule wins over a file of its name, which `./` in front of it names.

    Raises:
        UnknownNameError: it names nothing, or a schedule or knob that does not exist.
        InputError, ScheduleError, LogError: it names something that cannot be compared.
    """
    if isinstance(text, str):
        if (contender := parse_contender(text, kind)) is not None:
            return contender
        if text.startswith(_REVISION):
            return Runs(text, sources.of_revision(text.removeprefix(_REVISION), folders))
    path, name = Path(text), str(text)
    named = isinstance(text, Path) or os.sep in text or path.suffix in (".json", ".jsonl")
    if not (named or path.exists()):
        raise _unknown(name.partition(":")[0], kind)
    found = sources.load(path)
    writable = path.is_dir() and not any(path.glob("*.jsonl"))
    return Runs(name, found, folder=name if writable else "")


def parse_contender(text: str, kind: str) -> Contender | None:
    """The contender that a text names; None where it names none.

    Raises:
        UnknownNameError, InputError: its knobs do not exist, or it is for another kind of device.
    """
    if text in WORDS:
        return Contender(text, word=text)
    name, colon, words = text.partition(":")
    chosen = schedule.all_schedules().get(name)
    if chosen is None:
        if name in WORDS and colon:
            got = f"{text!r}, knobs of what is no schedule"
            raise InputError(got_expected("side", got, f"{name} alone, or a schedule with knobs"))
        return None
    if chosen.kind != kind:
        got, expected = f"a schedule for a {chosen.kind}", f"one for the target, a {kind}"
        raise InputError(got_expected(name, got, expected, "Name another with --target."))
    defaults = chosen.knobs()
    given = [word for word in re.split(r"[,\s]+", words) if word]
    if colon and not given:
        example = knobs.describe(defaults).replace(" ", ",")
        raise InputError(got_expected("side", repr(text), f"some knobs, as in {name}:{example}"))
    setting = knobs.to_dict(knobs.changed(defaults, given))
    named = {word.partition("=")[0].strip() for word in given}
    fixed = {knob: value for knob, value in setting.items() if knob in named}
    return Contender(text, schedule=name, knobs=fixed, op=chosen.op)


def _unknown(name: str, kind: str) -> Exception:
    """The error that says that nothing has the name, or why a schedule of it is left out."""
    try:
        schedule.get(name)
    except UnknownNameError:
        names = [s.name for s in schedule.all_schedules().values() if s.kind == kind]
        return unknown("side", name, [*WORDS, *names])
    except LntuneError as e:
        return e
    raise AssertionError(name)
