"""What is compared: schedules and contenders out of the log, and runs of somewhere else."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
from made_up_records import HERE, THERE, bench_file, record, rival, samples

from lntune import backends, compare, schedule
from lntune.compare import run, sides, sources
from lntune.compare.comparison import Result
from lntune.compare.sides import WORDS, Contender, Runs
from lntune.errors import InputError, LntuneError, LogError, UnknownNameError
from lntune.log import records
from lntune.log.records import Record, Setting
from lntune.log.wanted import Wanted
from lntune.versions import Code

CODE = schedule.get("cached_rows").code
WIDENED = schedule.get("widened_rows").code


def final(**fields: Any) -> Record:
    """A final that `cached_rows` with 4 lanes has won in 50 us, before `widened_rows` with 60 and
    `cached_rows` with 8 lanes and 70; the default knobs took 80.
    """
    others = (
        msgspec.structs.replace(rival("widened_rows", samples(60, seed=5), lanes=4), code=WIDENED),
        msgspec.structs.replace(rival("cached_rows", samples(70, seed=6), lanes=8), code=CODE),
    )
    timings = {"tuned": samples(50), "eager": samples(100, seed=1), "copy": samples(40, seed=2)}
    timings["default"] = samples(80, seed=3)
    default = Setting("cached_rows", {"lanes": 2})
    values = {"rivals": others, "default": default, "code": CODE, "timings": timings}
    return record(**{**values, **fields})


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of logs, and a machine whose CPU is HERE."""
    monkeypatch.setattr(backends, "device_of", lambda _: HERE)
    folder = tmp_path / "logs"
    folder.mkdir()
    return folder


def compared(log: Path, *names: str, **wanted: Any) -> list[Result]:
    """The comparison of sides out of a folder of logs."""
    options = run.Options(log_dir=log)
    return run.compare_sides(run.parse(names, options), Wanted(**wanted), options)


def times(result: Result) -> list[tuple[float, float, str]]:
    """Both medians of each case, rounded, and how they were compared."""
    return [(round(c.a.us, -1), round(c.b.us, -1), c.method) for c in result.cases]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("cached_rows", "widened_rows", (50, 60)),
        ("cached_rows:lanes=8", "cached_rows", (70, 50)),
        ("widened_rows:lanes=4", "eager", (60, 100)),
        ("default", "tuned", (80, 50)),
        ("eager", "copy", (100, 40)),
    ],
)
def test_one_final_answers(a: str, b: str, expected: tuple[float, float], log: Path) -> None:
    """All that a final has measured can be compared out of the log, round by round: schedules by
    the best of theirs, or by that with the knobs given, and everything beside them.
    """
    records.append(log, final())
    (result,) = compared(log, a, b)
    assert times(result) == [(*expected, "paired")]
    assert (result.a, result.b) == (a, b)
    (c,) = result.cases
    assert c.a.schedule in (a.partition(":")[0], "", "cached_rows")
    assert c.verdict == ("FASTER" if expected[0] > expected[1] else "SLOWER")


def test_several_sides_are_each_compared_with_the_first(log: Path) -> None:
    """Of A, B and C there are B against A and C against A."""
    records.append(log, final())
    results = compared(log, "eager", "cached_rows", "widened_rows")
    assert [(r.a, r.b) for r in results] == [("eager", "cached_rows"), ("eager", "widened_rows")]
    assert [len(r.cases) for r in results] == [1, 1]


def test_the_latest_undisturbed_record_that_holds_both_counts(log: Path) -> None:
    """Of several finals it is the latest that holds both sides and that nothing disturbed, also
    where a later one holds but one of them; one of a comparison counts as well.
    """
    slow = {**final().timings, "eager": samples(200)}
    records.append(log, final(time="2026-01-01T00:00:01+00:00"))
    records.append(log, final(time="2026-01-01T00:00:02+00:00", role="comparison", timings=slow))
    busy = {**slow, "eager": samples(300)}
    records.append(log, final(time="2026-01-01T00:00:03+00:00", timings=busy, busy=True))
    alone = {**slow, "eager": samples(400)}
    records.append(log, final(time="2026-01-01T00:00:04+00:00", timings=alone, rivals=()))
    (result,) = compared(log, "widened_rows", "eager")
    assert times(result) == [(60, 200, "paired")]
    (result,) = compared(log, "cached_rows", "eager")
    assert times(result) == [(50, 400, "paired")]


