"""What the page of a report says, as figures: per device its cases with the records they rest on,
what is missing or stale, and what the trials tell.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from lntune import ops
from lntune.case import DTYPES, Case
from lntune.device import Device
from lntune.log import select
from lntune.log.records import Key, Record, by_device
from lntune.report.page import trials
from lntune.report.page.trials import Curve, Distribution, Importance
from lntune.report.rows import Row, row_of, summary
from lntune.schedule import Schedule

MOST = 2000
"""Cases of a device that a page shows: with more it would be slow to open."""


class CaseFacts(msgspec.Struct, frozen=True):
    """A case: its figures and the record they are of; bytes that must move and operations, by which
    it has a place under a roofline; bytes that the measured copy moved; how its search went.
    """

    row: Row
    record: Record
    bytes: int | None
    flops: int | None
    copied: int | None
    curve: Curve | None

    @property
    def eager_serves(self) -> bool:
        """True where eager mode measured faster, and is what a call gets."""
        tuned, eager = self.row.tuned_us, self.row.eager_us
        return bool(tuned and eager and tuned > eager * select.MARGIN)

    @property
    def intensity(self) -> float | None:
        """Operations per byte."""
        return self.flops / self.bytes if self.flops and self.bytes else None

    @property
    def gflops(self) -> float | None:
        """Billions of operations a second; None where the time does not hold."""
        if not self.flops or self.row.gbps is None or not self.row.tuned_us:
            return None
        return self.flops / self.row.tuned_us / 1e3

    @property
    def copy_gbps(self) -> float | None:
        """Bandwidth of the plain copy that was measured beside it, bytes read and written."""
        copy = self.row.copy_us
        return self.copied / copy / 1e3 if self.copied and copy and not self.row.disturbed else None


class DeviceFacts(msgspec.Struct, frozen=True):
    """A device: its cases in the order a person looks for them, at most MOST of the `summary`'s;
    the commands that tune what its default grid lacks (`missing` cases), and what is stale; what
    the trials tell; where the records are from.
    """

    device: Device
    cases: list[CaseFacts]
    summary: dict[str, Any]
    missing: int
    tune: list[str]
    retune: list[str]
    importances: list[Importance]
    distributions: list[Distribution]
    roles: dict[str, int]
    threads: list[int]
    versions: list[dict[str, str]]
    first: str
    last: str


def gather(
    records: Sequence[Record],
    schedules: Mapping[str, Schedule],
    op: str = "",
    device: Device | None = None,
) -> list[DeviceFacts]:
    """What there is to say of each device that records are of, given oldest first; `schedules` are
    those of all operators, as they are now. Of one operator where given; of one device where all
    records serve it, also those from before devices told their model.
    """
    if device is not None:
        return [_of_device(device, records, schedules, op)] if records else []
    groups = by_device(records)
    return [_of_device(group[-1].device, group, schedules, op) for group in groups]


def _of_device(
    device: Device, records: Sequence[Record], schedules: Mapping[str, Schedule], op: str
) -> DeviceFacts:
    served = select.served(records, schedules)
    found = trials.searches(r for r in records if r.role == "trial")
    cases = sorted(
        (_of_case(record, schedules, found) for record in served.values()),
        key=_place,
    )
    missing = _missing(served, device, schedules, op)
    times = [r.time for r in records if r.time]
    return DeviceFacts(
        device=device,
        cases=cases[:MOST],
        summary=summary([c.row for c in cases]),
        missing=len(missing),
        tune=select.tune_commands(missing),
        retune=select.tune_commands(c.record.case for c in cases if c.row.stale),
        importances=sorted(trials.importances(found), key=_listed),
        distributions=sorted(trials.distributions(found), key=_listed),
        roles=dict(Counter(r.role for r in records)),
        threads=sorted({r.threads for r in records}),
        versions=_distinct(r.versions for r in records),
        first=min(times, default=""),
        last=max(times, default=""),
    )


def _place(c: CaseFacts) -> tuple[int, str, int, str, int, int]:
    """By which cases are sorted: operators as they are listed, large dtypes first."""
    row = c.row
    return *_listed(row), -DTYPES[row.dtype], row.dtype, row.hidden, row.rows


def _listed(of_op: Row | Importance | Distribution) -> tuple[int, str]:
    """The place of an operator among those that are listed, others behind them."""
    known = list(ops.OPS)
    return known.index(of_op.op) if of_op.op in known else len(known), of_op.op


def _of_case(
    record: Record, schedules: Mapping[str, Schedule], found: trials.Searches
) -> CaseFacts:
    case = record.case
    known = ops.OPS.get(case.op)
    own = found.get((case, record.run))
    return CaseFacts(
        row=row_of(record, select.stale(record, schedules)),
        record=record,
        bytes=known.bytes(case) if known else None,
        flops=known.flops(case) if known else None,
        copied=_copied(case) if known else None,
        curve=trials.curve(record.run, own) if own else None,
    )


def _copied(case: Case) -> int:
    """Bytes that a copy reads and writes of the tensor that is copied beside a case: the first."""
    first = next(a for a in ops.get(case.op).arguments(case) if len(a.shape) > 1)
    return 2 * math.prod(first.sizes(case.rows, case.hidden)) * DTYPES[first.dtype]


def _missing(
    served: Mapping[Key, Record], device: Device, schedules: Mapping[str, Schedule], op: str
) -> list[Case]:
    """Cases of the default grids that were not measured and that a schedule is there for."""
    tunable = {s.op for s in schedules.values() if s.kind == device.kind}
    return [
        case
        for known in ops.OPS.values()
        if known.name in tunable and known.name == (op or known.name)
        for case in known.grid
        if Key.of(case) not in served
    ]


def _distinct(versions: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """Sets of versions, each once, in the order in which they appear."""
    return list({tuple(sorted(v.items())): v for v in versions if v}.values())
