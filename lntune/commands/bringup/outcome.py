"""The summary of a bringup, put together from the tuning log and from what only the run knows."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from rich.console import Console

from lntune import backends
from lntune.backends.cuda.model import Pair
from lntune.case import Case
from lntune.commands.bringup import known
from lntune.device import Device
from lntune.errors import InputError, got_expected
from lntune.log.records import Record
from lntune.report.bringup import Smoked, Stage, Summary, operator, output
from lntune.report.columns import WIDE
from lntune.report.output import print_table
from lntune.report.rows import rows_of
from lntune.system import paths, scratch
from lntune.words import counted

PAIRS = "predictions.jsonl"
"""Measured and predicted times, for bench/fit_model.py."""


@dataclass
class Results:
    """The results of a run so far."""

    stages: list[Stage] = field(default_factory=list)
    doctor: list[str] = field(default_factory=list)
    copy_gbps: float | None = None
    smoke: list[Smoked] = field(default_factory=list)
    not_smoked: int = 0
    tuned: dict[Case, Record] = field(default_factory=dict)
    verified: int = 0
    not_verified: int = 0
    wrong: list[str] = field(default_factory=list)
    not_benchmarked: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


def summary(
    device: Device,
    note: str,
    plan: list[Case],
    results: Results,
    before: int,
    seconds: float,
    budget: float,
) -> Summary:
    """The summary of a plan's cases as things stand; `before` are the cases that were tuned before
    the run, times are in seconds.
    """
    finals = known.finals(device, plan)
    benchmarks = known.benchmarked(device, plan)
    trials, failures = known.failures(device, plan)

    def of(op: str, records: dict[Case, Record]) -> list[Record]:
        return [record for case, record in records.items() if case.op == op]

    names = dict.fromkeys(case.op for case in plan)
    left = [str(case) for case in plan if case not in finals]
    return Summary(
        device=device.name,
        target=device.isa,
        note=note,
        budget_s=budget,
        seconds=round(seconds, 2),
        interrupted=results.interrupted,
        copy_gbps=results.copy_gbps,
        stages=results.stages,
        doctor=results.doctor,
        smoke=results.smoke,
        not_smoked=results.not_smoked,
        operators=[
            operator(op, sum(c.op == op for c in plan), of(op, finals), of(op, benchmarks))
            for op in names
        ],
        tuned=len(results.tuned),
        known=before,
        left=left,
        trials=dict(trials),
        failures=failures,
        verified=results.verified,
        not_verified=results.not_verified,
        wrong=results.wrong,
        benchmarks=rows_of(benchmarks.values()),
        not_benchmarked=results.not_benchmarked,
        log_dir=str(paths.log_dir() / device.slug),
        next=_next(device, results, left, bool(finals)),
        ok=bool(finals)
        and bool(results.smoke)
        and not results.not_smoked
        and all(smoked.works for smoked in results.smoke)
        and not results.wrong,
    )


def _next(device: Device, results: Results, left: list[str], tuned: bool) -> list[str]:
    """What to do now, the most urgent first."""
    if results.smoke and not any(smoked.works for smoked in results.smoke):
        return ["nothing works on this device yet: see lntune doctor and the messages above"]
    steps = []
    on = backends.option(device)
    if results.wrong:
        steps.append(
            f"kernels that serve calls are wrong: lntune check OPERATOR{on} shows them; tune these"
            " cases again, and report them"
        )
    if not all(smoked.works for smoked in results.smoke):
        steps.append(
            f"what failed the smoke check:"
            f" lntune show OPERATOR --hidden N{on} --as source prints its code"
        )
    if left:
        steps.append(f"the same command goes on: {counted(len(left), 'case')} left")
    if tuned:
        steps.append(
            f"lntune report{on} shows every case, lntune why OPERATOR --hidden N{on} what serves a"
            " call; commit the log's folder to keep it"
        )
    if results.not_verified:
        steps.append(f"lntune check OPERATOR{on} verifies all that serves the tuned cases")
    return steps


def write(summary: Summary, folder: Path) -> None:
    """summary.json and summary.txt in the folder, each written whole or not at all.

    Raises:
        InputError: the folder cannot be written.
    """
    console = Console(record=True, file=io.StringIO(), width=WIDE, highlight=False)
    print_table(output(summary), console)
    _write(
        folder,
        {
            "summary.json": msgspec.json.format(msgspec.json.encode(summary), indent=1) + b"\n",
            "summary.txt": console.export_text().encode(),
        },
    )


def write_pairs(pairs: Sequence[Pair], folder: Path) -> None:
    """What was measured beside what the model predicted, a candidate a line, added to what earlier
    runs have left in the folder's PAIRS.

    Raises:
        InputError: the folder cannot be written.
    """
    before = b""
    with contextlib.suppress(FileNotFoundError):
        before = (folder / PAIRS).read_bytes()
    lines = b"".join(msgspec.json.encode(pair) + b"\n" for pair in pairs)
    _write(folder, {PAIRS: before + lines})


def _write(folder: Path, contents: Mapping[str, bytes]) -> None:
    try:
        for name, content in contents.items():
            with scratch.whole(folder / name) as temporary:
                temporary.write_bytes(content)
    except OSError as e:
        raise InputError(
            got_expected("--output", folder, "a folder that can be written", e.strerror or str(e))
        ) from e
