"""What the page of a report says, as figures: per device its cases with the records they rest on,
what is missing or stale, and what the trials tell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from lntune import ops
from lntune.case import DTYPES
from lntune.device import Device
from lntune.log import select, slower
from lntune.log.records import Key, Record
from lntune.log.wanted import Wanted
from lntune.report.page import trials
from lntune.report.page.trials import Curve, Distribution, Importance
from lntune.report.rows import Row
from lntune.report.survey import Survey, survey
from lntune.schedule import Schedule

MOST = 2000
"""Cases of a device that a page shows: with more it would be slow to open."""


class CaseFacts(msgspec.Struct, frozen=True):
    """A case: its figures, the record they are of, and how its search went."""

    row: Row
    record: Record
    curve: Curve | None

    @property
    def eager_serves(self) -> bool:
        """True where eager mode measured faster, and is what a call gets."""
        return slower.eager_serves(self.record)

    @property
    def intensity(self) -> float | None:
        """Operations per byte."""
        return self.row.flops / self.row.bytes if self.row.flops and self.row.bytes else None

    @property
    def gflops(self) -> float | None:
        """Billions of operations a second; None where the time does not hold."""
        return self.intensity * self.row.gbps if self.intensity and self.row.gbps else None

    @property
    def copy(self) -> tuple[float, float] | None:
        """The plain copy that was measured beside it: bytes read and written, and GB/s; None where
        there is none, or its time does not hold.
        """
        gbps, us = self.row.copy_gbps, self.row.copy_us
        return (gbps * us * 1e3, gbps) if gbps and us and not self.row.disturbed else None


class DeviceFacts(msgspec.Struct, frozen=True):
    """A device: what a report says of it; its cases in the order a person looks for them, at most
    MOST of the survey's; what the trials tell; where the records are from.
    """

    device: Device
    survey: Survey
    cases: list[CaseFacts]
    importances: list[Importance]
    distributions: list[Distribution]
    roles: dict[str, int]
    threads: list[int]
    versions: list[dict[str, str]]
    first: str
    last: str


def gather(
    device: Device, records: Sequence[Record], schedules: Mapping[str, Schedule], wanted: Wanted
) -> DeviceFacts:
    """What records of a device, oldest first, say of what is asked for; `schedules` are those of
    all operators, as they are now.
    """
    found = trials.searches(r for r in records if r.role == "trial")
    said = survey(records, wanted, device, schedules)
    served = select.served(records, schedules)
    cases = sorted((_of_case(row, served, found) for row in said.cases), key=_place)
    times = [r.time for r in records if r.time]
    return DeviceFacts(
        device=device,
        survey=said,
        cases=cases[:MOST],
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


def _of_case(row: Row, served: Mapping[Key, Record], found: trials.Searches) -> CaseFacts:
    record = served[Key.of(row.case)]
    own = found.get((record.case, record.run))
    return CaseFacts(row, record, trials.curve(record.run, own) if own else None)


def _distinct(versions: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """Sets of versions, each once, in the order in which they appear."""
    return list({tuple(sorted(v.items())): v for v in versions if v}.values())
