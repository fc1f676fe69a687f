"""`lntune merge`: the same bytes whatever the order, every record once, nothing lost, and what
cannot be used is said.
"""

from __future__ import annotations

import json
import tempfile
import threading
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import pytest
from any_records import any_record
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from made_log import CASES, DEVICE, finals
from test_records import a_record
from typer.testing import CliRunner

from lntune import knobs, schedule
from lntune.cli import app
from lntune.commands import merge as merging
from lntune.errors import InputError, LogError
from lntune.log import records, select
from lntune.log.records import LogWarning, Record
from lntune.log.union import Union, joined
from lntune.versions import Code

NOW = "2026-01-20T00:00:00.000+00:00"
CLOCKS = st.sampled_from(["", "1970-01-01", "2026-01-03", "2026-01-05", "2026-01-09", "2038-01-19"])
RECORDS = st.builds(
    lambda record, time, run: msgspec.structs.replace(record, time=time, run=run),
    any_record,
    CLOCKS,
    st.sampled_from(["", "a", "b"]),
)
LOGS = st.lists(RECORDS, min_size=1, max_size=6).flatmap(
    lambda pool: st.lists(st.lists(st.sampled_from(pool), max_size=6), min_size=3, max_size=3)
)
"""Three logs that have records in common, by clocks of which some are wrong."""
PROPERTY = settings(deadline=None, max_examples=80, suppress_health_check=list(HealthCheck))


def written(folder: Path, log: Iterable[Record], name: str = "log.jsonl") -> Path:
    """A file with records, in their order."""
    path = folder / name
    path.write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in log))
    return path


def union(*files: Path) -> bytes:
    """What a merge of files holds."""
    merged = Union(records.horizon(NOW))
    for file in files:
        merged.add(file)
    assert not merged.faults
    return joined(merged.lines())


def kept(folder: Path, content: bytes, name: str) -> Path:
    """The content in a file."""
    path = folder / name
    path.write_bytes(content)
    return path


@PROPERTY
@given(logs=LOGS)
@example(logs=[[a_record(time="2038-01-19"), a_record(1, time="2026-01-03")]] * 3)
def test_order_and_repetition_make_no_difference(logs: list[list[Record]]) -> None:
    """merge(A, B) is merge(B, A), byte for byte; merging what came of it again changes nothing;
    merge(merge(A, B), C) is merge(A, merge(B, C)); whatever clocks said.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        a, b, c = (written(folder, log, f"{i}.jsonl") for i, log in enumerate(logs))
        ab = union(a, b)
        assert ab == union(b, a)
        assert ab == union(kept(folder, ab, "ab.jsonl")) == union(a, folder / "ab.jsonl", b)
        bc = kept(folder, union(b, c), "bc.jsonl")
        assert union(a, bc) == union(folder / "ab.jsonl", c) == union(c, b, a)
        assert union(a, kept(folder, a.read_bytes(), "again.jsonl")) == union(a)


@PROPERTY
@given(logs=LOGS)
def test_nothing_is_lost_and_nothing_comes_twice(logs: list[list[Record]]) -> None:
    """Each record of each log is there once, as it was written."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [written(folder, log, f"{i}.jsonl") for i, log in enumerate(logs)]
        back = union(*files).splitlines()
    expected = {msgspec.json.encode(record) for log in logs for record in log}
    assert len(back) == len(expected)
    assert set(back) == expected


def test_two_spellings_are_one_record(tmp_path: Path) -> None:
    """Spaces and the order of fields make no other record, and decide nothing about which is kept:
    one of the two spellings, as it was.
    """
    plain = msgspec.json.encode(a_record())
    other = json.dumps(dict(reversed(json.loads(plain).items()))).encode()
    a, b = kept(tmp_path, plain + b"\n", "a.jsonl"), kept(tmp_path, other + b"\r\n", "b.jsonl")
    assert union(a, b) == union(b, a)
    assert union(a, b) in (plain + b"\n", other + b"\n")


def of_runs(folder: Path, runs: Sequence[int]) -> Path:
    """A folder of logs with some runs of the made log, and lines of trials between them."""
    for made in finals(Code()):
        if int(made.run, 16) in runs:
            setting = schedule.get(made.schedule).untuned(made.case.typical, DEVICE)
            record = msgspec.structs.replace(made, knobs=knobs.to_dict(setting))
            trial = msgspec.structs.replace(
                record, role="trial", time=made.time.replace(":05.", ":04.")
            )
            for one in (trial, record):
                records.append(folder, one)
    return folder


