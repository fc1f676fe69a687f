"""The tour of `make demo`, on a grid small enough for a test."""

from __future__ import annotations

import io
import json
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import lntune
from lntune import device, tune
from lntune.case import Case
from lntune.cli import app
from lntune.commands import demo
from lntune.log import records
from lntune.log.records import Record, Timing
from lntune.tune import Summary

GRID = (Case("layer_norm", 64, "float32", 8), Case("layer_norm", 64, "bfloat16", 1))


class _Nan(torch.autograd.Function):
    """The same values, and a gradient of NaN."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        return dy * math.nan


@pytest.fixture(autouse=True)
def fresh_decisions() -> Iterator[None]:
    """What the tour tuned serves no other test."""
    yield
    lntune.reload()


def test_the_tour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything of the grid is tuned and logged, agrees with eager forward and backward, and is in
    the report at the end.
    """
    out = io.StringIO()
    # a slow machine has time for both
    monkeypatch.setattr(
        demo,
        "Settings",
        lambda seconds, again: tune.Settings(seconds=100 * seconds, trials=2, again=again),
    )
    monkeypatch.setattr("lntune.tune.times.FINAL_SHARE", 1e-4)
    with warnings.catch_warnings():  # a tour does not warn of what it does itself
        warnings.simplefilter("error", lntune.UntunedWarning)
        tour = demo.run(4, GRID, Console(file=out, width=200, highlight=False))
    text = out.getvalue()
    assert tour.ok and lntune.untuned() and "lntune tune layer_norm_backward" in text
    assert "of earlier runs" not in text
    assert {(r.hidden, r.dtype, r.rows) for r in tour.rows} == {
        (c.hidden, c.dtype, c.rows) for c in GRID
    }
    assert [a.case for a in tour.agreements] == list(GRID) and tour.trials >= len(GRID)
    assert all(0 <= a.output < demo.AGREES[a.case.dtype] for a in tour.agreements)
    assert "all tuned ops agree with eager" in text
    assert ("geomean" in text or "disturbed" in text) and "over eager" in text and "of copy" in text
    assert "[2/2] layer_norm 1x64 bfloat16: tuned" in text, "progress is visible"
    assert len(records.finals(records.read([Path(tour.log_dir)]))) == len(GRID)


def test_rows_of_earlier_runs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a record of before serves, because that of now was disturbed, the tour says so."""
    of_now, of_before = (
        Record(
            role="final",
            case=case,
            device=device.current(),
            threads=1,
            schedule="cached_rows",
            knobs={},
            status="ok",
            timings={"tuned": Timing((1.0,), 1.0)},
            run=run,
        )
        for case, run in zip(GRID, ("now", "before"), strict=True)
    )
    summary = Summary(finals=[of_now], statuses=Counter(ok=1))
    found = {records.Key.of(r.case): r for r in (of_now, of_before)}
    monkeypatch.setattr(demo, "tune", lambda *_: summary)
    monkeypatch.setattr(demo.records, "finals", lambda _: found)
    monkeypatch.setattr(demo, "_agreement", lambda c: demo.Agreement(c, 0.0, 0.0, True))
    out = io.StringIO()
    assert demo.run(1, GRID, Console(file=out, width=200)).ok
    assert "1 row of earlier runs" in out.getvalue()


@pytest.mark.filterwarnings("ignore::lntune.UntunedWarning")
def test_a_difference_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op that is wrong by one percent in float32, in its output or only in its gradient,
    DIFFERS.
    """
    assert demo._agreement(GRID[0]).agrees
    right = lntune.layer_norm

    def wrong_output(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return right(x, *rest) * 1.01

    def wrong_gradient(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return right(x + 0.01 * (x - x.detach()), *rest)

    for wrong in (wrong_output, wrong_gradient):
        monkeypatch.setattr(lntune, "layer_norm", wrong)
        agreement = demo._agreement(GRID[0])
        assert not agreement.agrees
        assert (agreement.output > 1e-3) == (wrong is wrong_output) and agreement.gradient > 1e-3
    for place in (0, 1):  # NaN, in the output and then in the gradient alone, is no agreement
        factor = torch.tensor(1.0 if place else math.nan)
        monkeypatch.setattr(
            lntune,
            "layer_norm",
            lambda x, *rest, f=factor: (
                _Nan.apply(right(x, *rest)) if f == 1 else right(x, *rest) * f
            ),
        )
        assert not demo._agreement(GRID[0]).agrees


@pytest.mark.parametrize("interrupted", [True, False])
def test_nothing_tuned_is_a_failure(interrupted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted tour, and one that tuned nothing, says so and is not a success."""
    monkeypatch.setattr(
        demo, "tune", lambda *_: Summary(interrupted=interrupted, untuned={"case": "no compiler"})
    )
    out = io.StringIO()
    assert not demo.run(1, GRID, Console(file=out, width=200)).ok
    assert ("interrupted" if interrupted else "no compiler") in out.getvalue()


@pytest.mark.parametrize("agrees", [True, False])
def test_the_command(agrees: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`lntune demo` exits with 0 when all tuned ops agree with eager and with 1 when one does not;
    --json says which.
    """
    budgets = []

    def fake(seconds: float, **_: Any) -> demo.Tour:
        budgets.append(seconds)
        from lntune.report.rows import Row

        row = Row(*(None,) * len(Row.__struct_fields__))  # type: ignore[arg-type]
        return demo.Tour(1, [row], [demo.Agreement(GRID[0], 0.0, 0.0, agrees)], str(tmp_path))

    monkeypatch.setattr(demo, "run", fake)
    done = CliRunner().invoke(app, ["demo", "--budget", "3s", "--json"])
    assert done.exit_code == (0 if agrees else 1)
    assert budgets == [3]
    facts = json.loads(done.stdout)
    assert facts["ok"] is agrees and facts["agreements"][0]["agrees"] is agrees


def test_the_default_grid_is_one_a_minute_is_enough_for() -> None:
    """The tour's own grid: two dtypes, one row up to many, each case once, and a tolerance for
    each of its dtypes.
    """
    assert {c.dtype for c in demo.GRID} == {"float32", "bfloat16"} <= set(demo.AGREES)
    assert {c.rows for c in demo.GRID} >= {1, 512}
    assert len(set(demo.GRID)) == len(demo.GRID) <= 16
