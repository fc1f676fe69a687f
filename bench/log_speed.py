"""How long reports take on a large tuning log, beside decoding all of it.

    python bench/log_speed.py [--records 100000] [--rounds 5] [--output FOLDER]
    python bench/log_speed.py --make FOLDER [--records 100000] [--seed 0]   # only such a log

The logs are made up: this machine's CPU, all operators and dtypes, trials of 16 samples, one record
in fourteen a final of 200 rounds of four contenders and two rivals, of which a few are disturbed.
Measured are reading them and choosing what serves each case, in this process, and the commands,
their start included. Ways are taken in turns; "decoding all" is msgspec with records' whole type on
lines that are in memory already, which tells how fast the machine was meanwhile.
"""

from __future__ import annotations

import datetime
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import keeping
import msgspec
import numpy
import typer

from lntune import device, ops, schedule
from lntune.case import DTYPES, Case
from lntune.knobs import enumerate_space, to_dict
from lntune.log import records, select
from lntune.log.records import Record, Rival, Setting, Timing
from lntune.report.columns import Column, Table, key
from lntune.schedule import Schedule
from lntune.system import toolchain

FINAL_OF = 14
"""One record in so many is a final."""
TRIAL_SAMPLES, FINAL_SAMPLES = 16, 200
FAILED = 0.03
"""The share of trials that fail."""
DISTURBED = 0.02
"""The share of finals that other work disturbs."""
SETTINGS = 32
"""Settings of knobs that are tried of a case and schedule, again and again."""
CONTENDERS = {"tuned": 1.0, "default": 1.1, "eager": 1.7, "copy": 0.7}
"""Of a final, with how long they take beside the first."""
RIVALS = {"rival 1": 1.02, "rival 2": 1.05}
"""The other finalists."""
BEGUN = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)


