"""What a search chooses from: candidates, and which of them are neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Space:
    """Candidates (hashable knob settings), the first tried first; `neighbours(candidate)` lists
    candidates one step away.

    `neighbours` may name settings that are no candidates (knobs that do not fit the case); a search
    passes over them. A space without candidates is searched at once.

    `seeds` are candidates that are known to be promising: searches that do not keep an order of
    their own try them right after the first.

    `choose(preferred, others)` is for searches that let the space say what comes next: one of the
    preferred candidates if it may be, else one of the others; by default the first of them.

    `at_once` candidates may be in hand at a time: one is evaluated, the others are got ready
    meanwhile by whoever `begin(candidate)` tells of them, which is called for each that is chosen,
    in the order in which they are evaluated. A search may leave both alone.

    `knobs(candidate)` are a candidate's knobs by name, for searches that mix candidates or learn
    from them; none where they are not known. `scales` are the values of a knob in their order, for
    knobs whose values have one.
    """

    candidates: tuple[Any, ...]
    neighbours: Callable[[Any], Iterable[Any]]
    choose: Callable[[Sequence[Any], Sequence[Any]], Any] = lambda preferred, others: (
        preferred or others
    )[0]
    seeds: tuple[Any, ...] = ()
    knobs: Callable[[Any], Mapping[str, Any]] = lambda _: {}
    scales: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    at_once: int = 1
    begin: Callable[[Any], None] = lambda _: None

    def first(self) -> list[Any]:
        """The first candidate and the seeds, each once."""
        listed = dict.fromkeys(self.candidates)
        return [c for c in dict.fromkeys((*self.candidates[:1], *self.seeds)) if c in listed]

    def coordinates(self) -> dict[Any, dict[str, Any]]:
        """The knobs of every candidate; a candidate without any has one of its own, its place."""
        return {
            c: dict(self.knobs(c)) or {"candidate": place}
            for place, c in enumerate(dict.fromkeys(self.candidates))
        }