def test_what_serves_is_what_served_the_logs_beside_each_other(tmp_path: Path) -> None:
    """The merged folder chooses for every case what the folders read together did, with its record;
    it has the files that appending would have made.
    """
    schedules = schedule.all_schedules()
    folders = [of_runs(tmp_path / name, runs) for name, runs in (("a", (1, 3)), ("b", (2, 3)))]
    merged = merging.merge(folders, tmp_path / "c")
    both, one = records.read(folders), records.read([tmp_path / "c"])
    assert merged.duplicates == len(both) - len(one) > 0
    for case in CASES:
        before, after = (select.select(case, DEVICE, log, schedules) for log in (both, one))
        assert before == after
        assert before.record is not None
    appended = of_runs(tmp_path / "d", (1, 2, 3))
    for path in records.files(appended):
        assert path.read_bytes() == (tmp_path / "c" / path.relative_to(appended)).read_bytes()


def test_clocks_that_went_wrong(tmp_path: Path) -> None:
    """A record whose clock was years ahead, or behind, comes right behind the line that it stood
    behind, also once more logs are put in.
    """
    times = ["2026-01-02", "2038-01-19", "1970-01-01", "2026-01-08"]
    a = written(tmp_path, [a_record(i, time=t) for i, t in enumerate(times)], "a.jsonl")
    b = written(tmp_path, [a_record(9, time="2026-01-05")], "b.jsonl")
    messages = [records.of_line(line).message for line in union(b, a).splitlines()]
    assert messages == ["record 0", "record 2", "record 1", "record 9", "record 3"]


def test_several_devices_and_operators(tmp_path: Path) -> None:
    """Records go where they belong: a file for each device and operator, wherever they lay; a
    single file where one is asked for.
    """
    other = msgspec.structs.replace(DEVICE, name="Other CPU")
    mixed = [a_record(0), a_record(1, device=other)]
    mixed.append(a_record(2, case=msgspec.structs.replace(mixed[0].case, op="lnlstm_step")))
    log = written(tmp_path, mixed)
    merged = merging.merge([log], tmp_path / "folder")
    assert [Path(f.path).relative_to(tmp_path / "folder") for f in merged.files] == sorted(
        records.log_path(Path(), r.device, r.case.op) for r in mixed
    )
    assert {r.message for r in records.read([tmp_path / "folder"])} == {r.message for r in mixed}
    merging.merge([tmp_path / "folder"], tmp_path / "one.jsonl")
    assert (tmp_path / "one.jsonl").read_bytes() == union(log)