def test_sides_of_different_records(log: Path) -> None:
    """Where no record holds both sides, each is taken from its own, and what changed between them
    is counted in.
    """
    records.append(log, final(time="2026-01-01T00:00:01+00:00", rivals=()))
    other = {"schedule": "widened_rows", "code": WIDENED, "rivals": (), "default": None}
    records.append(log, final(time="2026-01-01T00:00:02+00:00", run="other", **other))
    (result,) = compared(log, "cached_rows", "widened_rows")
    assert [method for *_, method in times(result)] == ["direct"]
    assert result.cases[0].drift == 1 and len(result.between) == 1
    assert result.cases[0].high / result.cases[0].low > 1.05


def test_what_is_missing_is_said_with_its_command(log: Path) -> None:
    """A case that one side has alone, as nothing measured the other or its code has changed since,
    is named with the reason and the command that measures both.
    """
    old = msgspec.structs.replace(final().rivals[0], code=Code(0, 1, 1))
    records.append(log, final())
    records.append(log, final(hidden=64, dtype="bfloat16", rivals=()))
    records.append(log, final(hidden=128, dtype="bfloat16", rivals=(old,)))
    records.append(log, final(hidden=256, rivals=()))
    (result,) = compared(log, "cached_rows", "widened_rows")
    assert [c.case.hidden for c in result.cases] == [1024]
    command = "lntune compare cached_rows widened_rows --measure --op layer_norm --hidden"
    assert [(m.case.hidden, m.side, m.why, m.command) for m in result.missing] == [
        (
            64,
            "widened_rows",
            "not measured",
            f"{command} 64 --dtype bfloat16 --rows 512 --log-dir {log}",
        ),
        (
            128,
            "widened_rows",
            "measured only before its code changed",
            f"{command} 128 --dtype bfloat16 --rows 512 --log-dir {log}",
        ),
        (256, "widened_rows", "does not fit: float32 rows need no widening", ""),
    ]
    assert result.commands == [f"{command} 64,128 --dtype bfloat16 --rows 512 --log-dir {log}"]


def test_nothing_in_common_is_an_error_with_the_command(log: Path) -> None:
    """Where no case has both sides, the error says what measures them."""
    records.append(log, final(dtype="bfloat16", rivals=()))
    with pytest.raises(InputError, match=r"none that cached_rows and widened_rows have .*Run: lnt"):
        compared(log, "cached_rows", "widened_rows")


@pytest.mark.parametrize(
    ("wanted", "hidden"),
    [
        ({}, [64, 1024]),
        ({"hidden": (64,)}, [64]),
        ({"rows": (300,)}, [64, 1024]),  # of the same bucket
        ({"dtypes": ("float32",), "ops": ("layer_norm",)}, [64, 1024]),
    ],
)
def test_cases_are_chosen(wanted: dict[str, Any], hidden: list[int], log: Path) -> None:
    """By operator, hidden size, dtype and rows, which stand for their bucket; all by default."""
    for size in (64, 1024):
        records.append(log, final(hidden=size))
    (result,) = compared(log, "cached_rows", "eager", **wanted)
    assert [c.case.hidden for c in result.cases] == hidden
    with pytest.raises(InputError, match="none that cached_rows and eager have"):
        compared(log, "cached_rows", "eager", rows=(1,))


def test_records_of_other_devices_do_not_count(log: Path) -> None:
    """Contenders are those of the target, or of all devices."""
    records.append(log, final())
    records.append(log, final(device=THERE))
    assert len(compared(log, "cached_rows", "eager")[0].cases) == 1
    options = run.Options(log_dir=log, all_devices=True)
    (result,) = run.compare_sides(run.parse(("cached_rows", "eager"), options), options=options)
    assert sorted(c.device for c in result.cases) == sorted((HERE.slug, THERE.slug))


