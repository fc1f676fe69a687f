"""The tuning log: what is written is read, what cannot be used is skipped and said, and "best" is
computed on reading.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from any_records import any_record
from hypothesis import given, settings
from hypothesis import strategies as st

from lntune.case import BUCKETS, Case
from lntune.device import Device
from lntune.errors import LogError
from lntune.log import records
from lntune.log.records import SCHEMA, LogWarning, Record, Role, Status, Timing
from lntune.versions import Code

DEVICE = Device("cpu", "Test(R) CPU", "x86-64-v3", 2)


def a_record(index: int = 0, **fields: Any) -> Record:
    """A plausible record; `index` tells it from others."""
    plain: dict[str, Any] = {
        "case": Case("layer_norm", 1024, "float32", 64),
        "device": DEVICE,
        "threads": 2,
        "schedule": "cached_rows",
        "code": Code(3, 1, 2),
        "knobs": {"lanes": 4, "parallel": True, "mode": "a"},
        "status": "ok",
        "timings": {"tuned": Timing((10.0, 11.5, 12.25), 11.5)},
        "message": f"record {index}",
        "time": "2026-01-01T00:00:00Z",
    }
    return Record(**{**plain, **fields})


def log_of(folder: Path) -> Path:
    """The one log file in the folder."""
    (path,) = folder.glob("*/*.jsonl")
    return path


def read_quietly(folder: Path) -> list[Record]:
    """All records of the folder; a warning fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return records.read([folder])


