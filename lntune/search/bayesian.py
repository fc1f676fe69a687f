"""A Gaussian process over the knobs, fitted to what was measured, says which candidate most likely
improves on the best (Jones, Schonlau, Welch 1998, "Efficient global optimization"; for spaces of
knobs Hellsten et al. 2023, "BaCO", arXiv:2212.11142).

The logarithm of a time is taken for a sum of a term for each knob, one for each two knobs, and one
for all of them together, each the smoother the nearer two values are in a knob's order. What is
next is the untried candidate with the largest expected improvement; those in hand are taken to turn
out as they are expected to (the "kriging believer" of Ginsbourger, Le Riche, Carraro 2010). All
candidates are listed, so that one is found by looking at all of them, and a trial adds one row to a
factor: 0.1 ms for hundreds of candidates, some ms for thousands.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from lntune.search import in_hand
from lntune.search.budget import Budget, Evaluate
from lntune.search.space import Space

SHARED, SINGLE, PAIRS, ALL = 1.0, 1.0, 0.3, 0.1
"""Variances, as shares of the scale that the costs tell: of what all candidates have in common, of
the terms of single knobs together, those of pairs, and that of all knobs.
"""
LENGTH = 3.0
"""Steps of a knob over which its term forgets: two values so far apart are alike by 1/e."""
NOISE = 0.03
"""Standard deviation of a measurement, as a share of that scale."""
MOST = 500
"""Trials that the model learns from: of more it would learn little, and slowly."""
FAILED = 1.0
"""A failure is taken for the slowest time so far, times exp of this."""


def search(space: Space, evaluate: Evaluate, budget: Budget, rng: random.Random) -> None:
    """Tries the first candidate and the seeds, then what most likely improves on the best of
    them.
    """
    process = _Process(space, rng)
    untried = dict.fromkeys(space.candidates)
    first = space.first()

    def choose(others: Sequence[Any]) -> list[Any]:
        return [first.pop(0) if first else process.most_promising(list(untried), others)]

    in_hand.search(space, evaluate, budget, untried, choose, process.add)


class _Process:
    """What was tried, and what is expected of the other candidates.

    Of the covariance K = LL' of what was tried, `factor` has the rows of K(tried, all) divided by
    L, and the vectors `times`, `failures` and `ones` are divided by L, too.
    """

    def __init__(self, space: Space, rng: random.Random) -> None:
        import numpy as np

        coordinates = space.coordinates()
        count = len(coordinates)
        self._candidates = list(coordinates)
        self._places = {c: place for place, c in enumerate(coordinates)}
        self._kernels = kernels(list(coordinates.values()), space.scales)
        # of two that promise the same chance decides
        self._chance = np.array([rng.random() for _ in range(count)])
        self._variance = np.full(count, SHARED + SINGLE + PAIRS + ALL)
        self._factor = np.empty((0, count))
        self._solved = np.empty((3, 0))
        self._lowest, self._highest = math.inf, -math.inf

    def add(self, candidate: Any, cost: float) -> None:
        """A candidate was tried, and cost so much; infinitely much where it failed."""
        import numpy as np

        failed = not cost < math.inf
        log = 0.0 if failed else math.log(max(cost, 1e-9))
        self._lowest = min(self._lowest, math.inf if failed else log)
        place, n = self._places[candidate], self._solved.shape[1]
        if n == MOST:
            return
        if n == len(self._factor):  # room for as many again
            self._factor = np.vstack([self._factor, np.empty((max(16, n), len(self._candidates)))])
        known = self._factor[:n, place]
        self._factor[n], scale = self._row(place, self._factor[:n])
        self._variance = np.maximum(self._variance - self._factor[n] ** 2, 1e-9)
        new = np.array([log, float(failed), 1.0])
        solved = (new - self._solved @ known) / scale
        self._solved = np.hstack([self._solved, solved[:, None]])
        self._highest = max(self._highest, -math.inf if failed else log)

    def most_promising(self, untried: Sequence[Any], in_hand: Sequence[Any] = ()) -> Any:
        """The candidate of which most improvement is expected; what comes of those `in_hand` is not
        known yet, so they move no mean, and leave less to be found out where they are.
        """
        import numpy as np

        places = np.array([self._places[c] for c in untried])
        if self._lowest == math.inf:
            return untried[int(np.argmax(self._chance[places]))]
        times, failures, ones = self._solved
        failure = max(self._highest, self._lowest) + FAILED
        weights = times + failure * failures - self._lowest * ones
        # the scale that makes what was measured most likely
        scale = max(math.sqrt(float(weights @ weights) / len(weights)), 1e-3)
        mean = weights @ self._factor[: len(weights), places]
        variance = self._variance_with(in_hand)[places]
        gain = expected_improvement(-mean / scale, np.sqrt(variance))
        return untried[int(np.argmax(gain + 1e-6 * self._chance[places]))]

    def _variance_with(self, in_hand: Sequence[Any]) -> Any:
        """The variance of every candidate once these are tried, too."""
        import numpy as np

        factor, variance = self._factor[: self._solved.shape[1]], self._variance
        for candidate in in_hand:
            row, _ = self._row(self._places[candidate], factor)
            factor = np.vstack([factor, row])
            variance = np.maximum(variance - row**2, 1e-9)
        return variance

    def _row(self, place: int, factor: Any) -> tuple[Any, float]:
        """(the row that a candidate adds to a factor, by what it was divided)."""
        row = self._covariance(place) - factor[:, place] @ factor
        scale = math.sqrt(max(float(row[place]), 0.0) + NOISE**2)
        return row / scale, scale

    def _covariance(self, place: int) -> Any:
        """Of a candidate with all of them, before anything was tried."""
        import numpy as np

        singles, squares = np.zeros((2, len(self._candidates)))
        product = np.ones(len(self._candidates))
        for codes, alike in self._kernels:
            one = alike[codes[place]][codes]
            singles += one
            squares += one * one
            product *= one
        knobs = max(1, len(self._kernels))
        pairs = (singles**2 - squares) / max(1, knobs * (knobs - 1))
        return SHARED + SINGLE * singles / knobs + PAIRS * pairs + ALL * product


def expected_improvement(mean: Any, deviation: Any) -> Any:
    """By how much normal variables are above 0 on average, counting those below as 0."""
    import numpy as np
    from scipy.special import ndtr

    ratio = mean / deviation
    return mean * ndtr(ratio) + deviation * np.exp(-(ratio**2) / 2) / math.sqrt(2 * math.pi)


def kernels(
    coordinates: Sequence[Mapping[str, Any]], scales: Mapping[str, Sequence[Any]]
) -> list[tuple[Any, Any]]:
    """For each knob that differs (the place of every candidate's value among its values, how alike
    two of its values are).
    """
    import numpy as np

    found = []
    for name in dict.fromkeys(name for knobs in coordinates for name in knobs):
        used = list(dict.fromkeys(knobs.get(name) for knobs in coordinates))
        if len(used) == 1:
            continue
        scale = [value for value in scales.get(name, ()) if value in used]
        at = {value: float(place) for place, value in enumerate(scale)}
        steps = [
            [abs(at[a] - at[b]) if a in at and b in at else float(a != b) for b in used]
            for a in used
        ]
        codes = np.array([used.index(knobs.get(name)) for knobs in coordinates])
        found.append((codes, np.exp(-np.array(steps) / LENGTH)))
    return found
