"""What `lntune tune` is asked for: recorded cases, several operators, grids of models, what is
missing or stale; and what `lntune report --cases` says of recorded ones.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from made_up_records import timing
from typer.testing import CliRunner

from lntune import backends, device, knobs, ops, schedule
from lntune.case import Case
from lntune.cli import app, plans
from lntune.cli.parse import cases, cases_of, grids
from lntune.commands import tune as requests
from lntune.errors import InputError, UnknownNameError
from lntune.log import cases as recorded
from lntune.log import records
from lntune.log.cases import Tallies, Tally, What
from lntune.log.wanted import ALL, Wanted
from lntune.ops import models
from lntune.tune import Settings, Summary

HERE = device.current()
GPU = backends.device_of("emulated:sm_90")
OTHER = msgspec.structs.replace(HERE, name="Another CPU", model="")
FORWARD, BACKWARD = "layer_norm", "layer_norm_backward"
RECORDED: Tallies = {
    What(FORWARD, 64, "float32", 30, "weight+bias", HERE): Tally(5, 5, 20.0),
    What(FORWARD, 64, "float32", 40, "weight+bias+stats", HERE): Tally(9, 3, 12.0),
    What(BACKWARD, 64, "float32", 40, "weight+dx", HERE): Tally(9, 9, 99.0),
    What(FORWARD, 96, "bfloat16", 1, "", OTHER): Tally(3, 3, 0.5),
    What(FORWARD, 128, "float32", 8, "", GPU): Tally(4),
    What(FORWARD, 64, "float64", 8, "", HERE, "float64 is not built"): Tally(2, 2, 50.0),
    What("rms_norm", 64, "float32", 8, "", HERE): Tally(2, 2, 1.0),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of recorded cases."""
    recorded.add(tmp_path / "cases.jsonl", RECORDED)
    return tmp_path / "cases.jsonl"


def test_recorded_cases_are_tuned_by_their_time(file: Path) -> None:
    """One for each row bucket, with the rows of most time, on the devices of this machine; what is
    of another machine's CPU is taken for this one's, and what no kernel takes is said.
    """
    plan = requests.of_recorded(file, ALL, None)
    (cpu, own), (gpu, theirs) = plan.parts
    assert (cpu, gpu) == (HERE, GPU)
    assert own == [
        Case(BACKWARD, 64, "float32", 40),
        Case(FORWARD, 64, "float32", 40),
        Case(FORWARD, 96, "bfloat16", 1),
    ]
    assert theirs == [Case(FORWARD, 128, "float32", 8)]
    notes = "\n".join(plan.notes)
    assert "layer_norm hidden 64 float64 (2 calls, 24 % of the time): float64 is not built" in notes
    assert "unknown operator 'rms_norm'" in notes and "recorded on Another CPU" in notes


def test_recorded_cases_are_narrowed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By operators and sizes, and by the device, of which the others' are said."""
    assert requests.of_recorded(file, Wanted.of(BACKWARD), None).cases == [
        Case(BACKWARD, 64, "float32", 40)
    ]
    plan = requests.of_recorded(file, ALL, GPU)
    assert plan.parts == [requests.Part(GPU, [Case(FORWARD, 128, "float32", 8)])]
    assert any(note.startswith("left out: 2 cases of") for note in plan.notes)

    def missing(_: str) -> None:
        raise InputError("no such device")

    monkeypatch.setattr(backends, "device_of", missing)
    notes = requests.of_recorded(file, ALL, None).notes
    assert any("there is none here (no such device)" in note for note in notes)


