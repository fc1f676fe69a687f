"""The benchmark of racing: what it tries, and what it makes of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from fake_worker import FakeWorker, cost_of, took
from typer.testing import CliRunner

from lntune import ops
from lntune.case import Case
from lntune.log.records import Timing
from lntune.measure.jobs import Outcome, Try

CASE = Case("layer_norm", 64, "float32", 8)


def test_candidates(script: ModuleType) -> None:
    """The default knobs come first, the others in an order that the seed decides."""
    one, same, other = (script.shuffled(CASE, 20, seed) for seed in (0, 0, 1))
    assert one == same != other and one[0] == other[0]
    assert len(set(one)) == len(one) == 20
    assert {case.op for case in script.cases()} == set(ops.OPS)


def test_what_trials_come_to(script: ModuleType) -> None:
    """Trials a second of both ways, ratios candidate by candidate, and the regret by the full
    times.
    """
    full = [script.Tried(s, us, False) for s, us in ((0.2, 10.0), (0.4, 8.0), (0.3, math.inf))]
    raced = [
        script.Tried(s, us, short)
        for s, us, short in ((0.1, 9.0, False), (0.4, 9.1, True), (0.1, math.inf, False))
    ]
    row = script.row(CASE, full, raced)
    assert (row.full, row.raced) == pytest.approx((3 / 0.9, 3 / 0.6), rel=1e-3)
    assert (row.ratio, row.short, row.regret) == pytest.approx((2.0, 0.333, 0.25))


def test_the_script(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways try every candidate of a case of each operator; one is told the best so far, the
    other is not. What is shown is kept.
    """
    told: list[float | None] = []

    def answer(job: Any) -> Outcome:
        assert isinstance(job, Try)
        told.append(job.best_us)
        us = cost_of(job.candidate)
        behind = job.best_us is not None and us > 1.15 * job.best_us
        return Outcome("ok", timings={"tuned": Timing((us,) * 5, us) if behind else took(us)})

    worker = type("Fake", (FakeWorker,), {"jobs": [], "answer": staticmethod(answer)})
    monkeypatch.setattr(script, "Worker", worker)
    app = typer.Typer()
    app.command()(script.main)
    words = ["--candidates", "6", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "racing.json").read_text())
    assert [r["trials"] for r in facts["results"]] == [6] * len(ops.OPS)
    assert all(r["regret"] == 0.0 for r in facts["results"])
    assert told.count(None) == 7 * len(ops.OPS) and len(told) == 12 * len(ops.OPS)
    assert "regret" in (tmp_path / "racing.txt").read_text()
