"""Grids of parameters of which every test run takes a part, and `make test-all` all.

What is left out of a run is marked `exhaustive`: combinations of values that each occur in others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest


def exhaustive(parameter: Any) -> Any:
    """The parameter, for `make test-all` only."""
    one = parameter if hasattr(parameter, "marks") else pytest.param(*_values(parameter))
    return pytest.param(*one.values, marks=(*one.marks, pytest.mark.exhaustive), id=one.id)


def _values(parameter: Any) -> tuple[Any, ...]:
    return parameter if type(parameter) is tuple else (parameter,)


def thinned(parameters: Iterable[Any], keep: int = 2) -> list[Any]:
    """Every `keep`-th of the parameters, beginning with the first, for every run."""
    return [one if n % keep == 0 else exhaustive(one) for n, one in enumerate(parameters)]


def covered(parameters: Iterable[Any], values: Callable[[Any], set[Any]]) -> list[Any]:
    """Few of the parameters for every run, in which every one of what `values` says of a parameter
    occurs: (axis, value), say, or combinations of values that are to be seen together.
    """
    every = list(parameters)
    chosen = covering([values(one) for one in every])
    return [one if n in chosen else exhaustive(one) for n, one in enumerate(every)]


def product(*axes: Sequence[Any]) -> list[Any]:
    """All combinations of the values of some axes; for every run few in which each value of an axis
    occurs: the n-th values of all, where short axes begin again.
    """
    diagonal = {
        tuple(n % len(axis) for axis in axes) for n in range(max(len(axis) for axis in axes))
    }
    combinations = []
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        values = tuple(axis[n] for axis, n in zip(axes, places, strict=True))
        combinations.append(values if places in diagonal else exhaustive(values))
    return combinations


def pairwise(sets: Sequence[frozenset[str]]) -> list[int]:
    """Numbers of few of the sets in which any two members are there, or not, in every combination
    that they have in all of them; the same every time.
    """
    members = sorted(frozenset[str]().union(*sets))
    pairs = list(itertools.combinations(members, 2))
    return covering([{(a, b, a in one, b in one) for a, b in pairs} for one in sets])


def each(sets: Sequence[frozenset[str]]) -> list[int]:
    """Numbers of few of the sets in which each member is there, and is not, as far as both occur in
    all of them; the same every time.
    """
    members = sorted(frozenset[str]().union(*sets))
    return covering([{(member, member in one) for member in members} for one in sets])


def covering(sets: Sequence[set[Any]]) -> list[int]:
    """Numbers of few of the sets that have together what all have, the fullest first chosen."""
    missing = set[Any]().union(*sets)
    chosen: list[int] = []
    while missing:
        chosen.append(max(range(len(sets)), key=lambda n: len(sets[n] & missing)))
        missing -= sets[chosen[-1]]
    return sorted(chosen) or [0]