def test_rows_beyond_the_memory_are_those_of_the_bucket(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a program could hold may be too much to be measured, which takes copies."""
    monkeypatch.setattr("lntune.backends.inputs.memory", lambda: 300_000)
    recorded.add(file, {What(FORWARD, 512, "float32", 127, "", HERE): Tally(1, 1, 1e6)})
    assert requests.of_recorded(file, ALL, None).cases[0] == Case(FORWARD, 512, "float32", 32)


def final(case: Case, current: bool) -> records.Record:
    """A final of a case by today's code, or by older."""
    known = schedule.for_op(case.op, "cpu")
    name = next(iter(known))
    code = known[name].code
    if not current:
        code = msgspec.structs.replace(code, schedule=code.schedule + 1000)
    setting = known[name].default(case, HERE)
    return records.Record(
        role="final",
        case=case,
        device=HERE,
        threads=1,
        schedule=name,
        code=code,
        knobs=knobs.to_dict(setting),
        status="ok",
        timings={n: timing(us, us) for n, us in (("tuned", 2.0), ("eager", 3.0), ("default", 4.0))},
        busy=False,
        time="2026-01-01T00:00:00+00:00",
    )


@pytest.fixture
def logged(tmp_path: Path) -> Path:
    """A log with a current final and two stale ones."""
    folder = tmp_path / "logs"
    for case, current in (
        (Case(FORWARD, 64, "float32", 32), True),
        (Case(BACKWARD, 64, "float32", 32), False),
        (Case(BACKWARD, 4000, "float32", 32), False),
    ):
        records.append(folder, final(case, current))
    return folder


def asked(logged: Path, *operators: str, **given: Any) -> list[Case]:
    """The cases of a plan."""
    options = {"sizes": ("", "", ""), "grid": "default", "file": None, "target": ""}
    options |= {"missing": False, "stale": False, "log_dir": logged}
    return plans.plan(list(operators), **{**options, **given}).cases


def test_what_is_missing(logged: Path, file: Path) -> None:
    """Cases without a final, and those whose final is of older code, in their order; of recorded
    ones as of a grid.
    """
    sizes = ("64", "float32", "32,512")
    assert asked(logged, FORWARD, BACKWARD, sizes=sizes, missing=True) == [
        Case(FORWARD, 64, "float32", 512),
        Case(BACKWARD, 64, "float32", 32),
        Case(BACKWARD, 64, "float32", 512),
    ]
    assert asked(logged, sizes=("64", "", ""), file=file, missing=True) == [
        Case(BACKWARD, 64, "float32", 40)
    ]
    grid = asked(logged, missing=True)
    assert {case.op for case in grid} == set(ops.OPS)
    assert len(grid) == sum(len(op.grid) for op in ops.OPS.values())


def test_what_is_stale(logged: Path, file: Path) -> None:
    """Without sizes, a grid or a file all of the log's, of the operators named; else those of
    these. Both together are each.
    """
    old = [Case(BACKWARD, 4000, "float32", 32), Case(BACKWARD, 64, "float32", 32)]
    assert set(asked(logged, stale=True)) == set(old)
    assert asked(logged, FORWARD, stale=True) == []
    assert asked(logged, BACKWARD, sizes=("64", "", ""), stale=True) == [
        case for case in cases(BACKWARD, "64", "", "") if case == old[1]
    ]
    assert asked(logged, file=file, target="cpu", stale=True) == [Case(BACKWARD, 64, "float32", 40)]
    both = asked(logged, stale=True, missing=True)
    assert set(old) <= set(both) and len(both) > len(old)


def test_several_operators() -> None:
    """One after another where sizes are given, else by their worth; all where none is named."""
    assert [c.op for c in asked(Path(), FORWARD, "lnlstm_step", sizes=("64", "float32", "1"))] == [
        FORWARD,
        "lnlstm_step",
    ]
    everything = asked(Path())
    assert {case.op for case in everything} == set(ops.OPS)
    assert everything[0].op == everything[1].op == FORWARD and everything[-1].op != FORWARD
    assert asked(Path(), FORWARD) == list(ops.get(FORWARD).grid)
    assert plans.fitting([], ["blocked_rows"], [], "") == [BACKWARD]
    assert plans.fitting([], [], ["together=2"], "")[0] == FORWARD
    assert plans.fitting([], ["blocked_row"], [], "") == [FORWARD]
    with pytest.raises(UnknownNameError, match=r"layer_nrom.*layer_norm"):
        asked(Path(), "layer_nrom")


# --- grids


@pytest.mark.parametrize("op", ops.OPS)
def test_a_family_is_a_grid(op: str) -> None:
    """Each family that has such norms or cells stands for its sizes with all dtypes and rows of the
    default grid; others are refused with those that there are.
    """
    default = ops.get(op).grid
    for name, family in models.FAMILIES.items():
        if name in grids(op):
            found = cases(op, "", "", "", name)
            assert list(dict.fromkeys(c.hidden for c in found)) == list(family.hidden)
            assert {(c.dtype, c.rows) for c in found} == {(c.dtype, c.rows) for c in default}
        else:
            with pytest.raises(InputError, match=rf"--grid: got {name}.*default, paper"):
                cases(op, "", "", "", name)
    assert cases(op, "", "", "", "paper")[0].hidden == 240
    with pytest.raises(UnknownNameError, match=r"unknown grid 'papr'. Did you mean 'paper'"):
        cases(op, "", "", "", "papr")


def test_a_family_of_several_operators() -> None:
    """Operators for which a family has no sizes are left out."""
    assert {c.op for c in cases_of([], "", "", "", "bert")} == {FORWARD, BACKWARD}
    assert {c.op for c in cases_of([], "", "", "", "rnnt")} == {
        "lnlstm_step",
        "lnlstm_step_backward",
    }
    assert {c.op for c in cases_of([], "64", "", "", "bert")} == set(ops.OPS)


def test_default_grids_are_of_models() -> None:
    """Every size of a default grid is one of a family's or of the paper's; every family has a size
    within a factor of two of one of them, a source, and sizes that kernels take, each once.
    """
    known = {h for family in models.FAMILIES.values() for h in family.hidden}
    assert {*models.NORMS, *models.CELLS} <= known | set(models.PAPER)
    for family in models.FAMILIES.values():
        grid = models.NORMS if family.of == "norms" else models.CELLS
        assert family.source and len(set(family.hidden)) == len(family.hidden)
        assert any(h in grid for h in family.hidden)
    assert len(models.NORMS) == len(set(models.NORMS)) and len(models.CELLS) == len(
        set(models.CELLS)
    )


def test_an_operator_has_its_grids() -> None:
    """`lntune ops NAME` names the families of models that have such norms or cells, with their
    sizes and sources.
    """
    for op in ops.OPS:
        shown = CliRunner().invoke(app, ["ops", op]).stdout
        for name, family in models.FAMILIES.items():
            assert (f"--grid {name}: " in shown) == (name in grids(op))
            assert name not in grids(op) or family.source in shown
    facts = json.loads(CliRunner().invoke(app, ["ops", "--json"]).stdout)
    assert facts[0]["grids"]["gpt2"] == [768, 1024, 1280, 1600]


# --- runs and reports


def test_parts_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each device has its part by its number of cases, what one leaves goes to the others, and an
    interrupt ends all; the summary is of all together.
    """
    given: list[tuple[Any, float | None]] = []

    def tune(asked: list[Case], settings: Settings, *_: object) -> Summary:
        given.append((settings.device, settings.seconds))
        summary = Summary(seconds=1.0, untuned={str(case): "why" for case in asked})
        summary.failures.add("wrong", "3 of 4")
        summary.interrupted = len(given) == 2
        return summary

    monkeypatch.setattr("lntune.tune.tune", tune)
    own = [Case(FORWARD, 64, "float32", n) for n in (1, 2, 3)]
    parts = [requests.Part(HERE, own), requests.Part(GPU, own[:1]), requests.Part(OTHER, own[:1])]
    summary = requests.run(parts, Settings(seconds=10.0), lambda _: lambda _: None)
    assert given == [(HERE, 6.0), (GPU, 4.5)]
    assert (
        summary.interrupted
        and summary.seconds == 2.0
        and set(summary.untuned) == set(map(str, own))
    )
    assert [r.count for r in summary.failures.reasons()] == [2]


def run(*arguments: str) -> Any:
    """A command's outcome."""
    return CliRunner().invoke(app, list(arguments))


def test_a_report_of_recorded_cases(file: Path, logged: Path) -> None:
    """What serves each, its share of the time, what tuning saves where the log knows it; those that
    no kernel takes; the command for the rest.
    """
    where = ("--cases", str(file), "--log-dir", str(logged))
    facts = json.loads(run("report", *where, "--json").stdout)
    by_key = {(r["op"], r["hidden"]): r for r in facts["cases"]}
    tuned, stale = by_key[FORWARD, 64], by_key[BACKWARD, 64]
    assert tuned["tuned"] and tuned["calls"] == 14 and tuned["rows"] == 40
    assert tuned["share"] == pytest.approx((20 + 36) / (20 + 36 + 99 + 0.5 + 50 + 1))
    assert not stale["tuned"] and stale["gain"] is not None
    assert by_key[FORWARD, 96]["gain"] is None and by_key[FORWARD, 128]["us"] is None
    assert any("float64" in line for line in facts["left_out"])
    shown = run("report", *where).stdout
    assert "unknown" in shown and f"lntune tune --cases {file} --missing" in shown
    narrowed = run("report", BACKWARD, *where, "--json")
    assert [r["op"] for r in json.loads(narrowed.stdout)["cases"]] == [BACKWARD]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tune", "--cases", "nowhere"), "No such file"),
        (("report", "--cases", "nowhere"), "No such file"),
        (("tune", "--cases", "FILE", "--grid", "bert"), "beside --cases"),
        (("report", "--cases", "FILE", "--history"), "--history beside it"),
        (("tune", "--cases", "FILE", "--dry-run"), "Choose by --target"),
    ],
)
def test_what_cannot_be(arguments: tuple[str, ...], words: str, file: Path) -> None:
    """It is said, with exit code 2."""
    done = run(*(str(file) if a == "FILE" else a for a in arguments))
    assert done.exit_code == 2 and words in done.output


