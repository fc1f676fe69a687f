"""How many times faster one side is than another, and how certain that is.

Everything is reckoned on logarithms of ratios, so that A against B and B against A say the same. A
ratio's uncertainty is a standard error with its degrees of freedom; its interval and the verdict
follow from Student's distribution.

* **Paired**: samples of the same rounds. What slows a round down slows both, so it is the ratios
  within rounds that count; the estimate is their median.
* **Unpaired**: samples of different runs, the ratio of medians. What changed between the runs
  cannot be seen in the samples of either; it is given as a `Drift`, which moves the ratio and
  widens its interval.

Neighbouring samples are alike (a clock or a neighbour changes for a while, and one side suffers
more), so samples are not counted as independent: they are cut into batches of consecutive ones, and
it is the scatter between batches that tells the error (batch means, as in the analysis of
simulations), made larger by how alike neighbouring batches are still.

Verdicts are for many cases at once. A case is FASTER or SLOWER when, at an error of 5 % for the
whole family of cases (Holm 1979, "A simple sequentially rejective multiple test procedure"), its
ratio lies beyond the smallest difference that matters; SAME when, at 5 % for itself, it lies within
that; else UNSURE.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import msgspec

ERROR = 0.05
"""Of a family of comparisons, the chance that any is called FASTER or SLOWER and is not."""
SMALLEST = 0.01
"""The smallest difference that matters, where none is given."""
SAMPLES = 5
"""Fewer samples than this say nothing about their median."""
BATCHES = 20
"""Batches of consecutive samples, whose scatter tells the error."""
ALIKE = 0.9
"""The most that neighbouring batches are taken to be correlated."""
LEAST_FREEDOM = 2.0
QUICKEST_US = 1e-4
"""What records are rounded to."""
CORRECTION = "Holm"

Verdict = Literal["FASTER", "SLOWER", "SAME", "UNSURE"]
"""Of a ratio: certainly beyond the smallest difference that matters, certainly within it, or
neither.
"""
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


class Estimate(msgspec.Struct, frozen=True):
    """The logarithm of a ratio A / B (above 0: B is faster), its standard error, and the degrees of
    freedom that this has; an infinite error where the samples say nothing.
    """

    log: float
    error: float = math.inf
    freedom: float = math.inf

    @property
    def ratio(self) -> float:
        """A / B."""
        return math.exp(self.log)

    def interval(self, error: float = ERROR) -> tuple[float, float]:
        """The interval in which the ratio lies but for a chance of `error`."""
        if not math.isfinite(self.error):
            return 0.0, math.inf
        reach = _quantile(1 - error / 2, self.freedom) * self.error
        return math.exp(self.log - reach), math.exp(min(700.0, self.log + reach))

    def beyond(self, smallest: float) -> float:
        """The p-value of the ratio lying within `smallest` of 1, or on its other side: small where
        it is certainly beyond.
        """
        return 2 * _tail(abs(self.log) - math.log1p(smallest), self.error, self.freedom)

    def within(self, smallest: float) -> float:
        """The p-value of the ratio lying beyond `smallest` of 1 (two one-sided tests, of which the
        larger counts): small where it is certainly the same.
        """
        return _tail(math.log1p(smallest) - abs(self.log), self.error, self.freedom)


class Drift(msgspec.Struct, frozen=True):
    """How much a device's speed changed between two runs: the logarithm of A / B that all cases
    share, which is taken off, and what of it is not certain, case by case.
    """

    log: float = 0.0
    error: float = 0.0
    freedom: float = math.inf


def paired(a: Sequence[float], b: Sequence[float], batches: int = BATCHES) -> Estimate:
    """A / B of samples that were taken in the same rounds, in their order; fewer batches are for
    few samples, so that each has a median.

    Raises:
        ValueError: there are not as many on both sides.
    """
    if len(a) != len(b):
        raise ValueError(f"paired: got {len(a)} and {len(b)} samples, expected as many of both")
    return _estimate(_logs(a) - _logs(b), batches)


def unpaired(a: Sequence[float], b: Sequence[float], drift: Drift | None = None) -> Estimate:
    """A / B of samples of different runs, without the drift between these."""
    one, other = (_estimate(_logs(side)) for side in (a, b))
    return difference(one, other, drift)


def difference(one: Estimate, other: Estimate, drift: Drift | None = None) -> Estimate:
    """How far one ratio lies above another, such as A over eager mode in its run above B over eager
    mode in its own; without the drift between the runs.
    """
    moved = drift or Drift()
    parts = [(e.error, e.freedom) for e in (one, other, moved)]
    return Estimate(one.log - other.log - moved.log, *combined(parts))


def combined(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The standard error of a sum whose parts have these errors and degrees of freedom, and its own
    degrees of freedom (Welch and Satterthwaite).
    """
    variance = sum(error * error for error, _ in parts)
    if not math.isfinite(variance):
        return math.inf, math.inf
    below = sum(error**4 / freedom for error, freedom in parts if error)
    return math.sqrt(variance), variance * variance / below if below else math.inf


