"""Two runs side by side: is the tuned op faster, slower, the same, or can the measurements not say?

The verdict follows the idea of NVBench's robust comparison: what decides is not one number against
another but where the whole interval lies in which the ratio must be expected. The ratio is A's
median time divided by B's (above 1: B is faster), its interval the 95 % percentile bootstrap of the
two medians, resampled independently with a fixed seed:

* SAME when the interval lies within 3 % of 1 (1/1.03 to 1.03);
* FASTER when it lies wholly above 1.03, SLOWER when wholly below 1/1.03;
* UNSURE otherwise, and always when a side was measured with another number of threads or in another
  way (outputs given or allocated);
* UNSURE, too, when a side was disturbed by other work on the machine or measured too seldom, unless
  the ratio is beyond 3 either way and eager's own, in the same two runs, is not: so much is no
  noise. (A loss counts as one also where eager was not measured.)

The bootstrap sees the scatter within each run. What changed between the runs (another clock, a
neighbour) it cannot see; eager's own ratio, measured in the same two runs, is shown beside it and
should be near 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
from rich.text import Text

from lntune.case import Case
from lntune.device import Device
from lntune.errors import InputError, LogError, got_expected
from lntune.log import records
from lntune.log.records import Record
from lntune.report.columns import Column, Table, key
from lntune.report.rows import geomean
from lntune.report.tables import micros, number
from lntune.words import counted

SAME = 1.03
LARGE = 3.0
"""A ratio beyond this is more than noise, where eager's own does not explain it; and no reason to
let a case pass where it does.
"""
SAMPLES = 5
"""Fewer samples than this on a side say nothing about its median."""
RESAMPLES = 2000
Verdict = Literal["FASTER", "SLOWER", "SAME", "UNSURE"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
_STYLES = {"FASTER": "green", "SLOWER": "red", "SAME": "", "UNSURE": "yellow"}


class Comparison(msgspec.Struct, frozen=True):
    """One case: medians in microseconds, `ratio` = A / B with its 95 % interval (`low`, `high`),
    eager's own ratio, verdict, and why the measurements are to be doubted, where they are.
    """

    device: str
    case: Case
    a_us: float
    b_us: float
    ratio: float
    low: float
    high: float
    eager_ratio: float | None
    verdict: Verdict
    reason: str


class Result(msgspec.Struct, frozen=True):
    """The cases both sides have, and those only one has."""

    cases: list[Comparison]
    only_a: list[str]
    only_b: list[str]

    def counts(self) -> dict[str, int]:
        """How many cases have each verdict."""
        return {verdict: sum(c.verdict == verdict for c in self.cases) for verdict in VERDICTS}

    def failing(self, on: str) -> list[str]:
        """The cases for which to fail: `on` "slower" those that are slower in B, or that look LARGE
        times as slow and cannot be decided; "unsure" all that are slower or cannot be decided.
        """
        failing = []
        for c in self.cases:
            lost = c.verdict == "UNSURE" and c.ratio < 1 / LARGE
            if c.verdict == "SLOWER" or lost or (on == "unsure" and c.verdict == "UNSURE"):
                loss = f", B takes {1 / c.ratio:.1f} times as long; measure again" if lost else ""
                failing.append(f"{c.case}: {c.verdict}{loss}")
        return failing


class _File(msgspec.Struct):
    """What `lntune bench --output` writes, as far as it matters here."""

    records: list[Record]


def load(path: Path) -> list[Record]:
    """The measured records of a file of `lntune bench --output`, or the finals that count
    (`records.finals`) of a folder of tuning logs, of one device's folder in it, or of one log file.

    Raises:
        InputError: neither, or nothing was measured there.
        LogError: it cannot be read.
    """
    try:
        logs = path.is_dir() or path.suffix == ".jsonl"
        measured = _finals(path) if logs else _benchmarks(path)
    except OSError as e:
        raise LogError(f"cannot read {path}: {e.strerror or e}. Give {_SIDE}.") from e
    except (msgspec.MsgspecError, UnicodeDecodeError) as e:
        raise InputError(got_expected(str(path), f"a file that is not one ({e})", _SIDE)) from e
    measured = [r for r in measured if r.status == "ok" and r.median() is not None]
    if not measured:
        remedy = "Fill it with lntune bench --output or lntune tune --log-dir."
        raise InputError(got_expected(str(path), "no measurements", "some", remedy))
    return measured


_SIDE = (
    "JSON of `lntune bench --output`, a folder of tuning logs,"
    " a device's folder in it, or one .jsonl"
)


def _benchmarks(path: Path) -> list[Record]:
    return msgspec.json.decode(path.read_bytes(), type=_File).records


def _finals(path: Path) -> list[Record]:
    files = [path] if path.is_file() else sorted(path.glob("*.jsonl"))
    read = (
        records.merged(list(records.read_file(file, "final")) for file in files)
        if files
        else records.read([path], role="final")
    )
    return [r for group in records.by_device(read) for r in records.finals(group).values()]


def interval(a: Sequence[float], b: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of median(a) / median(b); the same for the same
    samples and seed.
    """
    import numpy

    generator = numpy.random.default_rng(seed)

    def medians(samples: Sequence[float]) -> Any:
        values = numpy.asarray(samples)
        step = max(1, 2_000_000 // len(values))  # resamples at once: 16 MB of numbers
        parts = []
        for at in range(0, RESAMPLES, step):
            shape = min(step, RESAMPLES - at), len(values)
            parts.append(numpy.median(values[generator.integers(0, len(values), shape)], axis=1))
        return numpy.concatenate(parts)

    low, high = numpy.percentile(medians(a) / medians(b), (2.5, 97.5))
    return float(low), float(high)


def verdict_of(low: float, high: float) -> Verdict:
    """The verdict on an interval of the ratio A / B."""
    if low > SAME:
        return "FASTER"
    if high < 1 / SAME:
        return "SLOWER"
    return "SAME" if low >= 1 / SAME and high <= SAME else "UNSURE"


def _beyond_noise(low: float, high: float, ratio: float, eager: float | None) -> Verdict:
    """The verdict where the measurements are to be doubted, `eager` being eager's own ratio."""
    if high < 1 / LARGE and (eager is None or ratio / eager < 1 / LARGE):
        return "SLOWER"
    return "FASTER" if low > LARGE and eager is not None and ratio / eager > LARGE else "UNSURE"


def _noise(a: Record, b: Record) -> str:
    """Why only a large difference between two records would say something, or the empty string."""
    for side, record in (("A", a), ("B", b)):
        if record.disturbance:
            return f"{side} was disturbed by other work on the machine"
        if len(record.timings["tuned"].samples_us) < SAMPLES:
            return f"{side} has fewer than {SAMPLES} samples"
    return ""


def _obstacle(a: Record, b: Record) -> str:
    """Why no difference between two records would say anything, or the empty string."""
    if a.threads != b.threads:
        return f"{counted(a.threads, 'thread')} in A, {b.threads} in B"
    for role, what in (
        ("bench-given-output", "outputs were given"),
        ("bench-strided", "rows lay apart"),
    ):
        sides = [r.role == role for r in (a, b)]
        if sides[0] != sides[1]:
            return f"{what} in {'AB'[sides.index(True)]} only"
    return ""


def compare(
    before: Sequence[Record], after: Sequence[Record], across_devices: bool = False
) -> Result:
    """The tuned times of `after` against those of `before`, for each device and case that both
    have. Rows must be the same: within a bucket, which one kernel serves, times go with them.

    With `across_devices` the device does not matter, and each side must be of one.

    Raises:
        InputError: measurements of different devices, or no case in common.
    """
    devices = _distinct([r.device for r in (*before, *after)])
    of_a, of_b = ({_place(devices, r.device) for r in side} for side in (before, after))
    if across_devices:
        for name, side in (("A", of_a), ("B", of_b)):
            if len(side) > 1:
                got = f"measurements of {', '.join(sorted(devices[i].slug for i in side))}"
                expected = "one device on each side with --across-devices"
                raise InputError(got_expected(name, got, expected))
    elif not of_a & of_b:
        one, other = devices[min(of_a)], devices[min(of_b)]
        got = f"{one.slug} in A, {other.slug} in B ({'; '.join(one.differences(other))})"
        remedy = "Compare them all the same with --across-devices."
        raise InputError(got_expected("device", got, "the same device on both sides", remedy))
    a, b = (
        {(0 if across_devices else _place(devices, r.device), r.case): r for r in side}
        for side in (before, after)
    )
    both = sorted(a.keys() & b.keys())
    if not both:
        got, remedy = "none that A and B have in common", f"A has {_few(a)}; B has {_few(b)}."
        raise InputError(got_expected("cases", got, "some", remedy))
    only_a, only_b = _names(a.keys() - b.keys()), _names(b.keys() - a.keys())
    return Result([_one(a[key], b[key]) for key in both], only_a, only_b)


def _place(devices: Sequence[Device], device: Device) -> int:
    """The index of a device, which may have another slug there: old records name no model."""
    return next(i for i, one in enumerate(devices) if not one.differences(device))


def _distinct(described: Iterable[Device]) -> list[Device]:
    """The devices without those that are another one's second description."""
    devices: list[Device] = []
    for device in described:
        if all(other.differences(device) for other in devices):
            devices.append(device)
    return devices


def _names(keys: Iterable[tuple[int, Case]]) -> list[str]:
    return [str(case) for _, case in sorted(keys)]


def _few(keys: Iterable[tuple[int, Case]], most: int = 3) -> str:
    names = _names(keys)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _one(a: Record, b: Record) -> Comparison:
    slow, fast = a.timings["tuned"], b.timings["tuned"]
    ratio = slow.median_us / fast.median_us
    low, high = (
        interval(slow.samples_us, fast.samples_us)
        if slow.samples_us and fast.samples_us
        else (ratio, ratio)
    )
    eager = [r.median("eager") for r in (a, b)]
    eager_ratio = eager[0] / eager[1] if eager[0] and eager[1] else None
    obstacle, noise = _obstacle(a, b), _noise(a, b)
    verdict: Verdict
    if obstacle:
        verdict = "UNSURE"
    elif noise:
        verdict = _beyond_noise(low, high, ratio, eager_ratio)
    else:
        verdict = verdict_of(low, high)
    return Comparison(
        device=b.device.slug,
        case=b.case,
        a_us=slow.median_us,
        b_us=fast.median_us,
        ratio=ratio,
        low=low,
        high=high,
        eager_ratio=eager_ratio,
        verdict=verdict,
        reason=obstacle or noise,
    )


def table(result: Result) -> Table:
    """Per case: medians, their ratio and its interval, eager's, and the verdict with its reason."""
    columns = [
        *key("case"),
        Column("A us", 2),
        Column("B us", 2),
        Column("A / B"),
        Column("95 % interval", 1),
        Column("eager's A / B", 3),
        Column("verdict", right=False),
    ]
    reasons = any(c.reason for c in result.cases)
    if reasons:
        columns.append(Column("why", 4, right=False))
    rows = Table("tuned: A / B, above 1 where B is faster", columns)
    for c in result.cases:
        rows.add(
            str(c.case),
            micros(c.a_us),
            micros(c.b_us),
            f"{c.ratio:.3f}",
            f"{c.low:.3f} .. {c.high:.3f}",
            number(c.eager_ratio, 3),
            Text(c.verdict, style=_STYLES[c.verdict]),
            *([c.reason] if reasons else []),
        )
    return rows


def lines(result: Result) -> list[str]:
    """What the comparison comes to, in sentences."""
    counts = result.counts()
    verdicts = ", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts[v])
    mean = number(geomean(c.ratio for c in result.cases), 3)
    text = [f"{counted(len(result.cases), 'case')}: {verdicts}; geomean A / B {mean}"]
    reasons = Counter(c.reason for c in result.cases if c.reason)
    text += [f"doubtful in {n}: {reason}" for reason, n in reasons.items()]
    for side, names in (("A", result.only_a), ("B", result.only_b)):
        if names:
            text.append(f"only in {side}: {', '.join(names)}")
    return text