def test_nothing_is_left_to_tune(file: Path, logged: Path) -> None:
    """Where all is tuned that is asked for that is well; where no kernel takes any of it, not."""
    sizes = ("--hidden", "64", "--dtype", "float32", "--rows", "32", "--log-dir", str(logged))
    done = run("tune", FORWARD, *sizes, "--missing")
    assert (done.exit_code, done.stdout) == (0, "nothing of that is missing or stale\n")
    unknown = file.with_name("other.jsonl")
    recorded.add(unknown, {what: t for what, t in RECORDED.items() if recorded.why_not(what)})
    done = run("tune", "--cases", str(unknown), "--log-dir", str(logged))
    assert done.exit_code == 1 and "no kernel takes" in done.output


@pytest.mark.slow
def test_recorded_cases_are_tuned(tmp_path: Path) -> None:
    """From a program's record to finals of its cases, which then need no more."""
    file, logs = tmp_path / "cases.jsonl", tmp_path / "logs"
    own = [What(op, 32, "float32", 6, "", HERE) for op in (FORWARD, "lnlstm_step")]
    recorded.add(file, {what: Tally(1, 1, 9.0) for what in own})
    arguments = ("--cases", str(file), "--log-dir", str(logs))
    done = run("tune", *arguments, "--budget", "30s", "--trials", "1", "--workers", "1")
    assert done.exit_code == 0, done.output
    finals = records.read([logs], role="final")
    assert {r.case for r in finals} == {Case(what.op, 32, "float32", 6) for what in own}
    facts = json.loads(run("report", *arguments, "--json").stdout)
    assert all(r["tuned"] for r in facts["cases"])
    assert "nothing of that" in run("tune", *arguments, "--missing").output
    shutil.rmtree(logs)