def made_records(count: int, seed: int) -> Iterator[Record]:
    """Records as tuning run after tuning run would have written them, case by case."""
    random = numpy.random.default_rng(seed)
    cpu, versions = device.current(), toolchain.versions()
    made, wanted = 0, [(c, s) for c in _cases() for s in schedule.for_op(c.op, cpu.kind).values()]
    tried: dict[tuple[Case, str], list[dict[str, Any]]] = {}
    per_run = max(FINAL_OF, count // len(wanted) // 8)
    for run, (case, one) in enumerate(itertools.cycle(wanted)):
        if (case, one.name) not in tried:
            tried[case, one.name] = _settings(one, case)
        knobs = tried[case, one.name]
        us = float(numpy.exp(random.normal(0, 0.1))) * (1 + case.rows * case.hidden / 5e3)
        for number in range(per_run):
            final = number % FINAL_OF == FINAL_OF - 1
            setting = knobs[random.integers(len(knobs))]
            failed = not final and random.random() < FAILED
            busy = bool(final and random.random() < DISTURBED)
            timings = {} if failed else _timings(random, us, final)
            others = [timings.pop(name) for name in RIVALS if name in timings]
            yield Record(
                role="final" if final else "trial",
                case=case,
                device=cpu,
                threads=cpu.cores,
                schedule=one.name,
                code=one.code,
                knobs=setting,
                status="compile" if failed else "ok",
                message="LLVM ERROR: made up" if failed else "",
                timings=timings,
                errors={} if failed else {"y": round(float(random.random()), 6)},
                versus_eager={} if failed else {"y": 1.0},
                busy=busy,
                default=Setting(one.name, knobs[0]) if final else None,
                rivals=tuple(Rival(one.name, knobs[0], timing, one.code) for timing in others),
                versions=versions,
                run=f"{seed:04x}{run:08x}",
                time=(BEGUN + datetime.timedelta(seconds=made)).isoformat(timespec="milliseconds"),
            )
            made += 1
            if made == count:
                return


def _cases() -> list[Case]:
    grids = [o.grid for o in ops.OPS.values()]
    return [
        Case(grid[0].op, hidden, dtype, rows)
        for grid in grids
        for hidden in dict.fromkeys(c.hidden for c in grid)
        for dtype in DTYPES
        for rows in dict.fromkeys(c.rows for c in grid)
    ]


def _settings(one: Schedule, case: Case) -> list[dict[str, Any]]:
    """Knobs of a schedule that fit, its default ones first."""
    cpu = device.current()
    fitting = enumerate_space(one.knobs, lambda k: one.reason_invalid(k, case, cpu))
    return [to_dict(k) for k in (one.untuned(case, cpu), *itertools.islice(fitting, SETTINGS))]


def _timings(random: numpy.random.Generator, us: float, final: bool) -> dict[str, Timing]:
    """Log-normal samples; of a final they rise and fall together, as rounds do."""
    names = {**CONTENDERS, **RIVALS} if final else {"tuned": 1.0}
    count = FINAL_SAMPLES if final else TRIAL_SAMPLES
    rounds = random.normal(0, 0.03, count)
    scatter = random.normal(0, 0.02, (len(names), count))
    samples = us * numpy.array([*names.values()])[:, None] * numpy.exp(rounds + scatter)
    medians = numpy.median(samples, axis=1).round(4).tolist()
    return {
        name: Timing(tuple(row), median)
        for name, row, median in zip(names, samples.round(4).tolist(), medians, strict=True)
    }


def make(folder: Path, count: int, seed: int) -> None:
    """Write a log of so many made-up records, a file for each operator."""
    encode, files = msgspec.json.encode, dict[Path, Any]()
    try:
        for record in made_records(count, seed):
            path = records.log_path(folder, record.device, record.case.op)
            if path not in files:
                path.parent.mkdir(parents=True, exist_ok=True)
                files[path] = path.open("wb")
            files[path].write(encode(record) + b"\n")
    finally:
        for file in files.values():
            file.close()


class Row(msgspec.Struct, frozen=True):
    """One way to go through the logs: median and quickest of its seconds, and the median over
    rounds of its share of the time for decoding all of one.
    """

    what: str
    seconds: float
    quickest: float
    of_decoding: float
    samples: list[float]


DECODING = "decoding all"


def decoding(folder: Path) -> Callable[[], object]:
    """All lines of a log, made records of."""
    lines = [line for path in folder.glob("*/*.jsonl") for line in path.read_bytes().splitlines()]
    decoder = msgspec.json.Decoder(Record)
    return lambda: [decoder.decode(line) for line in lines]


def command(*arguments: object) -> Callable[[], object]:
    """A command of lntune in a process of its own, with exit code 0."""
    words = [sys.executable, "-m", "lntune", *map(str, arguments)]
    return lambda: subprocess.run(words, check=True, capture_output=True)


def measure(ways: dict[str, Callable[[], object]], rounds: int) -> list[Row]:
    """Each way's seconds, in turns, after one round that does not count."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            if number:
                samples[name].append(round(time.perf_counter() - begun, 4))
    shares = {
        name: statistics.median(s / d for s, d in zip(taken, samples[DECODING], strict=True))
        for name, taken in samples.items()
    }
    return [
        Row(name, statistics.median(taken), min(taken), round(shares[name], 3), taken)
        for name, taken in samples.items()
    ]


def ways_of(one: Path, other: Path) -> dict[str, Callable[[], object]]:
    """What is measured, on two logs."""
    schedules = schedule.all_schedules()
    return {
        DECODING: decoding(one),
        "reading trials": lambda: records.read([one], role="trial"),
        "reading finals": lambda: records.read([one], role="final"),
        "choosing": lambda: select.served(records.read([one], role="final"), schedules),
        "lntune report": command("report", "--log-dir", one),
        "lntune compare": command("compare", one, other),
    }


def table(rows: list[Row], count: int, megabytes: float) -> Table:
    """A line for each way."""
    title = f"Logs of {count:,} records, {megabytes:.0f} MB each"
    columns = [Column("seconds"), Column("quickest", 1), Column("of decoding all", 2)]
    shown = Table(title, [*key("what"), *columns])
    for r in rows:
        shown.add(r.what, f"{r.seconds:.2f}", f"{r.quickest:.2f}", f"{r.of_decoding:.2f}x")
    return shown


def main(
    count: Annotated[int, typer.Option("--records", help="Records of each log.")] = 100_000,
    rounds: int = 5,
    seed: int = 0,
    make_at: Annotated[
        Path | None, typer.Option("--make", help="Only make one log, in this folder.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for log_speed.json and log_speed.txt.")
    ] = None,
) -> None:
    """Reports on large tuning logs, timed."""
    if make_at is not None:
        make(make_at, count, seed)
        return
    screen = keeping.screen()
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / name for name in ("a", "b")]
        for number, log in enumerate(logs):
            make(log, count, seed + number)
        megabytes = sum(path.stat().st_size for path in logs[0].glob("*/*.jsonl")) / 1e6
        rows = measure(ways_of(*logs), rounds)
    screen.print(table(rows, count, megabytes))
    if output is not None:
        facts = {
            "settings": {"records": count, "rounds": rounds, "seed": seed, "megabytes": megabytes},
            "results": rows,
        }
        keeping.keep(output, "log_speed", screen, facts)


if __name__ == "__main__":
    typer.run(main)
