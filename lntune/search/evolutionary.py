"""Evolution: a population of the best candidates so far, whose offspring have the knobs of both
parents mixed, or one knob changed.

A generation has no end: every trial is an offspring, and whoever is among the best that were tried
may be a parent next (a steady state), so that fifteen trials are enough to get going and two
hundred do not stop it. Parents are drawn by tournament. Offspring that are no candidates, or were
tried, are made again; where a parent's surroundings are used up, a random candidate takes their
place.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from lntune.search import in_hand
from lntune.search.budget import Budget, Evaluate
from lntune.search.space import Space

START = 4
"""Candidates that are tried before there are parents: the first one, the seeds, random ones."""
POPULATION = 8
"""The best so far that may be parents."""
TOURNAMENT = 2
"""Of the population are drawn for each parent, the better of which it is."""
CROSSOVER = 0.4
"""The share of offspring that have two parents; the others have a knob of one parent changed."""
STEP = 0.7
"""The share of changes that go to a neighbour; the others give a knob any value."""
ATTEMPTS = 12
"""How often an offspring is made again before a random candidate takes its place."""


def search(space: Space, evaluate: Evaluate, budget: Budget, rng: random.Random) -> None:
    """Tries the first candidate, the seeds and a few random ones, then offspring of the best so
    far, until all is tried or the budget is spent.
    """
    population = _Population(space, rng)
    untried = population.untried
    first = space.first()

    def choose(others: Sequence[Any]) -> list[Any]:
        if first:
            return [first.pop(0)]
        if len(population.costs) + len(others) < START:
            return [rng.choice(list(untried))]
        return [population.offspring()]

    in_hand.search(space, evaluate, budget, untried, choose, population.costs.__setitem__)


class _Population:
    """What was tried, and who may be a parent of what comes next."""

    def __init__(self, space: Space, rng: random.Random) -> None:
        self._space, self._rng = space, rng
        self._knobs = space.coordinates()
        self._by_knobs = {_key(knobs): c for c, knobs in self._knobs.items()}
        values: dict[str, dict[Any, None]] = {}
        for knobs in self._knobs.values():
            for name, value in knobs.items():
                values.setdefault(name, {})[value] = None
        self._values = {name: list(used) for name, used in values.items() if len(used) > 1}
        # a dictionary, not a set: its order does not depend on the hash seed
        self.untried = dict.fromkeys(self._knobs)
        self.costs: dict[Any, float] = {}

    def offspring(self) -> Any:
        """A candidate that was not tried, of parents that did well."""
        working = sorted(
            (c for c in self.costs if self.costs[c] < math.inf), key=lambda c: self.costs[c]
        )
        best = working[:POPULATION]
        for _ in range(ATTEMPTS if best else 0):
            one, other = self._parent(best), self._parent(best)
            child = self._mixed(one, other) if self._rng.random() < CROSSOVER else None
            child = self._changed(one) if child is None else child
            if child in self.untried:
                return child
        return self._rng.choice(list(self.untried))

    def _parent(self, best: list[Any]) -> Any:
        """The better of a few that are drawn; `best` has the best first."""
        return best[min(self._rng.randrange(len(best)) for _ in range(TOURNAMENT))]

    def _mixed(self, one: Any, other: Any) -> Any:
        """The candidate that has each knob from one of its parents; None where there is none, or
        it is one of them.
        """
        a, b = self._knobs[one], self._knobs[other]
        knobs = {n: b[n] if n in b and self._rng.random() < 0.5 else a[n] for n in a}  # noqa: PLR2004 (either)
        child = self._by_knobs.get(_key(knobs))
        return None if child in (one, other) else child

    def _changed(self, one: Any) -> Any:
        """A neighbour of a candidate, or one that differs in a knob; None where there is none."""
        if self._rng.random() < STEP or not self._values:
            around = [c for c in dict.fromkeys(self._space.neighbours(one)) if c in self.untried]
            return self._rng.choice(around) if around else None
        name = self._rng.choice(list(self._values))
        knobs = {**self._knobs[one], name: self._rng.choice(self._values[name])}
        return self._by_knobs.get(_key(knobs))


def _key(knobs: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(knobs.items()))
