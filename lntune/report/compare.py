"""Two runs side by side: is the tuned op faster, slower, the same, or can the measurements not say?

The verdict follows the idea of NVBench's robust comparison: what decides is not one number against another but where the
whole interval lies in which the ratio must be expected. The ratio is A's median time divided by B's (above 1: B is
faster), its interval the 95 % percentile bootstrap of the two medians, resampled independently with a fixed seed:

* SAME when the interval lies within 3 % of 1 (1/1.03 to 1.03);
* FASTER when it lies wholly above 1.03, SLOWER when wholly below 1/1.03;
* UNSURE otherwise, and always when a side was measured on a busy machine, with another number of threads, in another way
  (outputs given or allocated), or too seldom.

The bootstrap sees the scatter within each run. What changed between the runs (another clock, a neighbour) it cannot see;
eager's own ratio, measured in the same two runs, is shown beside it and should be near 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.text import Text

from lntune import records
from lntune.case import Case
from lntune.errors import InputError, LogError, got_expected
from lntune.records import Record
from lntune.report.columns import Column, Table, key
from lntune.report.rows import geomean
from lntune.report.tables import micros, number
from lntune.words import counted

SAME = 1.03
SAMPLES = 5
"""Fewer samples than this on a side say nothing about its median."""
RESAMPLES = 2000
VERDICTS = ("FASTER", "SLOWER", "SAME", "UNSURE")
_STYLES = {"FASTER": "green", "SLOWER": "red", "SAME": "", "UNSURE": "yellow"}


class Comparison(msgspec.Struct, frozen=True):
    """One case: medians in microseconds, `ratio` = A / B with its 95 % interval (`low`, `high`), eager's own ratio, verdict, and
    why it is UNSURE where that is not the interval.
    """

    device: str
    case: Case
    a_us: float
    b_us: float
    ratio: float
    low: float
    high: float
    eager_ratio: float | None
    verdict: str
    reason: str


class Result(msgspec.Struct, frozen=True):
    """The cases both sides have, and those only one has."""

    cases: list[Comparison]
    only_a: list[str]
    only_b: list[str]

    def counts(self) -> dict[str, int]:
        """How many cases have each verdict."""
        return {verdict: sum(c.verdict == verdict for c in self.cases) for verdict in VERDICTS}


class _File(msgspec.Struct):
    """What `lntune bench --output` writes, as far as it matters here."""

    records: list[Record]


def load(path: Path) -> list[Record]:
    """The measured records of a file of `lntune bench --output`, or the latest finals of a folder of tuning logs.

    Raises:
        InputError: neither, or nothing was measured there.
        LogError: it cannot be read.
    """
    try:
        found = list(_latest(path)) if path.is_dir() else msgspec.json.decode(path.read_bytes(), type=_File).records
    except OSError as e:
        raise LogError(f"cannot read {path}: {e.strerror or e}. Give a file of `lntune bench --output` or a folder of tuning logs.") from e
    except (msgspec.MsgspecError, UnicodeDecodeError) as e:
        raise InputError(
            got_expected(str(path), f"a file that is not one ({e})", "JSON of `lntune bench --output`, or a folder of tuning logs")
        ) from e
    found = [r for r in found if r.status == "ok" and r.median() is not None]
    if not found:
        raise InputError(got_expected(str(path), "no measurements", "some", "Fill it with lntune bench --output or lntune tune --log-dir."))
    return found


def _latest(folder: Path) -> Sequence[Record]:
    by_device: dict[str, list[Record]] = {}
    for record in records.read([folder]):
        by_device.setdefault(record.device.slug, []).append(record)
    return [r for group in by_device.values() for r in records.finals(group).values()]


def interval(a: Sequence[float], b: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of median(a) / median(b); the same for the same samples and seed."""
    import numpy

    generator = numpy.random.default_rng(seed)

    def medians(samples: Sequence[float]) -> Any:
        values = numpy.asarray(samples)
        step = max(1, 2_000_000 // len(values))  # resamples at once: 16 MB of numbers
        parts = [
            numpy.median(values[generator.integers(0, len(values), (min(step, RESAMPLES - at), len(values)))], axis=1)
            for at in range(0, RESAMPLES, step)
        ]
        return numpy.concatenate(parts)

    low, high = numpy.percentile(medians(a) / medians(b), (2.5, 97.5))
    return float(low), float(high)


def verdict_of(low: float, high: float) -> str:
    """The verdict on an interval of the ratio A / B."""
    if low > SAME:
        return "FASTER"
    if high < 1 / SAME:
        return "SLOWER"
    return "SAME" if low >= 1 / SAME and high <= SAME else "UNSURE"


def _doubt(a: Record, b: Record) -> str:
    """Why no interval could decide between two records, or the empty string."""
    for side, record in (("A", a), ("B", b)):
        if record.busy:
            return f"{side} was measured on a busy machine"
        if len(record.timings["tuned"].samples_us) < SAMPLES:
            return f"{side} has fewer than {SAMPLES} samples"
    if a.threads != b.threads:
        return f"{counted(a.threads, 'thread')} in A, {b.threads} in B"
    for role, what in (("bench-given-output", "outputs were given"), ("bench-strided", "rows lay apart")):
        its = [r.role == role for r in (a, b)]
        if its[0] != its[1]:
            return f"{what} in {'AB'[its.index(True)]} only"
    return ""


def compare(before: Sequence[Record], after: Sequence[Record], across_devices: bool = False) -> Result:
    """The tuned times of `after` against those of `before`, for each device and case that both have.

    With `across_devices` the device does not matter, and each side must be of one.

    Raises:
        InputError: measurements of different devices, or no case in common.
    """
    here, there = ({r.device.slug: r.device for r in side} for side in (before, after))
    if across_devices:
        for name, side in (("A", here), ("B", there)):
            if len(side) > 1:
                raise InputError(got_expected(name, f"measurements of {', '.join(sorted(side))}", "one device on each side with --across-devices"))
    elif not any(slug in there and not device.differences(there[slug]) for slug, device in here.items()):
        shared = [f"{slug}: {'; '.join(here[slug].differences(there[slug]))}" for slug in here if slug in there]
        got = "; ".join(shared) or f"{', '.join(sorted(here))} in A, {', '.join(sorted(there))} in B"
        raise InputError(got_expected("device", got, "the same device on both sides", "Compare them all the same with --across-devices."))
    apart = set() if across_devices else {slug for slug in here if slug in there and here[slug].differences(there[slug])}
    a, b = ({("" if across_devices else r.device.slug, r.case): r for r in side if r.device.slug not in apart} for side in (before, after))
    both = sorted(a.keys() & b.keys())
    if not both:
        raise InputError(got_expected("cases", "none that A and B have in common", "some", f"A has {_few(a)}; B has {_few(b)}."))
    return Result([_one(a[key], b[key]) for key in both], _names(a.keys() - b.keys()), _names(b.keys() - a.keys()))


def _names(keys: Iterable[tuple[str, Case]]) -> list[str]:
    return [str(case) for _, case in sorted(keys)]


def _few(keys: Iterable[tuple[str, Case]], most: int = 3) -> str:
    names = _names(keys)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _one(a: Record, b: Record) -> Comparison:
    slow, fast = a.timings["tuned"], b.timings["tuned"]
    ratio = slow.median_us / fast.median_us
    low, high = interval(slow.samples_us, fast.samples_us) if slow.samples_us and fast.samples_us else (ratio, ratio)
    eager = [r.median("eager") for r in (a, b)]
    doubt = _doubt(a, b)
    return Comparison(
        device=b.device.slug,
        case=b.case,
        a_us=slow.median_us,
        b_us=fast.median_us,
        ratio=ratio,
        low=low,
        high=high,
        eager_ratio=eager[0] / eager[1] if eager[0] and eager[1] else None,
        verdict="UNSURE" if doubt else verdict_of(low, high),
        reason=doubt,
    )


def table(result: Result) -> Table:
    """Per case: both medians, their ratio with its interval, eager's ratio, verdict and why it is UNSURE."""
    columns = [*key("case"), Column("A us", 2), Column("B us", 2), Column("A / B"), Column("95 % interval", 1), Column("eager's A / B", 3)]
    reasons = any(c.reason for c in result.cases)
    columns += [Column("verdict", right=False), *([Column("why", 4, right=False)] if reasons else [])]
    made = Table("tuned: A / B, above 1 where B is faster", columns)
    for c in result.cases:
        figures = micros(c.a_us), micros(c.b_us), f"{c.ratio:.3f}", f"{c.low:.3f} .. {c.high:.3f}", number(c.eager_ratio, 3)
        made.add(str(c.case), *figures, Text(c.verdict, style=_STYLES[c.verdict]), *([c.reason] if reasons else []))
    return made


def lines(result: Result) -> list[str]:
    """What the comparison comes to, in sentences."""
    counts = result.counts()
    found = [f"{counted(len(result.cases), 'case')}: " + ", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts[v])]
    found[0] += f"; geomean A / B {number(geomean(c.ratio for c in result.cases), 3)}"
    found += [f"UNSURE in {n}: {reason}" for reason, n in Counter(c.reason for c in result.cases if c.reason).items()]
    for side, names in (("A", result.only_a), ("B", result.only_b)):
        if names:
            found.append(f"only in {side}: {', '.join(names)}")
    return found
