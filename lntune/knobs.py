"""Knobs: what a schedule leaves to be tuned, as the fields of a frozen dataclass, which carry their
values and their meaning.

    @dataclass(frozen=True)
    class Knobs:
        unroll: int = knob(1, (1, 2, 4), "vector groups per loop step")

A setting is an instance; a space is every instance that `valid` has nothing against.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

from lntune import bounds
from lntune.errors import InputError, UnknownNameError, got_expected, unknown

Value = bounds.Whole | bool | bounds.Text
_SHOWN = 80
"""Characters of a text that a message shows."""
Valid = Callable[[Any], str | None]
"""Takes knobs, returns why they do not fit, or None."""


def knob(
    default: Value, values: tuple[Value, ...], doc: str, last: bool = False, searched: bool = True
) -> Any:
    """A dataclass field that is one knob: its default, every value it may take (in order), and what
    it means. One that is tried `last` does not multiply the space: its other values are tried with
    what was found best with its default. One that is not `searched` keeps its default in a space:
    what it changes is not in what a search measures.
    """
    if default not in values:
        raise InputError(got_expected("default", default, f"one of {values}"))
    metadata = {"values": values, "doc": doc, "last": last, "searched": searched}
    return dataclasses.field(default=default, metadata=metadata)


def open_knob(default: str, refuses: Callable[[str], str | None], doc: str) -> Any:
    """A dataclass field that is a knob of more values than can be listed: a text that `refuses` has
    nothing against, which it says by None. Nothing but its default is in a space; a schedule whose
    settings have others proposes them.
    """
    if reason := refuses(default):
        raise InputError(got_expected("default", repr(default), reason))
    metadata = {"values": (default,), "doc": doc, "searched": False, "refuses": refuses}
    return dataclasses.field(default=default, metadata=metadata)


def _refusals(cls: type) -> dict[str, Callable[[str], str | None]]:
    """The open knobs, with what says why they do not take a text."""
    return {
        f.name: f.metadata["refuses"] for f in dataclasses.fields(cls) if "refuses" in f.metadata
    }


def _check_open(name: str, value: Any, refuses: Callable[[str], str | None]) -> None:
    reason = refuses(value) if isinstance(value, str) else "expected a text"
    if reason:
        shown = repr(value) if len(repr(value)) <= _SHOWN else repr(value)[:_SHOWN] + "..."
        raise InputError(f"knob {name}: got {shown}, {reason}.")


def values_of(cls: type) -> dict[str, tuple[Value, ...]]:
    """Knob name -> the values it may take."""
    return {f.name: f.metadata["values"] for f in dataclasses.fields(cls)}


def to_dict(knobs: Any) -> dict[str, Value]:
    """Knobs as a plain dictionary, ready for the log."""
    return dataclasses.asdict(knobs)


def from_dict(cls: type, given: Mapping[str, Any]) -> Any:
    """Knobs from a dictionary; names left out take their defaults.

    Raises:
        UnknownNameError: a name that is not a knob of `cls`.
        InputError: a value the knob may not take.
    """
    choices, refusals = values_of(cls), _refusals(cls)
    for name, value in given.items():
        if name not in choices:
            raise unknown(f"{cls.__name__} knob", name, choices)
        if name in refusals:
            _check_open(name, value, refusals[name])
            continue
        # 1, True and 1.0 are equal, but not the same knob
        if not any(type(value) is type(v) and value == v for v in choices[name]):
            raise InputError(got_expected(f"knob {name}", repr(value), f"one of {choices[name]}"))
    return cls(**given)


def changed(setting: Any, words: Sequence[str]) -> Any:
    """A setting with some knobs changed, as tables write them: `name=value`, or the name of a
    switch that is to be on.

    Raises:
        UnknownNameError: a name that is none of the setting's knobs.
        InputError: a value that the knob may not take, or none where it is no switch; no name, or
            one that was there before.
    """
    choices, new = values_of(type(setting)), dict[str, Value]()
    refusals = _refusals(type(setting))
    for word in words:
        name, given, text = (part.strip() for part in word.partition("="))
        if not name:
            expected = "NAME=VALUE, or the name of a switch that is to be on"
            raise InputError(got_expected("knob", repr(word), expected))
        if name in new:
            raise InputError(got_expected("knob", f"{name} twice", "each knob once"))
        if name not in choices:
            raise unknown_knob(name, [type(setting)])
        if name in refusals:
            _check_open(name, text, refusals[name])
            new[name] = text
            continue
        values = {str(value).lower(): value for value in choices[name]}
        text = text.lower() if given else str(True).lower()
        if text not in values:
            expected = f"{name}=VALUE with one of {', '.join(values)}"
            raise InputError(got_expected("knob", repr(word), expected))
        new[name] = values[text]
    return dataclasses.replace(setting, **new)


def nearest(setting: Any, fixed: Container[str], fits: Callable[[Any], bool]) -> Any | None:
    """The setting that fits with as few other knobs changed as can be, one or two, by as few steps,
    none of them `fixed`; itself where it fits, None where none does.
    """
    if fits(setting):
        return setting
    choices = values_of(type(setting))
    free = [name for name in choices if name not in fixed and len(choices[name]) > 1]

    def steps(name: str, value: Value) -> int:
        return abs(choices[name].index(value) - choices[name].index(getattr(setting, name)))

    for count in (1, 2):
        changes = (
            dict(zip(names, values, strict=True))
            for names in itertools.combinations(free, count)
            for values in itertools.product(*(choices[name] for name in names))
            if all(value != getattr(setting, n) for n, value in zip(names, values, strict=True))
        )
        for change in sorted(changes, key=lambda c: sum(steps(n, v) for n, v in c.items())):
            if fits(other := dataclasses.replace(setting, **change)):
                return other
    return None


def unknown_knob(name: str, classes: Iterable[type]) -> UnknownNameError:
    """An error that lists the knobs of some schedules with the values that each may take."""
    values: dict[str, dict[str, None]] = {}
    for cls in classes:
        for known, given in values_of(cls).items():
            texts = ["TEXT"] if known in _refusals(cls) else [str(value).lower() for value in given]
            values.setdefault(known, {}).update(dict.fromkeys(texts))
    error = str(unknown("knob", name, values)).partition(" Known:")[0]
    known_values = ", ".join(f"{known}={'|'.join(texts)}" for known, texts in values.items())
    return UnknownNameError(f"{error} Known: {known_values or 'none'}.")


def enumerate_space(cls: type, valid: Valid = lambda _: None) -> Iterator[Any]:
    """Every valid knob setting, in the order the values are written; knobs that are tried last, or
    not at all, have their defaults.
    """
    choices = values_of(cls) | {f.name: (f.default,) for f in _kept(cls)}
    for combination in itertools.product(*choices.values()):
        knobs = cls(**dict(zip(choices, combination, strict=True)))
        if valid(knobs) is None:
            yield knobs


def _last(cls: type) -> list[Any]:
    """The fields of the knobs that are tried last."""
    return [f for f in dataclasses.fields(cls) if f.metadata.get("last")]


def _kept(cls: type) -> list[Any]:
    """The fields of the knobs that have their defaults throughout a space."""
    unsearched = [f for f in dataclasses.fields(cls) if not f.metadata.get("searched", True)]
    return [*_last(cls), *unsearched]


def unrefined(setting: Any) -> Any:
    """The setting with the defaults of knobs that are tried last or open, as a space has it."""
    kept = [f for f in _kept(type(setting)) if f.metadata.get("last") or "refuses" in f.metadata]
    return dataclasses.replace(setting, **{f.name: f.default for f in kept})


def refined(setting: Any) -> Iterator[Any]:
    """The settings that differ from one in knobs that are tried last."""
    fields = _last(type(setting))
    for combination in itertools.product(*(f.metadata["values"] for f in fields)):
        other = dataclasses.replace(
            setting, **{f.name: value for f, value in zip(fields, combination, strict=True)}
        )
        if other != setting:
            yield other


def neighbours(knobs: Any) -> Iterator[Any]:
    """Knob settings one step away: each knob, but for those that are tried last or not at all,
    moved to the value before and after its own.
    """
    kept = {f.name for f in _kept(type(knobs))}
    for name, values in values_of(type(knobs)).items():
        if name in kept:
            continue
        at = values.index(getattr(knobs, name))
        for step in (at - 1, at + 1):
            if 0 <= step < len(values):
                yield dataclasses.replace(knobs, **{name: values[step]})


def describe(knobs: Any) -> str:
    """Knobs on one line: `lanes=4 prefetch=1 parallel`; switches that are off are left out."""
    parts = []
    for name, value in to_dict(knobs).items() if dataclasses.is_dataclass(knobs) else knobs.items():
        if isinstance(value, bool):
            if value:
                parts.append(name)
        else:
            parts.append(f"{name}={value}")
    return " ".join(parts) or "none"