def test_lines_that_cannot_be_used(tmp_path: Path) -> None:
    """Torn lines, lines that are no record, and records of a newer schema that do not say of which
    device they are, are left out with file, line and reason; other records of a newer schema stay.
    """
    whole = msgspec.json.encode(a_record())
    newer = json.loads(whole) | {"schema": records.SCHEMA + 1, "case": {"op": "layer_norm", "k": 1}}
    strange = {"schema": records.SCHEMA + 1, "what": "?"}
    text = [whole, b"", json.dumps(newer).encode(), json.dumps(strange).encode(), b"[]", whole[:99]]
    log = kept(tmp_path, b"\n".join(text), "log.jsonl")
    done = CliRunner().invoke(app, ["merge", str(log), "-o", str(tmp_path / "c"), "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert (facts["records"], facts["newer"]) == (2, 1)
    assert [(f["file"], f["line"]) for f in facts["left_out"]] == [(str(log), n) for n in (4, 5, 6)]
    assert "newer lntune" in facts["left_out"][0]["why"]
    (path,) = records.files(tmp_path / "c")
    assert set(path.read_bytes().splitlines()) == {text[0], text[2]}
    shown = CliRunner().invoke(app, ["merge", str(log), "-o", str(tmp_path / "d")])
    assert shown.stdout.count("left out: ") == 3
    assert "1 of a newer lntune kept as they are" in shown.stdout


def test_records_that_contradict_each_other(tmp_path: Path) -> None:
    """Two records of one run, time and candidate that differ are a conflict: both are kept, it is
    said with both files, and the exit code is 1.
    """
    record = a_record(run="0123")
    a, b = (
        written(tmp_path, [msgspec.structs.replace(record, message=f"{n}")], f"{n}.jsonl")
        for n in "ab"
    )
    words = ["merge", str(a), str(b), "-o", str(tmp_path / "c.jsonl")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    assert "CONFLICT: trial of layer_norm 64x1024 float32" in done.stdout
    assert str(a) in done.stdout and str(b) in done.stdout
    assert len(list(records.read_file(tmp_path / "c.jsonl"))) == 2


@pytest.mark.parametrize("output", ["a", "a/x", ".", "b.jsonl", "other", "other/dev", "plain"])
def test_outputs_that_something_would_be_lost_by(tmp_path: Path, output: str) -> None:
    """An input, what lies within or around one, and what is there already are refused, and nothing
    is changed.
    """
    folder = of_runs(tmp_path / "a", (1,))
    log = written(tmp_path, [a_record()], "b.jsonl")
    (tmp_path / "other" / "dev").mkdir(parents=True)
    (tmp_path / "other" / "dev" / "x.jsonl").touch()
    (tmp_path / "plain").touch()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="-o: got"):
        merging.merge([folder, log], tmp_path / output)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_no_logs(tmp_path: Path) -> None:
    """An input that is not there, or holds no log, is refused."""
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="expected a tuning log"):
            merging.merge([path], tmp_path / "c")


def test_an_input_is_overwritten_when_that_is_asked_for(tmp_path: Path) -> None:
    """With --overwrite the union takes the place of the input that is named, whose misplaced
    records move to where they belong; the others stay.
    """
    a, b = of_runs(tmp_path / "a", (1,)), of_runs(tmp_path / "b", (2,))
    misplaced = tmp_path / "a" / "elsewhere" / "layer_norm.jsonl"
    misplaced.parent.mkdir()
    written(misplaced.parent, [a_record()], misplaced.name)
    expected = set(union(*records.files(a), *records.files(b)).splitlines())
    merging.merge([a, b], a, overwrite=True)
    assert set(union(*records.files(a)).splitlines()) == expected
    assert not misplaced.exists()
    assert len(records.read([b])) < len(records.read([a]))


def test_a_folder_is_there_as_a_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a file cannot be written, there is no output, nor anything left of it, and the error
    says what was to be written.
    """
    folder = of_runs(tmp_path / "a", (1, 2))
    write, done = merging.write, list[Path]()

    def fails(path: Path, lines: object) -> None:
        if done:
            raise OSError(28, "No space left on device")
        done.append(path)
        write(path, lines)  # type: ignore[arg-type]

    monkeypatch.setattr(merging, "write", fails)
    with pytest.raises(LogError, match=r"cannot write the merged log .*/c: No space left"):
        merging.merge([folder], tmp_path / "c")
    assert done
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_appending_while_a_folder_is_merged_into(tmp_path: Path) -> None:
    """What another process appends while its folder is merged into is not lost."""
    folder, other = tmp_path / "a", of_runs(tmp_path / "b", (1, 2, 3))
    records.append(folder, a_record(1000))
    stop, count = threading.Event(), 0

    def appends() -> None:
        nonlocal count
        while not stop.is_set():
            records.append(folder, a_record(count))
            count += 1

    writer = threading.Thread(target=appends)
    writer.start()
    for _ in range(5):
        merging.merge([folder, other], folder, overwrite=True)
    stop.set()
    writer.join()
    messages = [r.message for r in records.read([folder])]
    assert count and {f"record {n}" for n in range(count)} <= set(messages)


def test_a_temporary_file_is_no_log(tmp_path: Path) -> None:
    """What is being written beside a log, to take its place, is not read as one."""
    records.append(tmp_path, a_record())
    (path,) = records.files(tmp_path)
    path.with_name(f".{path.name}.0123-1.2.jsonl").write_bytes(b"half a reco")
    with warnings.catch_warnings():
        warnings.simplefilter("error", LogWarning)
        assert len(records.read([tmp_path])) == 1
    assert merging.merge([tmp_path], tmp_path.with_name("out")).records == 1
