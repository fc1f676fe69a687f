"""`lntune prune`: what decides a case is never lost, what resuming needs stays, and the rest goes
with a reason.
"""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_records import a_record
from typer.testing import CliRunner

from lntune import knobs, schedule
from lntune.case import TYPICAL_ROWS, Case
from lntune.cli import app
from lntune.commands import prune as pruner
from lntune.device import Device
from lntune.errors import InputError
from lntune.log import pruning, records, select
from lntune.log.records import Record, Timing
from lntune.system import toolchain
from lntune.tune.earlier import Earlier
from lntune.versions import Code

HERE = Device("cpu", "Made CPU", "x86-64-v3", 4, model="AuthenticAMD family 25 model 17 stepping 1")
OLD = msgspec.structs.replace(HERE, model="")
"""The same, as it was written before records named the model."""
CASES = [
    Case("layer_norm", hidden, "float32", rows) for hidden in (96, 100, 1024) for rows in (1, 512)
]
ASKED = [
    Case("layer_norm", hidden, "float32", rows)
    for hidden in (64, 96, 99, 100, 150, 1000, 1024, 2000)
    for rows in TYPICAL_ROWS
]
"""Cases of the log, and those that its records serve as neighbours."""
TIMES = [*(f"2026-01-0{day}" for day in range(1, 6)), "1970-01-01", "2038-01-19", ""]
SETTINGS: list[dict[str, Any]] = [{}, {"lanes": 4}, {"lanes": 16}, {"lanes": 99}]
DEFAULT = set(pruning.DEFAULT)


@st.composite
def measured(draw: st.DrawFn) -> Record:
    """A record of a case: any role, any clock, disturbed or not, of today's code or not."""
    plan = schedule.get("cached_rows")
    us = draw(st.sampled_from([1.0, 1.5, 2.0, 3.0]))
    eager = Timing((2.0,), 2.0)
    return a_record(
        draw(st.integers(0, 99)),
        role=draw(st.sampled_from(["trial", "final", "final", "bench"])),
        case=draw(st.sampled_from(CASES)),
        device=draw(st.sampled_from([HERE, OLD])),
        schedule=plan.name,
        code=draw(st.sampled_from([plan.code, plan.code, Code("old")])),
        knobs=draw(st.sampled_from(SETTINGS)),
        status=draw(st.sampled_from(["ok", "ok", "ok", "wrong"])),
        busy=draw(st.sampled_from([None, True])),
        timings={"tuned": Timing((us,), us), "eager": eager},
        versions=toolchain.versions(),
        time=draw(st.sampled_from(TIMES)),
        run=draw(st.sampled_from(["a", "b"])),
    )


def written(folder: Path, log: Iterable[Record]) -> Path:
    """A folder of logs with records, no two of which are of one moment."""
    for number, made in enumerate(log):
        suffix = f"T00:{int(folder.name == '1'):02}:{number:02}"
        time = made.time + (suffix if made.time in TIMES[:-1] else "")
        record = msgspec.structs.replace(made, time=time)
        path = records.log_path(folder, record.device, record.case.op)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(msgspec.json.encode(record) + b"\n")
    return folder


def chosen(*folders: Path) -> list[tuple[Any, ...]]:
    """What serves each case, and by which record; where none is, only that."""
    log, schedules = records.read(folders, device=HERE), schedule.for_op("layer_norm", "cpu")
    choices = [select.select(case, HERE, log, schedules) for case in ASKED]
    return [(c.tier, c.schedule, c.knobs, c.record, c.stale, c.beaten) for c in choices]


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(logs=st.lists(st.lists(measured(), max_size=8), min_size=2, max_size=2))
def test_what_serves_is_what_served(logs: list[list[Record]]) -> None:
    """Whatever is kept beside, every case, those between measured ones too, is served by the same
    record as before: of one folder and of two, whatever clocks said.
    """
    with tempfile.TemporaryDirectory() as name:
        folders = [written(Path(name, str(i)), log) for i, log in enumerate(logs)]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        ways = [folders, folders[:1], folders[1:]]
        before = [chosen(*way) for way in ways]
        for keep in (DEFAULT, {"deciding"}):
            pruner.prune([f for f in folders if records.files(f)], keep) if any(logs) else None
            assert [chosen(*way) for way in ways] == before


@settings(deadline=None, max_examples=15, suppress_health_check=list(HealthCheck))
@given(log=st.lists(measured(), min_size=1, max_size=12))
def test_tuning_goes_on_from_the_same_trials(log: list[Record]) -> None:
    """The trials that a tuning run does not make again are the same after pruning."""

    def trials(folder: Path) -> dict[Case, Any]:
        earlier = Earlier([folder], HERE, log[0].threads)
        return {case: dict(earlier.trials(case)) for case in CASES}

    with tempfile.TemporaryDirectory() as name:
        folder = written(Path(name), log)
        before = trials(folder)
        pruner.prune([folder], DEFAULT)
        assert trials(folder) == before


