"""What a run leaves out of a grid, and that nothing is left out of all runs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from grids import covered, each, exhaustive, pairwise, product, thinned


def in_every_run(parameters: list[Any]) -> list[tuple[Any, ...]]:
    """The values of the parameters that are not marked."""
    return [tuple(getattr(p, "values", p)) for p in parameters if not getattr(p, "marks", ())]


def every(parameters: list[Any]) -> list[tuple[Any, ...]]:
    """The values of all."""
    return [tuple(getattr(p, "values", p)) for p in parameters]


def test_each_value_is_in_every_run() -> None:
    """Whatever axes there are: nothing is missing from all, and every run has each value."""
    axes = (("a", "b"), (1, 2, 3), ("x", "y", "z", "w"))
    grid = product(*axes)
    assert len(set(every(grid))) == len(grid) == 24
    chosen = in_every_run(grid)
    assert len(chosen) == 4
    for place, axis in enumerate(axes):
        assert {values[place] for values in chosen} == set(axis)


def test_what_is_asked_for_is_in_every_run() -> None:
    """Every pair of the first two values, and each of the third; the rest is there, and marked."""
    grid = list(itertools.product("ab", "xy", (1, 2, 3)))
    made = covered(grid, lambda one: {one[:2], one[2]})
    assert every(made) == grid
    chosen = in_every_run(made)
    assert {one[:2] for one in chosen} == set(itertools.product("ab", "xy")) and len(chosen) == 4
    assert {one[2] for one in chosen} == {1, 2, 3}


def test_marks_and_names_stay() -> None:
    """A parameter that is left out keeps its name and the marks it had."""
    one = exhaustive(pytest.param("a", 1, id="name", marks=pytest.mark.gpu))
    assert (one.values, one.id) == (("a", 1), "name")
    assert [mark.name for mark in one.marks] == ["gpu", "exhaustive"]
    assert exhaustive("text").values == ("text",)
    left = [bool(getattr(p, "marks", ())) for p in thinned([("a", n) for n in range(5)], keep=2)]
    assert left == [False, True, False, True, False]


def test_few_sets_with_every_pair() -> None:
    """Of all sets of five members few have every pair in every combination; where combinations are
    missing from all, the others are there.
    """
    members = "abcde"
    sets = [
        frozenset(m for m, there in zip(members, bits, strict=True) if there)
        for bits in itertools.product((True, False), repeat=5)
    ]
    chosen = [sets[n] for n in pairwise(sets)]
    assert len(chosen) <= 8
    for two in itertools.combinations(members, 2):
        assert len({one & set(two) for one in chosen}) == 4
    assert pairwise([frozenset("a"), frozenset("b"), frozenset("a")]) == [0, 1]
    assert pairwise([frozenset()]) == [0]


def test_few_sets_with_each_member() -> None:
    """Two sets are enough where one has what the other has not; a member that none lacks, or has,
    is no reason for another.
    """
    assert each([frozenset("ab"), frozenset("a"), frozenset("b"), frozenset()]) == [0, 3]
    assert each([frozenset("ab"), frozenset("ac")]) == [0, 1]
    assert each([frozenset("a")]) == each([frozenset()]) == [0]
