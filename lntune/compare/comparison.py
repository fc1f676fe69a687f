"""What a comparison says: of each case two measurements, their ratio, and the verdict."""

from __future__ import annotations

from typing import Literal

import msgspec

from lntune.case import Case
from lntune.certainty import CORRECTION, SMALLEST, VERDICTS, Verdict
from lntune.knobs import Value

LARGE = 3.0
"""A ratio beyond this is more than noise, where eager's own does not explain it; and no reason to
let a case pass where it does.
"""

Method = Literal["paired", "direct", "over eager", "over copy"]
"""How two sides were compared: by the ratios within the rounds that both were measured in; by their
times in different runs; by how much faster than eager mode, or than a copy, each was in its own.
"""


class Measurement(msgspec.Struct, frozen=True):
    """One side of a case: median in microseconds, what was measured (`schedule` is empty of eager
    mode and torch.compile), its bandwidth in GB/s and as a share of a copy's in the same rounds,
    its billions of operations a second, and the instructions that threads issue for an element of a
    row, where building it has told them. `run` and `time` are those of the record it is from.
    """

    us: float
    schedule: str = ""
    knobs: dict[str, Value] = {}
    gbps: float | None = None
    of_copy: float | None = None
    gflops: float | None = None
    instructions: float | None = None
    run: str = ""
    time: str = ""


class Comparison(msgspec.Struct, frozen=True):
    """One case: both sides, `ratio` = A / B (above 1: B is faster) with its 95 % interval (`low`,
    `high`), the p-value of there being no difference that matters, made larger for the number of
    cases (`p`), the verdict, and why the measurements are to be doubted, where they are.

    `drift` is the ratio A / B of the contender that both runs have in common, where the sides are
    of different runs. `bytes` must cross the memory bus at least, and `flops` are to be computed;
    0 where the operator is not known any more.
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
    bytes: int = 0
    flops: int = 0

    @property
    def of_times(self) -> float:
        """The ratio of the medians as they are, whatever happened between the runs."""
        return self.a.us / self.b.us


class Missing(msgspec.Struct, frozen=True):
    """A case that one side has and the other has not: which (its name), why, and the command that
    would measure it, empty where there is none.
    """

    case: Case
    side: str
    why: str
    command: str = ""


class Between(msgspec.Struct, frozen=True):
    """What happened between the runs that two sides are of, on one device: eager mode and a copy
    took `eager` and `copy` times as long in A's (medians over so many `cases`, None where they were
    not measured), by which the ratios were taken by `method`, `by_case` with each case's own.

    What that leaves uncertain of a case is `error`, a standard error of the logarithm of its ratio,
    with so many degrees of `freedom`; it is counted into the intervals. `log` is the logarithm that
    is taken off all cases, where it is not each one's own.
    """

    device: str
    method: Method
    by_case: bool
    cases: int
    eager: float | None
    copy: float | None
    log: float
    error: float
    freedom: float


class Result(msgspec.Struct, frozen=True):
    """Side `b` against side `a`, by the names they were given: cases that both have, and what is
    missing, with the `commands` that would measure it. `smallest` is the smallest difference that
    matters, as a share; `between` what happened between runs, of each device where sides are of
    different ones.
    """

    a: str
    b: str
    cases: list[Comparison]
    missing: list[Missing] = []
    smallest: float = SMALLEST
    correction: str = CORRECTION
    between: list[Between] = []
    commands: list[str] = []

    def counts(self) -> dict[Verdict, int]:
        """How many cases have each verdict."""
        return {verdict: sum(c.verdict == verdict for c in self.cases) for verdict in VERDICTS}

    def failing(self, on: str) -> list[str]:
        """The cases for which to fail: `on` "slower" those that are slower in B, or that look LARGE
        times as slow and cannot be decided; "unsure" all that are slower or cannot be decided.
        """
        failing = []
        for c in self.cases:
            lost = c.verdict == "UNSURE" and c.of_times < 1 / LARGE
            if c.verdict == "SLOWER" or lost or (on == "unsure" and c.verdict == "UNSURE"):
                longer = f", {self.b} takes {1 / c.of_times:.1f} times as long; measure again"
                failing.append(f"{c.case}: {c.verdict}{longer if lost else ''}")
        return failing