def test_compile_is_found_where_it_was_benchmarked(log: Path) -> None:
    """Finals do not measure torch.compile; a benchmark in the log does."""
    timings = {**final().timings, "compile": samples(79.5)}
    records.append(log, final())
    records.append(log, final(role="bench", timings=timings, rivals=()))
    (result,) = compared(log, "compile", "cached_rows")
    assert [round(c.a.us, -1) for c in result.cases] == [80]


# --- names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cached_row", "Did you mean 'cached_rows'"),
        ("eagr", "Did you mean 'eager'"),
        ("cached_rows:lan=4", "Did you mean 'lanes'"),
        ("cached_rows:lanes=5", "knob: got 'lanes=5'"),
        ("cached_rows:", "expected some knobs, as in cached_rows:lanes="),
        ("default:lanes=4", "expected default alone, or a schedule with knobs"),
        ("gated_row", "got a schedule for a gpu, expected one for the target, a cpu"),
        ("./nowhere", "cannot read nowhere"),
        ("nowhere.json", "cannot read nowhere.json"),
    ],
)
def test_a_name_of_nothing(text: str, message: str) -> None:
    """What is no side is refused, with what it might have been."""
    with pytest.raises(LntuneError) as error:
        sides.parse(text, "cpu", [])
    assert message in str(error.value)


def test_a_schedule_with_knobs() -> None:
    """Knobs are separated by commas, a switch's name alone puts it on, and only those named are
    fixed.
    """
    side = sides.parse("cached_rows:write=streamed,parallel", "cpu", [])
    assert isinstance(side, Contender)
    assert (side.schedule, side.op) == ("cached_rows", "layer_norm")
    assert side.knobs == {"write": "streamed", "parallel": True}
    assert side.takes({"write": "streamed", "parallel": True, "lanes": 4})
    assert not side.takes({"write": "streamed", "parallel": False})


