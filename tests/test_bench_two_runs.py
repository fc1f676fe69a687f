"""The benchmark of two tuning runs: what it compares, what it says of it, and that it works."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fake_worker import FakeWorker, always_ok, took
from typer.testing import CliRunner

from lntune import device, ops, schedule
from lntune.case import Case
from lntune.log.records import Rival, Timing
from lntune.measure.jobs import Candidate, Final, Outcome
from lntune.tune import loop

CASE = Case("layer_norm", 64, "float32", 8)
ONE, OTHER = (Candidate("cached_rows", (("lanes", n),)) for n in (2, 4))


def outcome(one: Timing, other: Timing, eager: Timing) -> Outcome:
    """Of a final of ONE and OTHER that the first of them has won."""
    return Outcome(
        "ok",
        timings={"tuned": one, "eager": eager},
        winner=0,
        rivals=(Rival(OTHER.schedule, OTHER.knobs, other),),
    )


def test_cases_are_of_all_operators(script: ModuleType) -> None:
    """As many of each, spread over the grid from its beginning on, none twice; at least one."""
    for count in (1, 24, 40):
        cases = script.thinned(count)
        by_op = {name: [c for c in cases if c.op == name] for name in ops.OPS}
        assert all(len(of) == max(1, count // len(ops.OPS)) for of in by_op.values())
        assert len(set(cases)) == len(cases)
        assert all(case in ops.get(case.op).grid for case in cases)
    assert len({c.dtype for c in script.thinned(24)}) > 1


@pytest.mark.parametrize(
    ("us", "near"), [((10.0, 10.0), True), ((10.0, 10.25), True), ((10.5, 10.0), False)]
)
def test_two_choices(us: tuple[float, float], near: bool, script: ModuleType) -> None:
    """The ratio within rounds says which is faster, whichever won the comparison."""
    first, second = script.Chosen(ONE, "a"), script.Chosen(OTHER, "b")
    found = outcome(took(us[0]), took(us[1]), took(30.0))
    row = script.compared(CASE, first, second, found)
    assert row.ratio == pytest.approx(us[0] / us[1], abs=1e-3)
    assert (row.first_us, row.second_us, row.near, row.same) == (*us, near, False)
    swapped = script.compared(CASE, second, first, found)
    assert swapped.ratio == pytest.approx(us[1] / us[0], abs=1e-3)


def test_a_choice_of_eager_mode(script: ModuleType) -> None:
    """Its time is that of eager mode in the same rounds."""
    first, second = script.Chosen(None, ""), script.Chosen(ONE, "")
    row = script.compared(CASE, first, second, outcome(took(10.0), took(11.0), took(10.1)))
    assert (row.first, row.first_us, row.second_us) == ("eager", 10.1, 10.0)
    assert row.near


def test_equal_choices_are_not_timed(script: ModuleType) -> None:
    """They are the same, hence near; a comparison that failed is neither."""
    chosen = script.Chosen(ONE, "")

    class Unused:
        def run(self, *_: Any) -> Outcome:
            pytest.fail("timed")

    row = script.measure(Unused(), CASE, chosen, chosen, 1.0)
    assert (row.same, row.near, row.ratio) == (True, True, None)
    failed = script.compared(CASE, chosen, script.Chosen(OTHER, ""), Outcome("run", "died"))
    assert (failed.near, failed.failed) == (False, "run: died")
    assert "run: died" in [str(cell) for row in script.table([failed]).rows for cell in row]


@pytest.mark.parametrize(("near", "word"), [(19, "reached"), (18, "missed")])
def test_what_is_said(near: int, word: str, script: ModuleType) -> None:
    """The share of near cases beside what is wanted, that of equal ones, and what is left out."""
    same = script.Row(CASE, "a", "a", True, ("", ""))
    far = script.Row(CASE, "a", "b", False, ("", ""), 11.0, 10.0, 1.1, 1.09, 1.11)
    said = script.lines([same] * near + [far] * (20 - near), missing=1)
    assert f"in {near} of 20 cases ({5 * near} %; {word}: 95 %)" in said[0]
    assert said[1:] == [
        f"the same choice in {near} of 20",
        "1 case left out: a run has not tuned it",
    ]


def test_the_script(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of four cases with logs of their own, and their choices compared: what is shown and
    kept are the same figures.
    """
    seeds: list[int] = []

    def answer(job: Any) -> Outcome:
        if isinstance(job, Final):
            seeds.append(job.seed)
        return always_ok(job)

    worker = type("Fake", (FakeWorker,), {"jobs": [], "answer": staticmethod(answer)})
    monkeypatch.setattr(loop, "Worker", worker)
    monkeypatch.setattr(loop, "prepare_training", lambda _: None)
    monkeypatch.setattr(script, "Worker", worker)
    monkeypatch.setattr(script.tune, "Settings", lambda **fields: _few(fields))
    result = CliRunner().invoke(
        _app(script), ["--cases", "4", "--search", "random", "--output", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "two_runs.json").read_text())
    assert len(facts["results"]) == 4
    assert facts["near"] == sum(
        r["same"] or max(r["ratio"], 1 / r["ratio"]) <= 1.03 for r in facts["results"]
    )
    assert {1, 1001} <= set(seeds)
    text = (tmp_path / "two_runs.txt").read_text()
    assert f"in {facts['near']} of 4 cases" in text and facts["name"] == device.current().slug
    assert all(schedule.get(r["first"].split()[0]).op == r["case"]["op"] for r in facts["results"])


def _few(fields: dict[str, Any]) -> Any:
    """Settings of three trials a case, however long they take."""
    from lntune.tune.settings import Settings

    return Settings(**{**fields, "seconds": None, "trials": 3})


def _app(script: ModuleType) -> Any:
    import typer

    app = typer.Typer()
    app.command()(script.main)
    return app
