"""What a tuning run reports: its progress while it goes on, and a summary when it is over."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lntune.backends.cuda.model import Pair
from lntune.case import Case
from lntune.log.records import Record, Status
from lntune.report.failures import Failures

TIME_OVER = "the time was over"
"""Why a case was not tuned for which a run had no time."""
Phase = Literal["search", "final", "done"]
"""What a case is at: candidates are tried, the best are measured again, its final is logged."""


@dataclass
class Progress:
    """What is known at a moment of the run; handed to the observer after every measurement.
    `trials` are those of this run, `earlier` those that earlier runs have left nothing to find out
    about; the best is that of both.
    """

    case: Case
    index: int
    cases: int
    trials: int = 0
    failures: Counter[Status] = field(default_factory=Counter)
    best_us: float = math.inf
    best: str = ""
    eager_us: float | None = None
    phase: Phase = "search"
    deadline: float | None = None
    """When the whole run's budget ends, on time.monotonic's clock."""
    final: Record | None = None
    earlier: int = 0


Observer = Callable[[Progress], None]


@dataclass
class Summary:
    """What a run did: the finals it wrote, trials by status, why candidates failed (the commonest
    reason first), seconds, whether it was interrupted, which cases have no final and why, and what
    else is to be said of it. `earlier` are the trials of earlier runs that were not made again, by
    status; in `exhausted` cases they left nothing to try. `pairs` are a GPU's candidates with times
    measured and predicted.
    """

    finals: list[Record] = field(default_factory=list)
    statuses: Counter[Status] = field(default_factory=Counter)
    seconds: float = 0.0
    interrupted: bool = False
    untuned: dict[str, str] = field(default_factory=dict)
    log_dir: Path = Path()
    failures: Failures = field(default_factory=Failures)
    notes: list[str] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    earlier: Counter[Status] = field(default_factory=Counter)
    exhausted: int = 0

    @property
    def trials(self) -> int:
        """Candidates that this run has tried, whatever came of them."""
        return sum(self.statuses.values())
