"""Ratios, their intervals and verdicts, on samples of which the truth is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lntune import certainty
from lntune.certainty import Drift, Estimate, paired, unpaired, verdicts

ROUNDS = 400
SAMPLES = st.lists(st.floats(0.0, 1e6), min_size=1, max_size=60)


def noise(rng: numpy.random.Generator, scatter: float = 0.05, rounds: int = ROUNDS) -> Any:
    """Logarithms of samples around 10 us, with heavy tails upwards."""
    tails = rng.exponential(0.5, rounds) * (rng.random(rounds) < 0.05)
    return math.log(10) + rng.normal(0, scatter, rounds) + tails


def wandering(rng: numpy.random.Generator, size: float, length: float, rounds: int) -> Any:
    """A level that wanders about 0 and stays alike for so many rounds."""
    kept, level, levels = math.exp(-1 / length), rng.normal(0, size), []
    for step in rng.normal(0, size * math.sqrt(1 - kept * kept), rounds):
        level = kept * level + step
        levels.append(level)
    return numpy.asarray(levels)


def covers(estimate: Estimate, ratio: float = 1.0) -> bool:
    """Whether the 95 % interval holds a ratio."""
    low, high = estimate.interval()
    return low <= ratio <= high


@pytest.mark.parametrize("rounds", [9, 20, 37, 400])
def test_intervals_hold_the_true_ratio_as_often_as_they_say(rounds: int) -> None:
    """Of 400 intervals some 95 % hold the true ratio of 1.2, with heavy tails, for few rounds and
    many; never fewer than 92 %.
    """
    rng = numpy.random.default_rng(1)
    held = [
        covers(paired(1.2 * numpy.exp(noise(rng, rounds=rounds)), numpy.exp(other)), 1.2)
        for other in (noise(rng, rounds=rounds) for _ in range(400))
    ]
    assert 0.92 <= numpy.mean(held) <= 0.995


def test_what_slows_a_round_down_slows_both_sides() -> None:
    """Phases of the whole machine, far larger than the difference, leave a paired ratio certain and
    an unpaired one uncertain.
    """
    rng = numpy.random.default_rng(2)
    phases = wandering(rng, 0.3, 50, ROUNDS)
    a, b = (numpy.exp(phases + noise(rng) + log) for log in (math.log(1.05), 0.0))
    assert paired(a, b).error < unpaired(a, b).error / 5
    assert verdicts([paired(a, b)]) == ["FASTER"]
    assert verdicts([unpaired(a, b)]) == ["UNSURE"]


def test_samples_that_are_alike_count_less() -> None:
    """Phases of one side make its interval wider than their scatter alone would, and it holds 1
    nearly as often as it says; without that correction it would in two of three.
    """
    rng = numpy.random.default_rng(3)
    held = []
    for _ in range(200):
        own = wandering(rng, 0.05, 20, ROUNDS)
        held.append(covers(paired(numpy.exp(noise(rng) + own), numpy.exp(noise(rng)))))
    assert numpy.mean(held) > 0.85


def test_no_difference_is_not_called_one() -> None:
    """Of 20 families of 50 A/A comparisons none has a FASTER or SLOWER, and with as many samples as
    that most are the SAME within 3 %.
    """
    rng = numpy.random.default_rng(4)
    found: list[str] = []
    for _ in range(20):
        pairs = [paired(numpy.exp(noise(rng)), numpy.exp(noise(rng))) for _ in range(50)]
        assert not {"FASTER", "SLOWER"} & set(verdicts(pairs))
        found += verdicts(pairs, 0.03)
    assert found.count("SAME") > 0.9 * len(found)


def test_three_percent_are_found() -> None:
    """With a thousand rounds B that takes 3 % less is FASTER in nine of ten cases of a family of
    50, and one that takes 3 % more SLOWER.
    """
    rng = numpy.random.default_rng(5)
    for log, verdict in ((math.log(1.03), "FASTER"), (-math.log(1.03), "SLOWER")):
        sides = [[numpy.exp(noise(rng, rounds=1000) + x) for x in (log, 0.0)] for _ in range(50)]
        found = verdicts([paired(a, b) for a, b in sides])
        assert found.count(verdict) >= 45


def test_the_smallest_difference_that_matters_decides() -> None:
    """3 % are FASTER where 1 % matters, and the SAME where 5 % do."""
    rng = numpy.random.default_rng(6)
    a, b = (numpy.exp(noise(rng, 0.02, 2000) + log) for log in (math.log(1.03), 0.0))
    assert verdicts([paired(a, b)], 0.01) == ["FASTER"]
    assert verdicts([paired(a, b)], 0.05) == ["SAME"]


def test_a_drift_moves_the_ratio_and_widens_the_interval() -> None:
    """Runs of which the second was 20 % slower are the SAME once that is known exactly, UNSURE as
    long as it is known to 10 %, and SLOWER where it is not known at all.
    """
    rng = numpy.random.default_rng(7)
    a, b = numpy.exp(noise(rng)), 1.2 * numpy.exp(noise(rng))
    moved = -math.log(1.2)
    assert verdicts([unpaired(a, b)], 0.03) == ["SLOWER"]
    assert verdicts([unpaired(a, b, Drift(moved))], 0.03) == ["SAME"]
    assert verdicts([unpaired(a, b, Drift(moved, 0.1, 10))], 0.03) == ["UNSURE"]


@given(SAMPLES, st.integers(0, 2**32 - 1))
def test_the_other_way_round_says_the_same(a: list[float], seed: int) -> None:
    """A against B and B against A have inverse ratios and intervals, whatever the samples: zeros
    too.
    """
    b = numpy.random.default_rng(seed).permutation(a)
    for estimates in ((paired(a, b), paired(b, a)), (unpaired(a, b), unpaired(b, a))):
        one, other = estimates
        assert one.log == pytest.approx(-other.log)
        assert one.error == pytest.approx(other.error)
        assert covers(one, one.ratio)
        verdict = verdicts([one])[0]
        turned = {"FASTER": "SLOWER", "SLOWER": "FASTER"}.get(verdict, verdict)
        assert verdicts([other]) == [turned]


@pytest.mark.parametrize("count", range(1, certainty.SAMPLES))
def test_few_samples_say_nothing(count: int) -> None:
    """Fewer than five samples leave the interval open, whatever the ratio."""
    few = paired([5.0] * count, [1.0] * count)
    assert few.interval() == (0.0, math.inf)
    assert verdicts([few]) == ["UNSURE"]


def test_samples_without_scatter_are_certain() -> None:
    """Exactly equal samples are the SAME, exactly twice as long ones FASTER."""
    assert verdicts([paired([2.0] * 30, [2.0] * 30), paired([4.0] * 30, [2.0] * 30)]) == [
        "SAME",
        "FASTER",
    ]


def test_other_numbers_of_samples_are_not_pairs() -> None:
    """Samples of different rounds cannot be paired, which is an error and no guess."""
    with pytest.raises(ValueError, match="got 2 and 3 samples"):
        paired([1.0, 2.0], [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("p", "adjusted"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.9, 0.8], [1.0, 1.0]),
        ([], []),
    ],
)
def test_holm(p: Sequence[float], adjusted: Sequence[float]) -> None:
    """p-values are multiplied by how many are left, from the smallest on, and keep their order
    (the first example is that of R's p.adjust).
    """
    assert certainty.holm(p) == pytest.approx(adjusted)


def test_errors_add_up_as_welch_and_satterthwaite_have_it() -> None:
    """The error and freedom of a difference of means are those of Welch's test."""
    from scipy.stats import ttest_ind

    rng = numpy.random.default_rng(8)
    a, b = rng.normal(0, 1, 12), rng.normal(1, 3, 30)
    expected = ttest_ind(a, b, equal_var=False)
    parts = [(float(x.std(ddof=1)) / math.sqrt(len(x)), len(x) - 1.0) for x in (a, b)]
    error, freedom = certainty.combined(parts)
    assert (a.mean() - b.mean()) / error == pytest.approx(expected.statistic)
    assert freedom == pytest.approx(expected.df)