def a_trial(index: int = 0, **fields: Any) -> Record:
    """A trial of a schedule as it is, that tuning would go on from."""
    plan = schedule.get("cached_rows")
    case = Case("layer_norm", 1024, "float32", 64)
    values: dict[str, Any] = {
        "device": HERE,
        "case": case,
        "code": plan.code,
        "knobs": knobs.to_dict(plan.untuned(case.typical, HERE)),
        "versions": toolchain.versions(),
    }
    return a_record(index, **values | fields)


def test_every_line_has_its_reason(tmp_path: Path) -> None:
    """What goes and what stays is counted by reason, which the table and --json show; --dry-run
    changes nothing and says the same; pruning again finds nothing more.
    """
    final = a_trial(9, role="final", timings={"tuned": Timing((1.0,), 1.0)})
    log = [
        a_trial(1),
        a_trial(2),
        a_trial(3, busy=True),
        a_trial(4, code=Code("old")),
        a_trial(5, knobs={"none": 1}),
        a_trial(6, versions={"torch": "1.0"}),
        a_trial(7, schedule="a_users", knobs={"x": 1}),
        a_trial(8, role="comparison"),
        msgspec.structs.replace(final, time="2025-01-01", message="before"),
        final,
    ]
    written(tmp_path, log)
    (path,) = records.files(tmp_path)
    whole = path.read_bytes()
    newer = msgspec.json.encode(a_trial(1)).replace(b'"schema":3', b'"schema":99', 1)
    first = whole.splitlines()[-1]
    path.write_bytes(whole + first + b"\n" + newer + b"\n" + first[:50])
    before = path.read_bytes()
    expected_dropped = {
        pruning.OLD_CODE: 2,
        pruning.AGAIN: 1,
        pruning.DISTURBED: 1,
        pruning.OLD_VERSIONS: 1,
        pruning.TWICE: 1,
        pruning.UNUSABLE: 1,
    }
    dry = CliRunner().invoke(app, ["prune", str(tmp_path), "--dry-run", "--json"])
    assert dry.exit_code == 0, dry.output
    assert path.read_bytes() == before
    done = CliRunner().invoke(app, ["prune", "--log-dir", str(tmp_path)])
    assert done.exit_code == 0, done.output
    facts = json.loads(dry.stdout)
    assert facts["dropped"] == expected_dropped
    assert sum(facts["kept"].values()) == len(path.read_bytes().splitlines()) == 6
    for why in (*facts["dropped"], *facts["kept"]):
        assert why in done.stdout
    assert f"{path}:13, no usable record" in done.stdout
    again = pruner.prune([tmp_path], DEFAULT)
    assert not again.dropped


@pytest.mark.parametrize(
    "keep, messages",
    [
        ("deciding", ["record 3"]),
        ("finals", ["record 2", "record 3"]),
        ("trials", ["record 0", "record 1", "record 3"]),
        ("resume", ["record 1", "record 3"]),
        ("comparisons", ["record 3", "record 4"]),
    ],
)
def test_what_is_asked_for_is_kept(tmp_path: Path, keep: str, messages: list[str]) -> None:
    """--keep names what stays beside what decides."""
    times = {"timings": {"tuned": Timing((1.0,), 1.0)}}
    finals = [a_trial(2, role="final", **times), a_trial(3, role="final", **times)]
    log = [a_trial(0), a_trial(1), *finals, a_trial(4, role="bench")]
    written(tmp_path, log)
    pruner.prune([tmp_path], pruning.wanted([keep]))
    assert [r.message for r in records.read([tmp_path])] == messages


def test_what_cannot_be_kept() -> None:
    """A word that --keep does not know is refused with those it does."""
    done = CliRunner().invoke(app, ["prune", "--keep", "everything"])
    assert done.exit_code == 2
    assert "some of deciding, finals, resume, trials, comparisons" in done.output


def test_appending_while_a_log_is_pruned(tmp_path: Path) -> None:
    """What others append meanwhile is there afterwards; nobody reads half a log."""
    stop, count = threading.Event(), 0
    records.append(tmp_path, a_trial())

    def appends() -> None:
        nonlocal count
        while not stop.is_set():
            records.append(tmp_path, a_trial(count, role="bench"))
            records.append(tmp_path, a_trial(busy=True))
            count += 1

    writer = threading.Thread(target=appends)
    writer.start()
    for _ in range(10):
        pruner.prune([tmp_path], DEFAULT)
        assert len(records.read([tmp_path]))
    stop.set()
    writer.join()
    messages = [r.message for r in records.read([tmp_path]) if r.role == "bench"]
    assert count and messages == [f"record {n}" for n in range(count)]


def test_nothing_to_prune(tmp_path: Path) -> None:
    """A folder without logs is refused, with what was expected."""
    with pytest.raises(InputError, match="expected a tuning log"):
        pruner.prune([tmp_path], DEFAULT)