def verdicts(estimates: Sequence[Estimate], smallest: float = SMALLEST) -> list[Verdict]:
    """The verdict on each of a family of comparisons."""
    adjusted = holm([e.beyond(smallest) for e in estimates])
    return [_verdict(e, p, smallest) for e, p in zip(estimates, adjusted, strict=True)]


def _verdict(estimate: Estimate, p: float, smallest: float) -> Verdict:
    if p <= ERROR:
        return "FASTER" if estimate.log > 0 else "SLOWER"
    return "SAME" if estimate.within(smallest) <= ERROR / 2 else "UNSURE"


def holm(p: Sequence[float]) -> list[float]:
    """p-values of a family, each made as large as testing so many at once has it."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, largest = [1.0] * len(p), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - place) * p[i]))
        adjusted[i] = largest
    return adjusted


def _logs(samples: Sequence[float]) -> Any:
    """The logarithms of samples; nothing is quicker than what a clock can tell."""
    import numpy

    return numpy.log(numpy.maximum(numpy.asarray(samples, dtype=float), QUICKEST_US))


def _estimate(values: Any, most: int = BATCHES) -> Estimate:
    """The median of logarithms, in the order in which they were measured, with the error that so
    many batches tell at most.
    """
    import numpy

    median = float(numpy.median(values))
    if len(values) < SAMPLES:
        return Estimate(median)
    batches = min(most, len(values))
    # whole batches: what is over is left out of the error, and is in the median
    size = len(values) // batches
    middles = numpy.median(values[: batches * size].reshape(batches, size), axis=1)
    error = float(middles.std(ddof=1)) / math.sqrt(batches)
    alike = _alike(middles)
    inflation = (1 + alike) / (1 - alike)
    freedom = max(LEAST_FREEDOM, (batches - 1) / inflation)
    return Estimate(median, error * math.sqrt(inflation), freedom)


def _alike(middles: Sequence[float]) -> float:
    """The correlation of neighbouring batches, from 0 on. That of few batches comes out too small,
    which is made good (Kendall 1954, "Note on bias in the estimation of autocorrelation").
    """
    import numpy

    centred = numpy.asarray(middles) - numpy.mean(middles)
    variance, count = float(centred @ centred), len(centred)
    if not variance:
        return 0.0
    seen = float(centred[1:] @ centred[:-1]) / variance
    return min(ALIKE, max(0.0, (seen + 1 / count) / (1 - 4 / count)))


def _tail(distance: float, error: float, freedom: float) -> float:
    """The chance of a value so far above its mean, or farther."""
    from scipy.special import ndtr, stdtr

    if not math.isfinite(error):
        return 0.5
    if not error:
        return 0.0 if distance > 0 else 1.0
    z = distance / error
    return float(stdtr(freedom, -z) if math.isfinite(freedom) else ndtr(-z))


def _quantile(share: float, freedom: float) -> float:
    from scipy.special import ndtri, stdtrit

    return float(stdtrit(freedom, share) if math.isfinite(freedom) else ndtri(share))