@settings(deadline=None, max_examples=60)
@given(written=st.lists(any_record, min_size=1, max_size=4))
def test_what_is_written_is_read(written: list[Record]) -> None:
    """Records of any content come back equal, each from the file of its device and operator, in the
    order written.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for record in written:
            records.append(folder, record)
        back = read_quietly(folder)
        assert len(back) == len(written)
        for path in {records.log_path(folder, r.device, r.case.op) for r in written}:
            assert list(records.read_file(path)) == [
                r for r in written if records.log_path(folder, r.device, r.case.op) == path
            ]


@pytest.mark.parametrize("error", [math.inf, math.nan])
def test_infinite_errors_stay_readable(tmp_path: Path, error: float) -> None:
    """A candidate that is infinitely wrong is logged with the largest number there is, since JSON
    has no infinity.
    """
    records.append(
        tmp_path,
        a_record(status="wrong", errors={"y": error, "mean": 0.5}, versus_eager={"y": error}),
    )
    (back,) = read_quietly(tmp_path)
    assert back.errors == {"y": sys.float_info.max, "mean": 0.5}
    assert back.versus_eager == {"y": sys.float_info.max}


def test_half_characters_in_a_message(tmp_path: Path) -> None:
    """A message that is no valid Unicode (a compiler's output, a file name) is logged with the bad
    characters replaced.
    """
    records.append(tmp_path, a_record(status="compile", message="no such file: \udcff.cc, größer"))
    assert read_quietly(tmp_path)[0].message == "no such file: ?.cc, größer"


BROKEN = {
    "no JSON": b"{oops",
    "binary": bytes(range(128, 160)) + b"\0",
    "another kind of JSON": b"[1, 2, 3]",
    "no schema": b"{}",
    "fields missing": b'{"schema": 1}',
    "a dtype that is none": msgspec.json.encode(a_record()).replace(b'"float32"', b'"float23"'),
    "a hidden size that is none": (
        msgspec.json.encode(a_record()).replace(b'"hidden":1024', b'"hidden":0')
    ),
    "text for a number": (
        msgspec.json.encode(a_record()).replace(b'"hidden":1024', b'"hidden":"1024"')
    ),
    "a status that is none": msgspec.json.encode(a_record()).replace(b'"ok"', b'"fine"'),
    "a role that is none": msgspec.json.encode(a_record()).replace(b'"trial"', b'"heat"'),
    "nested without end": b'{"schema": ' + b"[" * 100_000,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_corrupt_line_costs_only_itself(tmp_path: Path, kind: str) -> None:
    """A line in the middle that is no record is skipped with a warning naming file and line; the
    others count.
    """
    for index in range(3):
        records.append(tmp_path, a_record(index))
    path = log_of(tmp_path)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], BROKEN[kind], *lines[1:]]) + b"\n")
    with pytest.warns(LogWarning) as caught:
        assert [r.message for r in records.read([tmp_path])] == ["record 0", "record 1", "record 2"]
    assert len(caught) == 1
    assert str(caught[0].message).startswith(f"{path}:2: skipped, not a usable record: ")


def test_blank_lines_are_nothing(tmp_path: Path) -> None:
    """Empty lines and Windows line ends are passed over in silence."""
    records.append(tmp_path, a_record(0))
    path = log_of(tmp_path)
    path.write_bytes(b"\n\r\n" + path.read_bytes().replace(b"\n", b"\r\n") + b"   \n")
    assert [r.message for r in read_quietly(tmp_path)] == ["record 0"]


def test_a_newer_schema_is_skipped_with_a_warning(tmp_path: Path) -> None:
    """A record of a newer schema is skipped with a warning saying so, even where its other fields
    make no sense here.
    """
    records.append(tmp_path, a_record(0))
    path = log_of(tmp_path)
    with path.open("a") as file:
        file.write(json.dumps({"schema": SCHEMA + 1, "case": "of another shape"}) + "\n")
    records.append(tmp_path, a_record(1))
    with pytest.warns(
        LogWarning,
        match=(
            rf"{path.name}:2: skipped, written by a newer lntune \(schema {SCHEMA + 1}, this one"
            rf" reads up to {SCHEMA}\)"
        ),
    ):
        assert [r.message for r in records.read([tmp_path])] == ["record 0", "record 1"]


def test_unknown_fields_are_ignored(tmp_path: Path) -> None:
    """A field a later version added, at any depth, does not keep a record of this schema from being
    read.
    """
    records.append(tmp_path, a_record(0))
    path = log_of(tmp_path)
    data = json.loads(path.read_text())
    data["mood"] = "good"
    data["device"]["temperature"] = {"c": 40}
    data["timings"]["tuned"]["p99_us"] = 13.0
    path.write_text(json.dumps(data) + "\n")
    assert read_quietly(tmp_path) == [a_record(0)]


def test_reading_can_be_narrowed(tmp_path: Path) -> None:
    """`op` and `device` narrow what is read; a folder that does not exist holds nothing."""
    other = Device("cpu", "Another", "aarch64", 8)
    norm, lstm = Case("layer_norm", 8, "float32", 1), Case("lstm_step", 8, "float32", 1)
    for device in (DEVICE, other):
        for case in (norm, lstm):
            records.append(tmp_path, a_record(case=case, device=device))
    assert len(records.read([tmp_path, tmp_path / "missing"])) == 4
    assert {(r.case.op, r.device) for r in records.read([tmp_path], op="layer_norm")} == {
        ("layer_norm", DEVICE),
        ("layer_norm", other),
    }
    assert [
        (r.case.op, r.device) for r in records.read([tmp_path], op="lstm_step", device=other)
    ] == [("lstm_step", other)]


NOW = "2026-11-29T12:00:00+00:00"


def merge(*logs: list[str]) -> list[str]:
    """Files of records made at these times, merged: "0a" is the first record of the first file."""
    files = [
        [
            a_record(time=at, run=f"{number}{letter}")
            for letter, at in zip("abcdef", log, strict=False)
        ]
        for number, log in enumerate(logs)
    ]
    return [r.run for r in records.merged(files, NOW)]


def test_files_are_merged_by_time() -> None:
    """Records of several files are one list, oldest first."""
    assert merge(["2026-01-01", "2026-03-01"], ["2026-02-01", "2026-04-01"]) == [
        "0a",
        "1a",
        "0b",
        "1b",
    ]


def test_in_a_file_the_later_line_is_later() -> None:
    """A clock that was set back between two lines does not make the second one older, nor older
    than other files' records of before.
    """
    assert merge(["2026-03-01", "2026-02-01"]) == ["0a", "0b"]
    assert merge(["2026-03-01", "1970-01-01"], ["2026-02-01"]) == ["1a", "0a", "0b"]


def test_a_time_in_the_future_is_no_time() -> None:
    """A record dated 2038 counts as written right after the one before it, so that later ones, of
    its file and of others, are later.
    """
    assert merge(["2026-01-01", "2038-01-19", "2026-03-01"], ["2026-02-01"]) == [
        "0a",
        "0b",
        "1a",
        "0c",
    ]
    assert merge(["2038-01-19"], ["2026-02-01"]) == ["0a", "1a"]
    # less than a day ahead: clocks of two machines differ
    assert merge(["2026-11-30T11:59"], ["2026-11-29"]) == ["1a", "0a"]
    assert [
        records.merged([[a_record(time="2038-01-19")], [a_record(time="2026-02-01")]])[-1].time
    ] == ["2026-02-01"]


times = st.sampled_from(
    ["", "1970-01-01", "2026-01-01", "2026-02-01", "2026-02-01T10:00", "2038-01-19", "?"]
)


@given(logs=st.lists(st.lists(times, max_size=4), max_size=4), seed=st.randoms())
def test_the_order_of_files_does_not_matter(logs: list[list[str]], seed: Any) -> None:
    """Whatever clocks said, the merged list is the same for any order of the files, and keeps the
    order within each.
    """
    files = [
        [a_record(time=at, run=f"{number}", message=str(line)) for line, at in enumerate(log)]
        for number, log in enumerate(logs)
    ]
    merged = records.merged(files, NOW)
    for number, file in enumerate(files):
        assert [r for r in merged if r.run == str(number)] == file
    seed.shuffle(files)
    assert records.merged(files, NOW) == merged


def test_folders_are_read_as_one(tmp_path: Path) -> None:
    """Records of several folders come oldest first, in whatever order the folders are given."""
    for name, at in (("b", "2026-01-02"), ("a", "2026-01-01")):
        records.append(tmp_path / name, a_record(run=name, time=at))
    for folders in ([tmp_path / "b", tmp_path / "a"], [tmp_path / "a", tmp_path / "b"]):
        assert [r.run for r in records.read(folders)] == ["a", "b"]


def test_folders_of_before_devices_named_their_model_are_read(tmp_path: Path) -> None:
    """A device's records lie in its own folder, and those of an earlier release in one whose name
    lacks the model.
    """
    named = msgspec.structs.replace(DEVICE, model="GenuineIntel family 6 model 143 stepping 8")
    for device in (
        DEVICE,
        named,
        msgspec.structs.replace(named, model="GenuineIntel family 6 model 85 stepping 7"),
    ):
        records.append(tmp_path, a_record(device=device))
    assert {r.device for r in records.read([tmp_path], device=named)} == {DEVICE, named}


def test_another_device_under_the_same_name_is_left_out(tmp_path: Path) -> None:
    """Old records of two generations lie in one folder; read for a device, only those that may
    serve it come.
    """
    one, other = (msgspec.structs.replace(DEVICE, l1=l1) for l1 in (32768, 49152))
    for device in (one, other):
        records.append(tmp_path, a_record(device=device))
    assert [r.device for r in records.read([tmp_path], device=one)] == [one]


def test_reading_a_role_is_reading_all_and_leaving_out_the_others(tmp_path: Path) -> None:
    """Of every role and schema, however a line is written; one of a newer lntune is said to be
    skipped whatever role is asked for, a torn one where it is of a role asked for or says none.
    """
    roles = get_args(Role)
    for role in (*roles, *roles):
        records.append(tmp_path, a_record(role=role))
    path = log_of(tmp_path)
    lines = path.read_bytes().splitlines()
    for old, line in zip((1, 2, 1, 2), lines[:4], strict=True):
        lines.append(line.replace(b'"schema":3', b'"schema":%d' % old))
    lines += [json.dumps(json.loads(line)).encode() for line in lines[:4]]
    path.write_bytes(b"\n".join(lines) + b"\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        everything = list(records.read_file(path))
        assert len(everything) == len(lines)
        for some in (*((role,) for role in roles), roles[:2], ("final", "trial")):
            assert list(records.read_file(path, some)) == [r for r in everything if r.role in some]
    newer, torn = lines[0].replace(b'"schema":3', b'"schema":4'), lines[1][:40]
    path.write_bytes(b"\n".join((newer, torn, torn[:15])))
    for role in roles:
        with pytest.warns(LogWarning) as caught:
            assert list(records.read_file(path, role)) == []
        numbers = [int(str(w.message).split(":")[1]) for w in caught]
        assert numbers == ([1, 2, 3] if role == "final" else [1, 3])


def test_a_log_that_cannot_be_read(tmp_path: Path) -> None:
    """A log that is a folder, or is not there, is a LogError naming the path and the reason."""
    with pytest.raises(
        LogError, match=r"cannot read the tuning log .*layer_norm.jsonl: Is a directory"
    ):
        (tmp_path / "layer_norm.jsonl").mkdir()
        list(records.read_file(tmp_path / "layer_norm.jsonl"))
    with pytest.raises(LogError, match=r"cannot read the tuning log .*missing.jsonl: No such file"):
        list(records.read_file(tmp_path / "missing.jsonl"))


def final(us: float, at: str, **fields: Any) -> Record:
    """A final measurement of `us` microseconds, made at the time `at`."""
    return a_record(role="final", timings={"tuned": Timing((us,), us)}, time=at, **fields)


def test_the_latest_final_counts() -> None:
    """Of several finals of one case the latest counts, not the fastest and not that of the last
    file.
    """
    files = [
        [final(5.0, "2026-01-02T00:00:00Z"), final(9.0, "2026-03-01T00:00:00Z")],
        [final(7.0, "2026-02-01T00:00:00Z")],
    ]
    assert [r.median() for r in records.finals(records.merged(files)).values()] == [9.0]


def test_a_disturbed_final_does_not_supersede_another() -> None:
    """One that others disturbed counts only where there is no other; of several such, the latest.
    Not known is not disturbed.
    """
    quiet, busy, unknown = (
        final(5.0, "1", busy=False),
        final(9.0, "2", busy=True),
        final(7.0, "3", busy=None),
    )
    for log, us in (
        ([quiet, busy], 5.0),
        ([busy], 9.0),
        ([busy, final(8.0, "4", busy=True)], 8.0),
        ([quiet, unknown, busy], 7.0),
    ):
        assert [r.median() for r in records.finals(log).values()] == [us]


def test_of_equally_old_finals_the_last_counts() -> None:
    """Finals of the same second: the one written last counts."""
    assert [r.median() for r in records.finals([final(5.0, "t"), final(9.0, "t")]).values()] == [
        9.0
    ]


def test_each_case_has_its_final() -> None:
    """Operator, hidden size, dtype and row bucket each make a case of their own; rows within a
    bucket do not.
    """
    base = Case("layer_norm", 1024, "float32", 64)
    same = [base, msgspec.structs.replace(base, rows=BUCKETS[base.bucket][1])]
    others = [
        msgspec.structs.replace(base, **{k: v})
        for k, v in {"op": "other", "hidden": 1000, "dtype": "bfloat16", "rows": 1}.items()
    ]
    finals = records.finals(
        [final(1.0, str(i), case=case) for i, case in enumerate([*same, *others])]
    )
    assert set(finals) == {(c.op, c.hidden, c.dtype, c.bucket) for c in [base, *others]}
    assert len(finals) == 5
    assert finals["layer_norm", 1024, "float32", base.bucket].case == same[1]


@pytest.mark.parametrize("status", [s for s in get_args(Status) if s != "ok"])
def test_a_failure_is_no_final(status: str) -> None:
    """A later final that failed, was not timed, or is a mere trial does not displace one that is
    right.
    """
    good = final(5.0, "2026-01-01T00:00:00Z")
    later = "2026-05-01T00:00:00Z"
    log = [
        good,
        final(1.0, later, status=status),
        a_record(role="final", time=later, timings={}),
        a_record(time=later),
    ]
    assert list(records.finals(log).values()) == [good]


def test_median_of_a_contender() -> None:
    """`median` gives the contender's microseconds, None for one that was not measured."""
    record = a_record()
    assert record.median() == 11.5
    assert record.median("eager") is None
