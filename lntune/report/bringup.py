"""What a bringup found, as one summary: facts for machines, a table and sentences for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from lntune import backends, ops
from lntune.case import Case
from lntune.log.records import Record, Status
from lntune.report.columns import Column, Table, key, whole
from lntune.report.output import Output
from lntune.report.rows import Row, geomean, rows_of
from lntune.report.tables import cases_table, number, percent
from lntune.words import counted

BEYOND = 2
"""Data of this many times the last cache is compared with the bandwidth of a plain copy."""
_CACHE = 64 << 20  # bytes, where a device does not say


class Stage(msgspec.Struct, frozen=True):
    """A part of the run: what it did in a sentence, and the seconds it took."""

    name: str
    detail: str
    seconds: float


class Smoked(msgspec.Struct, frozen=True):
    """One operator's default knobs on a small shape: status as in the log, and what went wrong."""

    case: Case
    schedule: str
    status: Status
    message: str

    @property
    def works(self) -> bool:
        """True when it was built, right and in time."""
        return self.status == "ok"

    def __str__(self) -> str:
        message = f": {self.message}" if self.message else ""
        return f"{self.case} {self.schedule}: {self.status}{message}"


class Operator(msgspec.Struct, frozen=True):
    """One operator. `tuned` of `planned` cases have a final; ratios are geomeans; `of_copy` is the
    share of a copy's bandwidth on data far beyond the cache, over the finals, and
    `smallest_of_copy` its smallest. None: not measured. Of finals and benchmarks `disturbed` were
    so by other work on the machine and count in no figure. `over_default` is over what serves where
    nothing is tuned.
    """

    op: str
    planned: int
    tuned: int
    over_eager: float | None
    over_default: float | None
    benchmarked: int
    over_better: float | None
    of_copy: float | None
    smallest_of_copy: float | None
    slower_than_eager: list[str]
    disturbed: int = 0


class Summary(msgspec.Struct, frozen=True):
    """Everything. `tuned` and `known` are cases tuned in this run and before it; `trials` and
    `failures` are the log's, by status.
    """

    device: str
    target: str
    note: str
    budget_s: float
    seconds: float
    interrupted: bool
    copy_gbps: float | None
    stages: list[Stage]
    doctor: list[str]
    smoke: list[Smoked]
    not_smoked: int
    operators: list[Operator]
    tuned: int
    known: int
    left: list[str]
    trials: dict[Status, int]
    failures: dict[Status, str]
    verified: int
    not_verified: int
    wrong: list[str]
    benchmarks: list[Row]
    not_benchmarked: dict[str, str]
    log_dir: str
    next: list[str]
    ok: bool


def operator(
    op: str, planned: int, finals: Sequence[Record], benchmarks: Sequence[Record]
) -> Operator:
    """What finals and benchmarks of an operator come to."""
    rows, compared = rows_of(finals), rows_of(benchmarks)
    shares = [
        row.of_copy
        for row, record in ((rows_of([r])[0], r) for r in finals)
        if _beyond_cache(record) and row.of_copy is not None
    ]
    return Operator(
        op=op,
        planned=planned,
        tuned=len(rows),
        over_eager=geomean(r.speedup for r in rows),
        over_default=geomean(r.over_default for r in rows),
        benchmarked=len(compared),
        over_better=geomean(r.over_better for r in compared),
        of_copy=geomean(shares),
        smallest_of_copy=min(shares, default=None),
        slower_than_eager=[
            f"{r.op} {r.rows}x{r.hidden} {r.dtype}: {r.speedup:.2f}x"
            for r in rows
            if r.speedup is not None and r.speedup < 1
        ],
        disturbed=sum(bool(r.disturbed) for r in (*rows, *compared)),
    )


def _beyond_cache(record: Record) -> bool:
    device = record.device
    cache = backends.of(device).last_cache(device) or _CACHE
    case = record.case
    return case.op in ops.OPS and ops.get(case.op).bytes(case) >= BEYOND * cache


def operators_table(operators: Iterable[Operator]) -> Table:
    """One line per operator."""
    columns = [
        *key("operator"),
        Column("tuned"),
        Column("over eager"),
        Column("over untuned", 3),
        Column("benchmarked", 5),
        Column("over better", 1),
        Column("of copy", 2),
        Column("smallest", 4),
    ]
    title = "medians; over eager and of copy from the tuned cases, over better from the benchmark"
    table = Table(title, columns)
    for o in operators:
        table.add(
            o.op,
            f"{o.tuned}/{o.planned}",
            number(o.over_eager, 2, "x"),
            number(o.over_default, 2, "x"),
            str(o.benchmarked),
            number(o.over_better, 2, "x"),
            percent(o.of_copy),
            percent(o.smallest_of_copy),
        )
    return table


def lines(s: Summary) -> list[str]:
    """The summary in sentences."""
    text = [f"{s.device} ({s.target}){': ' + s.note if s.note else ''}"]
    if s.copy_gbps is not None:
        text.append(f"a plain copy moves {s.copy_gbps:,.0f} GB/s")
    text += [f"doctor: {finding}" for finding in s.doctor]
    failed = [smoked for smoked in s.smoke if not smoked.works]
    later = f", {s.not_smoked} not reached" if s.not_smoked else ""
    smoked = counted(len(s.smoke), "operator and dtype", "operators and dtypes")
    text.append(
        f"smoke check: {len(s.smoke) - len(failed)} of {smoked} work with default knobs{later}"
    )
    text += [f"  {one}" for one in failed]
    text.append(
        f"tuned {counted(s.tuned, 'case')} in this run, {s.known} before;"
        f" left of the plan: {len(s.left)}"
    )
    trials = ", ".join(f"{count} {status}" for status, count in sorted(s.trials.items())) or "none"
    text.append(f"trials in the log: {trials}")
    text += [f"  {status}, for example {example}" for status, example in sorted(s.failures.items())]
    slower = [case for o in s.operators for case in o.slower_than_eager]
    if slower:
        text.append(
            f"slower than eager: {'; '.join(slower)} (by more than 2 %, and eager mode serves it)"
        )
    elif any(o.over_eager for o in s.operators):
        text.append("slower than eager nowhere")
    if disturbed := sum(o.disturbed for o in s.operators):
        what = counted(disturbed, "measurement was", "measurements were")
        text.append(
            f"{what} disturbed by other work on the machine and left out:"
            " neither times nor ratios of these hold"
        )
    rest = f", {s.not_verified} not reached" if s.not_verified else ""
    right = f"{len(s.wrong)} WRONG" if s.wrong else "all right" if s.verified else "none"
    text.append(f"verified {counted(s.verified, 'kernel')}, {right}{rest}")
    text += [f"  {one}" for one in s.wrong]
    text += [f"not benchmarked: {case}: {why}" for case, why in s.not_benchmarked.items()]
    interrupted = " (interrupted)" if s.interrupted else ""
    text.append(f"{s.seconds:.0f} of {s.budget_s:.0f} s{interrupted}; log in {whole(s.log_dir)}")
    return [*text, *(f"next: {step}" for step in s.next)]


def output(s: Summary) -> Output:
    """All of it: operators, benchmarks where there are any, and the summary in sentences."""
    parts = [operators_table(s.operators)]
    if s.benchmarks:
        title = "benchmark of what serves each case; everyone allocates its output"
        parts.append(cases_table(s.benchmarks, title, details=True))
    return Output(s, parts, lines(s), s.operators)
