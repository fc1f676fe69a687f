"""Knob spaces: every value reachable, nothing else accepted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lntune import knobs
from lntune.errors import InputError, UnknownNameError
from lntune.knobs import knob


@dataclass(frozen=True)
class Knobs:
    """One knob of each type."""

    lanes: int = knob(4, (1, 2, 4, 8), "how many")
    parallel: bool = knob(True, (False, True), "whether")
    mode: str = knob("row", ("row", "tile", "split"), "which")


def odd_modes(setting: Knobs) -> str | None:
    """Refuses tiles of one lane."""
    return "a tile of one lane" if setting.mode == "tile" and setting.lanes == 1 else None


any_knobs = st.builds(
    Knobs,
    lanes=st.sampled_from((1, 2, 4, 8)),
    parallel=st.booleans(),
    mode=st.sampled_from(("row", "tile", "split")),
)


def test_a_field_knows_its_values() -> None:
    """A knob's values and meaning are kept in its field, its default is the field's."""
    assert knobs.values_of(Knobs) == {
        "lanes": (1, 2, 4, 8),
        "parallel": (False, True),
        "mode": ("row", "tile", "split"),
    }
    assert Knobs() == Knobs(lanes=4, parallel=True, mode="row")
    assert Knobs.__dataclass_fields__["lanes"].metadata["doc"] == "how many"


def test_a_default_must_be_a_value() -> None:
    """A knob whose default is not among its values cannot be declared."""
    with pytest.raises(InputError, match=r"default: got 3, expected one of \(1, 2\)"):
        knob(3, (1, 2), "impossible")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), Knobs()),
        (("lanes=8", "mode=tile"), Knobs(lanes=8, mode="tile")),
        (("parallel=false",), Knobs(parallel=False)),
        (("parallel",), Knobs()),
        (("mode = Split ",), Knobs(mode="split")),
    ],
)
def test_words_change_a_setting(words: tuple[str, ...], expected: Knobs) -> None:
    """Knobs are given as tables write them, and what is not named stays."""
    assert knobs.changed(Knobs(), words) == expected


@pytest.mark.parametrize(
    "word", ["lanes", "lanes=3", "lanes=", "parallel=2", "parallel=", "mode=a"]
)
def test_a_word_that_is_no_value_is_refused(word: str) -> None:
    """The message shows the word and the values there are."""
    with pytest.raises(
        InputError, match=rf"knob: got '{word}', expected {word.partition('=')[0]}=V"
    ):
        knobs.changed(Knobs(), [word])
    with pytest.raises(UnknownNameError, match=r"'lane'\. Did you mean 'lanes'"):
        knobs.changed(Knobs(), ["lane=4"])


@pytest.mark.parametrize("word", ["", "=4", " = "])
def test_a_word_without_a_name_is_refused(word: str) -> None:
    """The message shows the word and says what words look like."""
    with pytest.raises(InputError, match=rf"knob: got '{word}', expected NAME=VALUE, or the name"):
        knobs.changed(Knobs(), ["lanes=8", word])


@pytest.mark.parametrize("words", [("lanes=8", "lanes=8"), ("parallel=False", "parallel")])
def test_a_knob_that_is_given_twice_is_refused(words: tuple[str, ...]) -> None:
    """Nobody has to guess which of the two counts."""
    name = words[0].partition("=")[0]
    with pytest.raises(InputError, match=f"knob: got {name} twice, expected each knob once"):
        knobs.changed(Knobs(), words)


def test_every_setting_once() -> None:
    """The space is the full product of the values, each setting once, the last knob changing
    fastest.
    """
    space = list(knobs.enumerate_space(Knobs))
    assert (
        len(space) == len(set(space)) == math.prod(len(v) for v in knobs.values_of(Knobs).values())
    )
    assert space[:4] == [
        Knobs(1, False, "row"),
        Knobs(1, False, "tile"),
        Knobs(1, False, "split"),
        Knobs(1, True, "row"),
    ]


def test_only_valid_settings() -> None:
    """What `valid` gives a reason against is left out, and nothing else."""
    assert set(knobs.enumerate_space(Knobs)) - set(knobs.enumerate_space(Knobs, odd_modes)) == {
        Knobs(1, False, "tile"),
        Knobs(1, True, "tile"),
    }


@given(setting=any_knobs)
def test_dictionary_and_back(setting: Knobs) -> None:
    """Knobs written as a dictionary of plain values come back equal."""
    plain = knobs.to_dict(setting)
    assert all(type(v) in (int, bool, str) for v in plain.values())
    assert knobs.from_dict(Knobs, plain) == setting


def test_what_is_left_out_takes_its_default() -> None:
    """A record that lacks a knob added later still loads, with the default."""
    assert knobs.from_dict(Knobs, {"lanes": 8}) == Knobs(lanes=8)
    assert knobs.from_dict(Knobs, {}) == Knobs()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lanes", 3),
        ("lanes", "4"),
        ("lanes", 4.0),
        ("lanes", True),
        ("lanes", None),
        ("lanes", [4]),
        ("parallel", 1),
        ("parallel", "yes"),
        ("mode", "rows"),
    ],
)
def test_a_value_that_is_none(name: str, value: Any) -> None:
    """A value the knob may not take, or one equal to it but of another type, is an InputError
    naming knob, value and choices.
    """
    with pytest.raises(InputError) as caught:
        knobs.from_dict(Knobs, {name: value})
    assert (
        str(caught.value)
        == f"knob {name}: got {value!r}, expected one of {knobs.values_of(Knobs)[name]}."
    )


def test_a_name_that_is_none() -> None:
    """An unknown knob is answered with the one that was meant, and the class it was looked for
    in.
    """
    with pytest.raises(
        UnknownNameError,
        match=r"unknown Knobs knob 'lane'. Did you mean 'lanes'\? Known: lanes, mode, parallel",
    ):
        knobs.from_dict(Knobs, {"lane": 4})


@given(setting=any_knobs)
def test_neighbours_are_one_step_away(setting: Knobs) -> None:
    """A neighbour differs in one knob, by one place in its list of values; none is listed twice,
    and being a neighbour is mutual.
    """
    values = knobs.values_of(Knobs)
    around = list(knobs.neighbours(setting))
    assert len(around) == len(set(around))
    for other in around:
        steps = [
            abs(v.index(getattr(other, n)) - v.index(getattr(setting, n)))
            for n, v in values.items()
        ]
        assert sorted(steps) == [0, 0, 1]
        assert setting in knobs.neighbours(other)
    ends = sum(getattr(setting, n) in (v[0], v[-1]) for n, v in values.items())
    assert len(around) == 2 * len(values) - ends


def test_every_setting_can_be_walked_to() -> None:
    """Step by step from the default all of the space is reached."""
    reached, border = {Knobs()}, [Knobs()]
    while border:
        new = [k for k in knobs.neighbours(border.pop()) if k not in reached]
        reached.update(new)
        border.extend(new)
    assert reached == set(knobs.enumerate_space(Knobs))


@dataclass(frozen=True)
class Limited:
    """Knobs of which one is tried last."""

    lanes: int = knob(4, (1, 2, 4), "how many")
    most: int = knob(0, (0, 64, 96), "a limit", last=True)


def test_knobs_that_are_tried_last() -> None:
    """They are no part of the space nor of what is one step away, but of what is tried with one
    setting; in a dictionary they are knobs as others.
    """
    space = list(knobs.enumerate_space(Limited))
    assert space == [Limited(1), Limited(2), Limited(4)]
    assert set(knobs.neighbours(Limited(2, 64))) == {Limited(1, 64), Limited(4, 64)}
    assert list(knobs.refined(Limited(2))) == [Limited(2, 64), Limited(2, 96)]
    assert knobs.unrefined(Limited(2, 96)) == Limited(2)
    assert knobs.from_dict(Limited, {"most": 96}) == Limited(4, 96)
    assert list(knobs.refined(Knobs())) == []


def test_describe() -> None:
    """Knobs on one line: numbers and names by value, switches by name where on; the same for a
    record's dictionary.
    """
    assert knobs.describe(Knobs()) == "lanes=4 parallel mode=row"
    assert knobs.describe(Knobs(parallel=False)) == "lanes=4 mode=row"
    assert knobs.describe({"parallel": True}) == "parallel"
    assert knobs.describe({"parallel": False}) == "none"


def test_what_is_not_searched_keeps_its_default() -> None:
    """A knob that no measurement decides on has its default in a space, and no neighbours there; it
    may be given all the same.
    """

    @dataclass(frozen=True)
    class Two:
        lanes: int = knob(1, (1, 2), "how many")
        early: bool = knob(True, (False, True), "whether", searched=False)

    assert list(knobs.enumerate_space(Two)) == [Two(1), Two(2)]
    assert list(knobs.neighbours(Two(1, early=False))) == [Two(2, early=False)]
    assert knobs.from_dict(Two, {"early": False}) == Two(early=False)
