"""The benchmark of trials: candidates are tried as tuning tries them, and their parts are said."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from lntune.case import Case


def test_a_small_run(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every trial but the first of either worker counts, all parts have a time, passes are those
    that lower a kernel, times made beside others are compared with those made alone, and the files
    hold what is shown.
    """
    monkeypatch.setitem(script.SIZES, "layer_norm", ((48, "float32", 4),))
    monkeypatch.setattr(script, "BUILT_BESIDE", ("layer_norm", 49, "float32", 4))
    monkeypatch.setattr(script, "TURNS", 1)
    monkeypatch.setattr(script, "TIMED_AGAIN", 1)
    app = script.typer.Typer()
    app.command()(script.main)
    options = ["--op", "layer_norm", "--candidates", "2", "--workers", "2"]
    options += ["--output", str(tmp_path)]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    facts = json.loads((tmp_path / "trial_speed.json").read_text())
    (row,) = facts["results"]
    assert row["ok"] == len(row["trials"]) + 2 == 4
    assert facts["rates"]["layer_norm"] == pytest.approx(2 / sum(row["trials"]))
    assert set(row["parts"]) == set(script.PARTS)
    assert all(ms > 0 for ms in row["parts"].values())
    assert "tirx.CommonSubexprElim" in row["passes"]
    assert sum(row["passes"].values()) > 0
    shown = (tmp_path / "trial_speed.txt").read_text()
    assert shown.strip() == done.output.strip()
    assert "verified trials a second" in shown and "2 workers on" in shown
    assert len(row["beside"]) == len(row["again"]) == 1 and row["beside"][0] > 0
    assert "timed while others build, as a share of the time alone, of 1 candidate: median" in shown


def test_a_seed_draws_the_same(script: ModuleType) -> None:
    """So that two versions of lntune are compared on the same candidates."""
    case = Case("layer_norm", 256, "float32", 32)
    one, same, other = (script.candidates_of(case, 6, seed) for seed in (0, 0, 1))
    assert one == same != other
    assert len(set(one)) == 6
