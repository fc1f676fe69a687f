"""What a search walks over."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Space:
    """Candidates (hashable knob settings), the first tried first; `neighbours(candidate)` lists candidates one step away.

    `neighbours` may name settings that are no candidates (knobs that do not fit the case); a search passes over them.
    A space without candidates is searched at once.
    """

    candidates: tuple[Any, ...]
    neighbours: Callable[[Any], Iterable[Any]]
