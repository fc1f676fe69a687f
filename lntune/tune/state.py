"""What a tuning run tells of itself: while it goes, and when it is over."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lntune.case import Case
from lntune.log.records import Record
from lntune.report.failures import Failures


@dataclass
class Progress:
    """What is known at a moment of the run; handed to the observer after every measurement."""

    case: Case
    index: int
    cases: int
    trials: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    best_us: float = math.inf
    best: str = ""
    eager_us: float | None = None
    phase: str = "search"
    deadline: float | None = None
    """When the whole run's budget ends, on time.monotonic's clock."""
    final: Record | None = None


Observer = Callable[[Progress], None]


@dataclass
class Summary:
    """What a run did: the finals it wrote, trials by status, why candidates failed (the commonest
    reason first), seconds, whether it was interrupted, which cases have no final and why, and what
    else is to be said of it.
    """

    finals: list[Record] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    interrupted: bool = False
    untuned: dict[str, str] = field(default_factory=dict)
    log_dir: Path = Path()
    failures: Failures = field(default_factory=Failures)
    notes: list[str] = field(default_factory=list)

    @property
    def trials(self) -> int:
        """Candidates tried, whatever came of them."""
        return sum(self.statuses.values())
