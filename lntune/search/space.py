"""What a search chooses from: candidates, and which of them are neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Space:
    """Candidates (hashable knob settings), the first tried first; `neighbours(candidate)` lists
    candidates one step away.

    `neighbours` may name settings that are no candidates (knobs that do not fit the case); a search
    passes over them. A space without candidates is searched at once.

    `seeds` are candidates that are known to be promising: searches that ask the space what comes
    next try them right after the first.

    `choose(preferred, others)` is for searches that let the space say what comes next: one of the
    preferred candidates if it may be, else one of the others; by default the first of them.
    """

    candidates: tuple[Any, ...]
    neighbours: Callable[[Any], Iterable[Any]]
    choose: Callable[[Sequence[Any], Sequence[Any]], Any] = lambda preferred, others: (
        preferred or others
    )[0]
    seeds: tuple[Any, ...] = ()
