"""One line of a report per measured case."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import msgspec

from lntune import ops
from lntune.case import bucket_label
from lntune.knobs import describe
from lntune.records import Record, Timing


class Row(msgspec.Struct, frozen=True):
    """A case with its figures: times in microseconds (medians), speedup = eager / tuned, bandwidth in GB/s of the bytes
    that must move, `of_copy` = that bandwidth as a share of a plain copy's, `error` = largest error divided by eager's own.

    None stands for what was not measured.
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
    over_default: float | None
    gbps: float | None
    of_copy: float | None
    error: float | None
    spread: float | None
    schedule: str
    knobs: str
    busy: bool
    time: str


def pairwise(slow: Timing | None, fast: Timing | None) -> float | None:
    """How many times faster `fast` is: the median over rounds of the ratio within a round, which a drifting clock leaves
    alone; the ratio of medians where the rounds do not match."""
    if slow is None or fast is None or not fast.median_us:
        return None
    if len(slow.samples_us) == len(fast.samples_us) and fast.samples_us:
        ratios = sorted(a / b for a, b in zip(slow.samples_us, fast.samples_us, strict=True))
        middle = len(ratios) // 2
        return ratios[middle] if len(ratios) % 2 else (ratios[middle - 1] + ratios[middle]) / 2
    return slow.median_us / fast.median_us


def spread(timing: Timing | None) -> float | None:
    """Distance between the quartiles as a share of the median."""
    if timing is None or len(timing.samples_us) < 4:  # noqa: PLR2004 (quartiles of fewer say nothing)
        return None
    ordered = sorted(timing.samples_us)
    return (ordered[3 * len(ordered) // 4] - ordered[len(ordered) // 4]) / timing.median_us


def row_of(record: Record) -> Row:
    """The row of one final record or benchmark result."""
    case, timings = record.case, record.timings
    tuned, eager, copy, default = (timings.get(name) for name in ("tuned", "eager", "copy", "default"))
    compiled = timings.get("compile")
    moved = ops.get(case.op).bytes(case) if case.op in ops.OPS else None
    return Row(
        op=case.op,
        device=record.device.slug,
        dtype=case.dtype,
        hidden=case.hidden,
        rows=case.rows,
        bucket=bucket_label(case.bucket),
        eager_us=eager and eager.median_us,
        compile_us=compiled and compiled.median_us,
        tuned_us=tuned and tuned.median_us,
        default_us=default and default.median_us,
        copy_us=copy and copy.median_us,
        speedup=pairwise(eager, tuned),
        over_default=pairwise(default, tuned),
        gbps=moved / tuned.median_us / 1e3 if moved and tuned else None,
        of_copy=pairwise(copy, tuned),
        error=max(record.versus_eager.values(), default=None),
        spread=spread(tuned),
        schedule=record.schedule,
        knobs=describe(record.knobs),
        busy=record.busy,
        time=record.time,
    )


def rows_of(records: Iterable[Record]) -> list[Row]:
    """The rows of many records, in the order a person looks for them."""
    return sorted((row_of(r) for r in records), key=lambda r: (r.op, r.device, r.dtype, r.hidden, r.rows))


def geomean(values: Iterable[float | None]) -> float | None:
    """Geometric mean of what is there; None of nothing."""
    logs = [math.log(v) for v in values if v]
    return math.exp(sum(logs) / len(logs)) if logs else None


def best_rival(row: Row) -> float | None:
    """The better of eager and torch.compile in microseconds."""
    return min((v for v in (row.eager_us, row.compile_us) if v), default=None)


def summary(rows: list[Row]) -> dict[str, Any]:
    """Geomeans, and the cases in which the tuned op is slower than eager."""
    slower = [f"{r.op} {r.rows}x{r.hidden} {r.dtype}: {r.speedup:.2f}x" for r in rows if r.speedup is not None and r.speedup < 1]
    rivals = [best / r.tuned_us for r in rows if r.tuned_us and (best := best_rival(r))]
    return {
        "cases": len(rows),
        "geomean_over_eager": geomean(r.speedup for r in rows),
        "geomean_over_better_of_eager_and_compile": geomean(rivals) if any(r.compile_us for r in rows) else None,
        "geomean_over_default": geomean(r.over_default for r in rows),
        "slower_than_eager": slower,
        "measured_on_a_busy_machine": sum(r.busy for r in rows),
    }
