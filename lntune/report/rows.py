"""The figures of a measured case, as one row of a report: times, ratios, bandwidth, errors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from lntune import ops
from lntune.case import DTYPES, Case, bucket_label
from lntune.compare import figures
from lntune.knobs import describe
from lntune.log import select
from lntune.log.records import Record, Timing
from lntune.timing import pairwise
from lntune.words import counted

if TYPE_CHECKING:
    from lntune.schedule import Schedule


class Row(msgspec.Struct, frozen=True):
    """A case with its figures: times in microseconds (medians), speedup = eager / tuned,
    `over_better` = the faster of eager and torch.compile / tuned, bandwidth in GB/s of the bytes
    that must move, `of_copy` = that bandwidth as a share of a plain copy's, `error` = largest error
    on plain random inputs divided by eager's own on these, `of_allowed` = largest error on the
    inputs made to break kernels as a share of what is allowed there, `spread` = distance between
    the quartiles over the median.

    `winner` says how certain the kernel is the best of its final ("better", "tied", "likely",
    "alone", the empty string where that was not told), `over_runner_up` how many times as fast it
    is as the runner-up, between `over_runner_up_low` and `..._high` but for 5 %, and `decided_by`
    what decided, see records.Decision.

    `bytes` and `flops` are the least that the case takes, `copy_gbps` is the bandwidth of a copy of
    its first tensor, `of_roof` the share of what memory lets through: of `roof`, a copy in the same
    rounds or, where a record has none, the best of the log. `over_compile` = torch.compile / tuned,
    where a benchmark of the same kernel is in the log. `training_over_eager` = eager's step of
    training / one by kernels, of a backward.

    None stands for what was not measured, and for all that would be reckoned from times that were
    disturbed: `disturbed` says by what. `stale`: the schedule has changed since.
    """

    op: str
    device: str
    dtype: str
    hidden: int
    rows: int
    bucket: str
    eager_us: float | None
    compile_us: float | None
    tuned_us: float | None
    default_us: float | None
    copy_us: float | None
    speedup: float | None
    over_better: float | None
    over_default: float | None
    gbps: float | None
    of_copy: float | None
    error: float | None
    of_allowed: float | None
    spread: float | None
    schedule: str
    knobs: str
    disturbed: str
    stale: bool
    time: str
    over_compile: float | None = None
    bytes: int | None = None
    flops: int | None = None
    copy_gbps: float | None = None
    of_roof: float | None = None
    roof: str = ""
    run: str = ""
    winner: str = ""
    decided_by: str = ""
    over_runner_up: float | None = None
    over_runner_up_low: float | None = None
    over_runner_up_high: float | None = None
    training_over_eager: float | None = None

    @property
    def case(self) -> Case:
        """The case that it is of."""
        return Case(self.op, self.hidden, self.dtype, self.rows)


SAME_ROUNDS, BEST_COPY = "copy in the same rounds", "best copy of the log"
""""roof" of a row."""


def spread(measured: Timing | None) -> float | None:
    """Distance between the quartiles as a share of the median."""
    if measured is None or len(measured.samples_us) < 4:  # noqa: PLR2004 (quartiles of fewer say nothing)
        return None
    if not measured.median_us:
        return None
    ordered = sorted(measured.samples_us)
    lower, upper = ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4]
    return (upper - lower) / measured.median_us


def row_of(record: Record, stale: bool = False) -> Row:
    """The row of a final record or benchmark result; `stale`: its schedule has changed since."""
    case, disturbed = record.case, record.disturbance
    timings = {} if disturbed else record.timings  # of which figures are made
    tuned, eager, copy, default = (
        timings.get(name) for name in ("tuned", "eager", "copy", "default")
    )
    compiled = timings.get("compile")
    better = min(eager, compiled, key=lambda t: t.median_us) if eager and compiled else None
    op = ops.OPS.get(case.op)
    moved = op.bytes(case) if op else None
    decision = None if disturbed else record.decision
    over_runner_up = decision.over_runner_up if decision else None
    of_copy = figures.of_copy(case, pairwise(copy, tuned))
    return Row(
        op=case.op,
        device=record.device.slug,
        dtype=case.dtype,
        hidden=case.hidden,
        rows=case.rows,
        bucket=bucket_label(case.bucket),
        eager_us=record.median("eager"),
        compile_us=record.median("compile"),
        tuned_us=record.median("tuned"),
        default_us=record.median("default"),
        copy_us=record.median("copy"),
        speedup=pairwise(eager, tuned),
        over_better=pairwise(better, tuned),
        over_default=pairwise(default, tuned),
        gbps=moved / tuned.median_us / 1e3 if moved and tuned and tuned.median_us else None,
        of_copy=of_copy,
        error=max(record.versus_eager.values(), default=None),
        of_allowed=max(record.errors.values(), default=None),
        spread=spread(tuned),
        schedule=record.schedule,
        knobs=describe(record.knobs),
        disturbed=disturbed,
        stale=stale,
        time=record.time,
        over_compile=pairwise(compiled, tuned),
        bytes=moved,
        flops=op.flops(case) if op else None,
        copy_gbps=_copied(case) / copy.median_us / 1e3 if op and copy and copy.median_us else None,
        of_roof=of_copy if op else None,
        roof=SAME_ROUNDS if op and of_copy is not None else "",
        run=record.run,
        winner=decision.verdict if decision else "",
        decided_by=decision.by if decision else "",
        over_runner_up=over_runner_up.ratio if over_runner_up else None,
        over_runner_up_low=over_runner_up.low if over_runner_up else None,
        over_runner_up_high=over_runner_up.high if over_runner_up else None,
        training_over_eager=None
        if disturbed
        else pairwise(record.training.get("eager"), record.training.get("tuned")),
    )


def _copied(case: Case) -> int:
    """The bytes that the copy which is measured beside a case reads and writes."""
    first = next(a for a in ops.get(case.op).arguments(case) if len(a.shape) > 1)
    return 2 * DTYPES[first.dtype] * math.prod(first.sizes(case.rows, case.hidden))


def rows_of(
    records: Iterable[Record], schedules: Mapping[str, Schedule] | None = None
) -> list[Row]:
    """The rows of many records, in the order a person looks for them; `schedules` as they are now
    tell which are stale.
    """
    return sorted(
        (row_of(r, select.stale(r, schedules or {})) for r in records),
        key=lambda r: (r.op, r.dtype, r.hidden, r.rows, r.device),
    )


def geomean(values: Iterable[float | None]) -> float | None:
    """Geometric mean of what is there; None of nothing."""
    logs = [math.log(v) for v in values if v]
    return math.exp(sum(logs) / len(logs)) if logs else None


_OURS = ("tuned", "eager", "compile", "copy", "default")


def peer_lines(records: Iterable[Record]) -> list[str]:
    """How the tuned op compares with each of others' kernels that were measured."""
    ratios: dict[str, list[float | None]] = {}
    for record in records:
        for name, measured in ({} if record.disturbance else record.timings).items():
            if name not in _OURS:
                ratios.setdefault(name, []).append(pairwise(measured, record.timings.get("tuned")))
    return [
        f"geomean {mean:.2f}x over {name} ({counted(len(speedups), 'case')})"
        for name, speedups in sorted(ratios.items())
        if (mean := geomean(speedups))
    ]


def summary(rows: list[Row]) -> dict[str, Any]:
    """Geomeans, the smallest share of a copy's bandwidth, and the cases in which the tuned op is
    slower than eager.
    """
    slower = [
        f"{r.op} {r.rows}x{r.hidden} {r.dtype}: {r.speedup:.2f}x"
        for r in rows
        if r.speedup is not None and r.speedup < 1
    ]
    return {
        "cases": len(rows),
        "geomean_over_eager": geomean(r.speedup for r in rows),
        "geomean_over_better_of_eager_and_compile": geomean(r.over_better for r in rows),
        "geomean_over_default": geomean(r.over_default for r in rows),
        "geomean_of_copy": geomean(r.of_copy for r in rows),
        "smallest_of_copy": min((r.of_copy for r in rows if r.of_copy is not None), default=None),
        "slower_than_eager": slower,
        "disturbed": sum(bool(r.disturbed) for r in rows),
        "stale": sum(r.stale for r in rows),
    }
