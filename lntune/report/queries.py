"""`lntune.report.cases` and its like: what logs say, from Python."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from lntune import device as device_module
from lntune import schedule
from lntune.backends import DEFAULT
from lntune.case import bucket_label
from lntune.certainty import SMALLEST
from lntune.compare import compare as compare_sides
from lntune.compare.comparison import Comparison
from lntune.device import Device
from lntune.errors import InputError, got_expected
from lntune.knobs import Value, describe
from lntune.log.records import Record, Status
from lntune.log.wanted import Wanted
from lntune.report import comparisons
from lntune.report.columns import Column, Table, key
from lntune.report.frames import Frame
from lntune.report.rows import Row
from lntune.report.survey import asked_records, surveys
from lntune.report.tables import cases_table, micros, number
from lntune.system import paths

_Sizes = int | Iterable[int]
_Dtypes = Any  # a name, a torch.dtype, or several


def cases(
    op: str = "",
    hidden: _Sizes = (),
    dtype: _Dtypes = (),
    rows: _Sizes = (),
    device: str | None = None,
    log_dir: str | Path | None = None,
) -> Frame[Row]:
    """The measurements that serve cases, as `lntune report` shows them.

    Args:
        op: such as "layer_norm"; all operators where it is empty.
        hidden: elements of a row, one number or several; all by default, as of what follows.
        dtype: names or torch.dtypes.
        rows: numbers of rows, each of which stands for its row bucket.
        device: a part of the name of a device's folder, the empty string for all devices; None for
            this machine's CPU.
        log_dir: a folder of tuning logs, instead of those that serve calls.

    Raises:
        UnknownNameError: there is no such operator or dtype.
        InputError: there is no such folder, or no device of that name in it.
    """
    wanted, owner, folders = _asked(op, hidden, dtype, rows, device, log_dir)
    found = surveys(folders, wanted, owner, schedule.all_schedules())
    every = [row for one in found for row in one.cases]
    return Frame(every, Row, lambda some: [cases_table(some, "", details=True)])


class Trial(msgspec.Struct, frozen=True):
    """A candidate that was tried: its case, schedule and knobs, what came of it, the median in
    microseconds (None where it was not timed), the largest error as a share of what is allowed
    (None where it was not checked), the run it is of and when.
    """

    op: str
    device: str
    dtype: str
    hidden: int
    rows: int
    bucket: str
    schedule: str
    knobs: dict[str, Value]
    status: Status
    message: str
    us: float | None
    of_allowed: float | None
    run: str
    time: str


def trials(
    op: str = "",
    hidden: _Sizes = (),
    dtype: _Dtypes = (),
    rows: _Sizes = (),
    device: str | None = None,
    log_dir: str | Path | None = None,
) -> Frame[Trial]:
    """The candidates that tuning runs tried, in the order in which they did; arguments and errors
    are those of `cases`.
    """
    wanted, owner, folders = _asked(op, hidden, dtype, rows, device, log_dir)
    groups = asked_records(folders, wanted, owner, ("trial",))
    tried = [_trial(record) for _, group in groups for record in group]
    return Frame(tried, Trial, lambda some: [trials_table(some)])


def trials_table(trials: Sequence[Trial]) -> Table:
    """A line for each candidate."""
    columns = [
        *key("op", "dtype"),
        Column("hidden"),
        Column("rows"),
        Column("status", right=False),
        Column("us"),
        Column("error/allowed", 3),
        Column("time", 4, right=False),
        Column("schedule and knobs", 1, right=False),
        Column("message", 5, right=False),
    ]
    table = Table("", columns, grouped=True)
    for t in trials:
        table.add(
            t.op,
            t.dtype,
            str(t.hidden),
            str(t.rows),
            t.status,
            micros(t.us),
            number(t.of_allowed),
            t.time,
            f"{t.schedule} {describe(t.knobs)}".strip(),
            " ".join(t.message.split()),
        )
    return table


def compare(
    a: str | Path,
    b: str | Path,
    *,
    op: str = "",
    hidden: int | Sequence[int] = (),
    dtype: str | Sequence[str] = (),
    rows: int | Sequence[int] = (),
    target: str = DEFAULT,
    log_dir: str | Path | None = None,
    smallest: float = SMALLEST,
) -> Frame[Comparison]:
    """The cases that two sides have, B against A; arguments and errors are those of
    `lntune.compare.compare`, which also tells what is missing.
    """
    result = compare_sides(
        a,
        b,
        op=op,
        hidden=hidden,
        dtype=dtype,
        rows=rows,
        target=target,
        log_dir=log_dir,
        smallest=smallest,
    )

    def draw(some: Sequence[Comparison]) -> Sequence[Table]:
        return comparisons.tables([msgspec.structs.replace(result, cases=list(some))])

    return Frame(result.cases, Comparison, draw)


def _trial(record: Record) -> Trial:
    case = record.case
    return Trial(
        op=case.op,
        device=record.device.slug,
        dtype=case.dtype,
        hidden=case.hidden,
        rows=case.rows,
        bucket=bucket_label(case.bucket),
        schedule=record.schedule,
        knobs=record.knobs,
        status=record.status,
        message=record.message,
        us=record.median(),
        of_allowed=max(record.errors.values(), default=None),
        run=record.run,
        time=record.time,
    )


def _asked(
    op: str,
    hidden: _Sizes,
    dtype: _Dtypes,
    rows: _Sizes,
    device: str | None,
    log_dir: str | Path | None,
) -> tuple[Wanted, Device | None, list[Path]]:
    """What is asked for, whose it is, and where it is looked for."""
    wanted = Wanted.of(op, hidden, dtype, rows, device or "")
    folders = paths.log_dirs() if log_dir is None else [Path(log_dir)]
    if log_dir is not None and not folders[0].is_dir():
        expected = "a folder of tuning logs, which holds a folder for each device"
        raise InputError(got_expected("log_dir", folders[0], expected))
    return wanted, device_module.current() if device is None else None, folders
