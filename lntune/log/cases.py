"""Recorded cases: files of JSON lines that say which cases the calls of programs went through, how
often and for how long. `lntune.record_cases` writes them, `lntune tune --cases` reads them.

A file has one line for each case, device and number of rows. Whoever adds to it holds the file's
lock, reads it, and puts a new one in its place, so that processes lose nothing of each other's and
a reader never sees half a file. It is data from anywhere: fields have types and bounds, and what
does not fit them is left out and said.
"""

from __future__ import annotations

import math
import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from lntune.case import BUCKETS, TYPICAL_ROWS, Case, bucket_of
from lntune.device import Device
from lntune.errors import InputError, LntuneError, LogError, got_expected
from lntune.log.records import Key
from lntune.log.wanted import Wanted
from lntune.system import callers, locks, scratch

SCHEMA = 1
"""Raised when a field changes its meaning; readers skip lines of a newer schema and say so."""
MOST_BYTES = 64 * 2**20
"""What a file may have; one of a model's cases has some kilobytes."""
MOST_ROWS = 64
"""Numbers of rows that are kept apart in a row bucket of a case, those called most; the others are
counted as the rows that stand for the bucket.
"""

Word = Annotated[str, msgspec.Meta(max_length=200)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Size = Annotated[int, msgspec.Meta(ge=0, le=BUCKETS[-1][1])]


class CasesWarning(UserWarning):
    """Recorded cases could not be written, or lines of a file of them not be read."""


class What(NamedTuple):
    """What calls are counted under: a case as it was called, on a device (None: one on which no
    kernels run), and why no kernel takes it; empty where one may.
    """

    op: str
    hidden: int
    dtype: str
    rows: int
    variant: str
    device: Device | None
    reason: str = ""


class Tally(NamedTuple):
    """How many calls there were, how many of them were timed, and microseconds of these."""

    calls: int = 0
    timed: int = 0
    us: float = 0.0

    def plus(self, other: Tally) -> Tally:
        """Both together."""
        return Tally(self.calls + other.calls, self.timed + other.timed, self.us + other.us)

    @property
    def total_us(self) -> float | None:
        """What all calls took, those that were not timed as long as those that were; None where
        none was.
        """
        return self.us / self.timed * self.calls if self.timed else None


class Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of a file: What and Tally."""

    schema: Count = SCHEMA
    op: Word
    hidden: Size
    dtype: Word
    rows: Size
    variant: Word = ""
    device: Device | None = None
    reason: Word = ""
    calls: Count
    timed: Count = 0
    us: float = 0.0


Tallies = dict[What, Tally]
_decoder, _encoder = msgspec.json.Decoder(Line), msgspec.json.Encoder()


def case_of(what: What) -> Case | None:
    """The case that a kernel could be tuned for; None where there is none, see why_not."""
    return None if why_not(what) else Case(*what[:5])


def why_not(what: What) -> str:
    """Why no kernel takes calls, as the rest of a sentence; empty where one may."""
    from lntune import ops

    if what.reason:
        return what.reason
    try:
        ops.get(what.op).check_variant(what.variant)
        if not Case(what.op, what.hidden, what.dtype, what.rows).rows:
            return "it has no rows"
    except LntuneError as e:
        return str(e)
    return "" if what.device else "kernels do not run on its device"


def read(path: Path) -> Tallies:
    """The cases of a file, in its order. Lines that cannot be used are left out, with a warning.

    Raises:
        InputError: there is no such file, or it is none of recorded cases.
    """
    tallies, unusable = _read(path)
    if unusable:
        first = min(unusable)
        callers.warn(
            f"{path}: {len(unusable)} of its lines cannot be used and are left out, the first is"
            f" line {first}: {unusable[first][1]}",
            CasesWarning,
        )
    return tallies


def _read(path: Path) -> tuple[Tallies, dict[int, tuple[bytes, str]]]:
    """The cases of a file, and the lines that cannot be used by number, with what is wrong."""
    expected = "a file of recorded cases"
    remedy = "lntune.record_cases and LNTUNE_RECORD_CASES write one."
    try:
        with path.open("rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InputError(got_expected("cases", f"{path}, no plain file", expected, remedy))
            content = file.read(MOST_BYTES + 1)
    except OSError as e:
        got = f"{path}: {e.strerror or e}"
        raise InputError(got_expected("cases", got, expected, remedy)) from e
    if len(content) > MOST_BYTES:
        got = f"{path} of more than {MOST_BYTES // 2**20} MiB"
        raise InputError(got_expected("cases", got, expected, remedy))
    tallies: Tallies = {}
    unusable: dict[int, tuple[bytes, str]] = {}
    for number, text in enumerate(content.split(b"\n"), 1):
        if not text.strip():
            continue
        try:
            what, tally = _parsed(text)
        except (msgspec.MsgspecError, UnicodeDecodeError, ValueError, RecursionError) as e:
            unusable[number] = text, str(e)
            continue
        tallies[what] = tallies.get(what, Tally()).plus(tally)
    if unusable and not tallies:
        number, (_, why) = next(iter(unusable.items()))
        got = f"{path}, whose line {number} is none ({why})"
        raise InputError(got_expected("cases", got, expected, remedy))
    return tallies, unusable


def _parsed(text: bytes) -> tuple[What, Tally]:
    """What a line says.

    Raises:
        ValueError: something that it must not.
    """
    line = _decoder.decode(text)
    if line.schema > SCHEMA:
        raise ValueError(f"it is of schema {line.schema}, newer than this lntune's {SCHEMA}")
    if not math.isfinite(line.us) or line.us < 0 or line.timed > line.calls:
        raise ValueError(f"its times make no sense: {line.timed} of {line.calls}, {line.us} us")
    what = What(*(getattr(line, name) for name in What._fields))
    return what, Tally(line.calls, line.timed, line.us)


def ensure(path: Path) -> None:
    """Make a file of cases where there is none, and see that it can be added to.

    Raises:
        InputError: it cannot be written, or is something else.
    """
    try:
        add(path, {})
    except LogError as e:
        raise InputError(str(e)) from e


def add(path: Path, tallies: Tallies) -> None:
    """Add what was counted to a file, which is made where it is not there. Lines that cannot be
    read, of a newer lntune for example, stay as they are.

    Raises:
        LogError: it cannot be written; what was in it stays as it was.
        InputError: it is something else.
    """
    try:
        path = path.resolve()  # a link stays one
        path.parent.mkdir(parents=True, exist_ok=True)
        with locks.locked(path):
            before, others = _read(path) if path.exists() else ({}, {})
            if path.exists() and not tallies:
                if not os.access(path, os.W_OK):
                    raise PermissionError(13, "Permission denied")
                return
            for what, tally in tallies.items():
                before[what] = before.get(what, Tally()).plus(tally)
            lines = [_encoded(*one) for one in folded(before).items()]
            with scratch.whole(path) as temporary:
                if path.exists():
                    temporary.chmod(stat.S_IMODE(path.stat().st_mode))
                with temporary.open("wb") as file:
                    file.writelines(
                        line + b"\n" for line in (*lines, *(text for text, _ in others.values()))
                    )
                    file.flush()
                    os.fsync(file.fileno())
    except InputError:
        raise
    except ImportError as e:  # of an installation without what lntune needs
        raise LogError(f"cannot write recorded cases to {path}: {e}.") from e
    except OSError as e:
        remedy = "Choose another file."
        raise LogError(f"cannot write recorded cases to {path}: {e.strerror or e}. {remedy}") from e


def _encoded(what: What, tally: Tally) -> bytes:
    us = round(tally.us, 3)
    return _encoder.encode(Line(**what._asdict(), calls=tally.calls, timed=tally.timed, us=us))


def folded(tallies: Tallies) -> Tallies:
    """The same with no more than MOST_ROWS numbers of rows in a bucket, see there."""
    groups: defaultdict[What, list[What]] = defaultdict(list)
    for what in tallies:
        groups[typical(what)].append(what)
    kept: Tallies = {}
    for what, tally in tallies.items():
        stands = typical(what)
        group = groups[stands]
        if len(group) > MOST_ROWS:
            most = sorted(group, key=lambda one: -tallies[one].calls)[: MOST_ROWS - 1]
            groups[stands] = group = [*most, stands][:MOST_ROWS]
        target = what if what in group else stands
        kept[target] = kept.get(target, Tally()).plus(tally)
    return kept


def typical(what: What) -> What:
    """With the rows that stand for its row bucket."""
    return what._replace(rows=TYPICAL_ROWS[bucket_of(what.rows)])


def by_time(tallies: Tallies) -> list[What]:
    """Those with the most time first; behind them those that were not timed, those that move the
    most bytes first.
    """

    def order(what: What) -> tuple[bool, float]:
        tally = tallies[what]
        total = tally.total_us
        return (True, -moved(what, tally)) if total is None else (False, -total)

    return sorted(tallies, key=order)


def moved(what: What, tally: Tally) -> float:
    """What calls have to move at least, in bytes; 0 where that is not known."""
    from lntune import ops

    case = case_of(what)
    return 0.0 if case is None else float(tally.calls * ops.get(case.op).bytes(case))


def total(tallies: Iterable[Tally]) -> Tally:
    """All together."""
    result = Tally()
    for tally in tallies:
        result = result.plus(tally)
    return result


def rows_of(whats: Sequence[What], tallies: Tallies) -> What:
    """The one of a case's with the most time, whose rows and variant stand for all."""
    return by_time({what: tallies[what] for what in whats})[0]


def asked(tallies: Tallies, wanted: Wanted) -> Tallies:
    """Those of recorded cases that are asked for; what no kernel takes is asked for by its
    operator and size alone.
    """

    def takes(what: What) -> bool:
        if (case := case_of(what)) is not None:
            return wanted.takes(case)
        return (not wanted.ops or what.op in wanted.ops) and (
            not wanted.hidden or what.hidden in wanted.hidden
        )

    return {what: tally for what, tally in tallies.items() if takes(what)}


def cases_of(whats: Iterable[What], tallies: Tallies) -> list[Case]:
    """A case for each operator, hidden size, dtype and row bucket, those with the most time first:
    records serve all variants and rows of these.
    """
    groups: defaultdict[Key, list[What]] = defaultdict(list)
    totals: dict[What, Tally] = {}
    for what in whats:
        case = case_of(what)
        assert case is not None
        groups[Key.of(case)].append(what)
    for group in groups.values():
        first = rows_of(group, tallies)
        totals[first] = total(tallies[what] for what in group)
    ordered = by_time(totals)
    return [Case(what.op, what.hidden, what.dtype, what.rows) for what in ordered]
