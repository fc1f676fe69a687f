"""A log is data, whoever made it: it cannot run code, lead out of its folder, or write on a
terminal; what reads logs neither crashes nor raises anything but the errors that are lntune's; what
it chooses are valid settings of schedules that are here.

    pytest --exhaustive tests/test_strange_logs.py     # 10,000 logs, changed at random
"""

from __future__ import annotations

import resource
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from made_up_records import final_here
from strange_logs import plain, strange
from test_records import a_record
from typer.testing import CliRunner

from lntune import device, schedule
from lntune.case import Case
from lntune.cli import app
from lntune.commands import export_log, merge, prune
from lntune.errors import InputError, LntuneError, LogError
from lntune.log import lines, pruning, records, select
from lntune.log.records import LogWarning
from lntune.tune.earlier import Earlier

EACH = 25
"""Logs a test."""
QUICK, ALL = 3, 400
"""Tests in every run, and all."""
PARTS = [
    *range(QUICK),
    *(pytest.param(part, marks=pytest.mark.exhaustive) for part in range(QUICK, ALL)),
]
CASES = [
    Case(op, hidden, "float32", 8)
    for op in ("layer_norm", "layer_norm_backward")
    for hidden in (64, 100)
]
COMMANDS = (
    ("report", "--all-devices", "--cases", "--knobs"),
    ("report", "--all-devices", "--history"),
    ("report", "--all-devices", "--format", "html"),
    ("report", "--all-devices", "--format", "csv"),
    ("report", "--cold"),
    ("compare", "eager", "tuned"),
    ("compare", "cached_rows", "default", "--format", "json"),
    ("report", "--all-devices", "--json"),
    ("report", "--all-devices", "--format", "markdown"),
)


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """What takes more memory than a few gigabytes fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def look(folder: Path, out: Path, command: tuple[str, ...]) -> None:
    """Everything that reads a log, in this process, and one command."""
    here = device.current()
    for log in (records.read([folder], device=here), records.read([folder], role="final")):
        for case in CASES:
            choice = select.select(case, here, log, schedule.for_op(case.op, here.kind))
            if choice.schedule:
                chosen, setting = schedule.resolve(choice.schedule, case.op, choice.knobs)
                assert chosen.reason_invalid(setting, case.typical, here) is None
    for case in CASES:
        for candidate in Earlier([folder], here, 1).trials(case):
            candidate.resolved(case.op)
    prune.prune([folder], set(pruning.DEFAULT), dry_run=True)
    merged = merge.merge([folder], out / "merged")
    assert all(Path(file.path).resolve().is_relative_to(out.resolve()) for file in merged.files)
    exported = export_log.as_t4([folder], out / "t4")
    assert all((out / "t4" / f).resolve().is_relative_to(out.resolve()) for f in exported.files)
    done = CliRunner().invoke(app, [*command, "--log-dir", str(folder)])
    assert done.exit_code in (0, 1, 2), f"{command}: {done.output[-2000:]}"
    assert not set(done.output) & set("\x1b\x9b\x07\x00\u202e"), command


@pytest.mark.parametrize("part", PARTS)
def test_logs_changed_at_random(part: int, tmp_path: Path) -> None:
    """Whatever is changed in a log, all that reads logs goes on without what cannot be used, within
    its folder.
    """
    for seed in range(part * EACH, (part + 1) * EACH):
        folder = strange(tmp_path / f"{seed}" / "logs", seed)
        out = tmp_path / f"{seed}" / "out"
        out.mkdir()
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                look(folder, out, COMMANDS[seed % len(COMMANDS)])
        except LntuneError as e:
            pytest.fail(f"seed {seed}: {e}")
        except Exception as e:
            e.add_note(f"seed {seed}") if hasattr(e, "add_note") else None
            raise
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
        assert {p.name for p in tmp_path.joinpath(str(seed)).iterdir()} == {"logs", "out"}


def test_the_plain_log_is_used(tmp_path: Path) -> None:
    """The log that is changed is itself right: nothing of it is left out, and it chooses."""
    for record in plain():
        records.append(tmp_path, record)
    here = device.current()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log = records.read([tmp_path], device=here)
    assert select.select(CASES[0], here, log, schedule.all_schedules()).tier == "exact"
    assert Earlier([tmp_path], here, 1).trials(CASES[0])


FIELDS: list[tuple[str, Any]] = [
    ("case.op", "../../../etc/cron.d/x"),
    ("case.op", "/tmp/x"),
    ("case.op", "a\x00b"),
    ("case.op", ""),
    ("case.op", "a\n"),
    ("case.rows", 2**62 + 1),
    ("case.hidden", 10**400),
    ("case.variant", "\x1b[31m"),
    ("device.name", "x" * 201),
    ("device.name", "\x1b]0;\x07"),
    ("device.kind", "tpu"),
    ("device.cores", 0),
    ("device.cores", 2**60),
    ("schedule", "\x9b"),
    ("knobs", {"a": "x" * 10_001}),
    ("knobs", {str(n): n for n in range(65)}),
    ("timings.tuned.median_us", 0),
    ("timings.tuned.median_us", 5e-324),
    ("timings.tuned.median_us", 1e300),
    ("timings.tuned.samples_us", [-1.0]),
    ("timings.tuned.samples_us", [1.0] * ((1 << 16) + 1)),
    ("versions", {"a": "\u202e"}),
    ("time", "now"),
    ("run", "\x00"),
    ("message", "x" * 10_001),
]


@pytest.mark.parametrize("field, value", FIELDS)
def test_what_no_record_may_hold(tmp_path: Path, field: str, value: Any) -> None:
    """Names that lead elsewhere, signs that terminals act upon, and numbers that nothing can be are
    no record: the line is skipped with file and line, without its content.
    """
    record: Any = msgspec.to_builtins(a_record())
    *path, last = field.split(".")
    at = record
    for name in path:
        at = at[name]
    at[last] = value
    import json

    log = tmp_path / "here" / "layer_norm.jsonl"
    log.parent.mkdir()
    log.write_text(json.dumps(record) + "\n")
    with pytest.warns(
        LogWarning, match=r"layer_norm\.jsonl:1: skipped, not a usable record"
    ) as told:
        assert records.read([tmp_path]) == []
    assert "\x1b" not in str(told[0].message)


def test_knobs_of_nobody_are_not_built(tmp_path: Path) -> None:
    """A record whose knobs its schedule does not take, or whose schedule is not there, serves
    nothing: why says so, and what serves is what would without it.
    """
    here, case = device.current(), CASES[0]
    schedules = schedule.for_op(case.op, here.kind)
    without = select.select(case, here, [], schedules)
    for strange_fields in (
        {"knobs": {"lanes": 999}},
        {"knobs": {"lanes": "4"}},
        {"knobs": {"__class__": 1}},
        {"schedule": "os.system"},
        {"schedule": "blocked_rows"},
    ):
        record = final_here(case, **strange_fields)
        choice = select.select(case, here, [record], schedules)
        assert (choice.tier, choice.schedule, choice.knobs) == (
            without.tier,
            without.schedule,
            without.knobs,
        )


def test_long_lines_and_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line beyond the longest is passed over, the next is read; what lies beyond the largest file
    is left out, and said.
    """
    monkeypatch.setattr(lines, "LONGEST", 10_000)
    good = msgspec.json.encode(a_record())
    log = tmp_path / "here" / "layer_norm.jsonl"
    log.parent.mkdir()
    log.write_bytes(good + b"\n" + b"x" * 1_000_000 + b"\n" + good)
    with pytest.warns(LogWarning, match=r":2: skipped, it is longer than 10,000 bytes"):
        assert len(records.read([tmp_path])) == 2
    found = list(lines.of_file(log, largest=50_000))
    assert [number for number, _, fault in found if fault] == [2]
    assert "larger than 50,000 bytes" in found[-1][2]
    assert len(found) == 2