@pytest.mark.parametrize("name", ["eager", "cached_rows"])
def test_a_word_wins_over_a_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that has the name of a word or of a schedule is named by `./`, or by a Path."""
    monkeypatch.chdir(tmp_path)
    bench_file(Path(name), [record()])
    assert isinstance(sides.parse(name, "cpu", []), Contender)
    for file in (f"./{name}", Path(name)):
        assert isinstance(sides.parse(file, "cpu", []), Runs)
    bench_file(Path("before"), [record()])
    assert isinstance(sides.parse("before", "cpu", []), Runs)


def test_schedules_of_two_operators_are_not_compared(log: Path) -> None:
    """They do not do the same."""
    with pytest.raises(InputError, match="expected schedules of one operator"):
        compared(log, "cached_rows", "blocked_rows")
    with pytest.raises(InputError, match="sides: got 1"):
        compared(log, "cached_rows")


def test_words_do_not_hide_schedules() -> None:
    """No shipped schedule has the name of a word."""
    assert not WORDS.keys() & schedule.all_schedules().keys()


# --- runs


def test_files_and_folders_are_read(tmp_path: Path) -> None:
    """A folder of logs counts by the latest final of each case; a file by its records; what failed
    is left out.
    """
    for entry in (
        record(time="1"),
        record(time="2", timings={"tuned": samples(7)}),
        record(time="3", role="comparison", timings={"tuned": samples(9)}),
        record(role="trial"),
        record(8, device=THERE),
    ):
        records.append(tmp_path / "logs", entry)
    found = sorted((r.case.hidden, round(r.median() or 0)) for r in sources.load(tmp_path / "logs"))
    assert found == [(8, 50), (1024, 7)]
    assert [r.case.hidden for r in sources.load(tmp_path / "logs" / THERE.slug)] == [8]
    file = records.log_path(tmp_path / "logs", HERE, "layer_norm")
    assert [round(r.median() or 0) for r in sources.load(file)] == [7]
    measured = [record(), record(64, status="wrong"), record(65, timings={})]
    assert [r.case.hidden for r in sources.load(bench_file(tmp_path / "a.json", measured))] == [
        1024
    ]


def test_what_is_no_measurement_is_refused(tmp_path: Path) -> None:
    """A file that is not there, not JSON, other JSON, or without any measurement: an error that
    says which and what to give.
    """
    with pytest.raises(LogError, match=r"cannot read .*none\.json"):
        sources.load(tmp_path / "none.json")
    for content in (b"\xff\x00", b"{", b"[]", b'{"records": 1}', b'{"cases": []}'):
        (tmp_path / "odd.json").write_bytes(content)
        with pytest.raises(InputError, match="lntune bench --output"):
            sources.load(tmp_path / "odd.json")
    with pytest.raises(InputError, match="no measurements"):
        sources.load(tmp_path)


def git(folder: Path, *arguments: str) -> None:
    """Have git do something in a folder, whoever the user is."""
    names = ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL")
    environment = {**os.environ, **dict.fromkeys(names, "nobody"), "GIT_CONFIG_GLOBAL": os.devnull}
    subprocess.run(["git", "-C", folder, *arguments], check=True, env=environment)


def test_logs_of_a_revision(log: Path) -> None:
    """`rev:NAME` are the logs as a revision has them, whatever was measured since; what is not
    there is said.
    """
    repository = log.parent
    git(repository, "init", "-q")
    (repository / "other").write_text("of another kind")
    git(repository, "add", "other")
    git(repository, "commit", "-qm", "empty")
    git(repository, "tag", "empty")
    records.append(log, record(time="1"))
    git(repository, "add", "logs")
    git(repository, "commit", "-qm", "first")
    git(repository, "tag", "first")
    records.append(log, record(time="2", timings={"tuned": samples(7)}))
    (found,) = sources.of_revision("first", [log])
    assert round(found.median() or 0) == 50
    (result,) = compared(log, "rev:first", str(log))
    assert times(result)[0][:2] == (50, 10)
    # the log still holds what the revision has, which is not what is tuned now
    for names in (("rev:first", "tuned"), ("tuned", "rev:first")):
        (result,) = compared(log, *names)
        assert sorted(times(result)[0][:2]) == [10, 50]
    for name, message in (
        ("none", "expected a revision of"),
        ("empty", "a revision without the folder logs"),
        ("--output=x", "expected a revision of"),
    ):
        with pytest.raises(InputError, match=message):
            sources.of_revision(name, [log])


def test_revisions_need_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the logs are in no repository, or git is not there, the error says so."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(InputError, match="expected a folder of tuning logs in a git repository"):
        sources.of_revision("HEAD", [tmp_path])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="expected git to be installed"):
        sources.of_revision("HEAD", [tmp_path])


def test_in_python(log: Path, tmp_path: Path) -> None:
    """`lntune.compare.compare` takes names and paths and gives the same as the command."""
    records.append(log, final())
    result = compare.compare("cached_rows", "eager", hidden=1024, dtype="fp32", log_dir=log)
    assert result == compared(log, "cached_rows", "eager")[0]
    file = bench_file(tmp_path / "eager", [final()])
    assert compare.compare(file, "eager", log_dir=log).cases[0].method == "paired"
    with pytest.raises(UnknownNameError):
        compare.compare("cached", "eager", log_dir=log)


def test_an_empty_log_says_what_fills_it(log: Path) -> None:
    """Where nothing was measured at all, tuning is what measures most of it."""
    with pytest.raises(InputError, match="Run: lntune tune --log-dir"):
        compared(log, "eager", "tuned")


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    """What is neither a file nor a folder is refused, instead of being read without end."""
    pipe = tmp_path / "before.json"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match=r"before\.json: got a device or a pipe"):
        sources.load(pipe)


@pytest.mark.parametrize("smallest", [-0.01, 1.0, float("nan")])
def test_a_smallest_difference_that_makes_no_sense(smallest: float) -> None:
    """From Python, too, the smallest difference that matters is a share."""
    with pytest.raises(InputError, match="smallest"):
        compare.compare("default", "eager", smallest=smallest)
