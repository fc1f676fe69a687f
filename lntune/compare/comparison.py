"""What a comparison says: of each case two measurements, their ratio, and the verdict."""

from __future__ import annotations

from typing import Literal

import msgspec

from lntune.case import Case
from lntune.compare.statistics import CORRECTION, SMALLEST, VERDICTS, Verdict
from lntune.knobs import Value

Method = Literal["paired", "direct", "over eager", "over copy"]
"""How two sides were compared: by the ratios within the rounds that both were measured in; by their
times in different runs; by how much faster than eager mode, or than a copy, each was in its own.
"""


class Measurement(msgspec.Struct, frozen=True):
    """One side of a case: median in microseconds, what was measured (`schedule` is empty of eager
    mode and torch.compile), its bandwidth in GB/s and as a share of a copy's in the same rounds.
    `run` and `time` are those of the record it is from.
    """

    us: float
    schedule: str = ""
    knobs: dict[str, Value] = {}
    gbps: float | None = None
    of_copy: float | None = None
    run: str = ""
    time: str = ""


class Comparison(msgspec.Struct, frozen=True):
    """One case: both sides, `ratio` = A / B (above 1: B is faster) with its 95 % interval (`low`,
    `high`), the p-value of there being no difference that matters, made larger for the number of
    cases (`p`), the verdict, and why the measurements are to be doubted, where they are.

    `drift` is the ratio A / B of the contender that both runs have in common, where the sides are
    of different runs.
    """

    device: str
    case: Case
    a: Measurement
    b: Measurement
    ratio: float
    low: float
    high: float
    p: float
    verdict: Verdict
    method: Method
    drift: float | None = None
    reason: str = ""


class Missing(msgspec.Struct, frozen=True):
    """A case that one side has and the other has not: which (its name), why, and the command that
    would measure it, empty where there is none.
    """

    case: Case
    side: str
    why: str
    command: str = ""


class Result(msgspec.Struct, frozen=True):
    """Side `b` against side `a`, by the names they were given: cases that both have, and what is
    missing. `smallest` is the smallest difference that matters, as a share.
    """

    a: str
    b: str
    cases: list[Comparison]
    missing: list[Missing] = []
    smallest: float = SMALLEST
    correction: str = CORRECTION

    def counts(self) -> dict[str, int]:
        """How many cases have each verdict."""
        return {verdict: sum(c.verdict == verdict for c in self.cases) for verdict in VERDICTS}