@pytest.mark.parametrize("kind", ["pipe", "device", "link", "folder"])
def test_what_is_no_file(tmp_path: Path, kind: str) -> None:
    """A pipe, a device, a folder and a link to what is no log are refused at once."""
    log = tmp_path / "here" / "layer_norm.jsonl"
    log.parent.mkdir()
    if kind == "pipe":
        import os

        os.mkfifo(log)
    elif kind == "device":
        log.symlink_to("/dev/zero")
    elif kind == "link":
        (tmp_path / "secret").write_text("x")
        log.symlink_to(tmp_path / "secret")
    else:
        log.mkdir()
    with pytest.raises(LogError, match="cannot read the tuning log"):
        records.read([tmp_path])


def test_a_record_made_here_leads_nowhere(tmp_path: Path) -> None:
    """Appending a record whose operator is no name of a file is refused, too."""
    with pytest.raises((LogError, InputError), match="op"):
        records.append(tmp_path / "logs", a_record(case=Case("../x", 64, "float32", 8)))
    assert not (tmp_path / "x.jsonl").exists()


BOMB: list[tuple[str, Callable[[], bytes]]] = [
    ("nested", lambda: b"[" * 3_000_000),
    ("nested objects", lambda: b'{"a":' * 600_000),
    ("numbers", lambda: b'{"schema":3,"timings":{"tuned":{"samples_us":[' + b"1," * 2_000_000),
    ("a line without end", lambda: b"x" * 300_000_000),
]


@pytest.mark.parametrize("name, bomb", BOMB, ids=[name for name, _ in BOMB])
def test_bombs(tmp_path: Path, name: str, bomb: Callable[[], bytes]) -> None:
    """Deep nesting, millions of numbers and a line without end take a bounded amount of memory, and
    the records around them are read: in a process that may have 400 MB.
    """
    log = tmp_path / "here" / "layer_norm.jsonl"
    log.parent.mkdir()
    good = msgspec.json.encode(a_record())
    log.write_bytes(good + b"\n" + bomb() + (b"\n" + good if name != "a line without end" else b""))
    code = (
        "import resource, sys, pathlib\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (400 << 20,) * 2)\n"
        "from lntune.log import records; print(len(records.read([pathlib.Path(sys.argv[1])])))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-1000:]
    assert int(done.stdout) == (1 if name == "a line without end" else 2)
