"""The benchmark of large logs: what it makes up is a log like any other, and what it measures is
said.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from lntune import device, schedule
from lntune.log import records, select


@pytest.fixture(scope="module")
def log(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up log of 1,000 records."""
    folder = tmp_path_factory.mktemp("log")
    script.make(folder, 1000, seed=3)
    return folder


def test_a_made_up_log_is_a_log(script: ModuleType, log: Path) -> None:
    """Every line is a record of this CPU; trials, failures and finals are as many as is said, and
    each final's knobs can serve its case.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = records.read([log])
    roles = Counter(r.role for r in made)
    assert len(made) == 1000
    assert {r.device for r in made} == {device.current()}
    assert 0 < roles["final"] <= 1000 / script.FINAL_OF
    assert 0 < sum(r.status != "ok" for r in made) < 0.1 * roles["trial"]
    finals = [r for r in made if r.role == "final"]
    assert {len(t.samples_us) for r in finals for t in r.timings.values()} == {script.FINAL_SAMPLES}
    schedules = schedule.all_schedules()
    for record in select.served(finals, schedules).values():
        one = schedules[record.schedule]
        assert not select.stale(record, schedules)
        assert one.reason_invalid(one.setting(record.knobs), record.case, record.device) is None


def test_the_same_seed_makes_the_same_log(script: ModuleType, log: Path, tmp_path: Path) -> None:
    """To the byte; another seed another one."""
    for seed in (3, 4):
        script.make(tmp_path / str(seed), 1000, seed)
    (one,), (same,), (other,) = (
        list(folder.glob("*/layer_norm.jsonl")) for folder in (log, *sorted(tmp_path.iterdir()))
    )
    assert one.read_bytes() == same.read_bytes()
    assert one.read_bytes() != other.read_bytes()


def test_a_small_run(script: ModuleType, tmp_path: Path) -> None:
    """Each way has its rounds, shares are of decoding all, and the files hold what is shown."""
    app = script.typer.Typer()
    app.command()(script.main)
    done = CliRunner().invoke(app, ["--records", "300", "--rounds", "1", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    facts = json.loads((tmp_path / "log_speed.json").read_text())
    assert facts["results"][0]["what"] == script.DECODING
    assert facts["results"][0]["of_decoding"] == 1
    assert all(len(r["samples"]) == 1 and r["seconds"] > 0 for r in facts["results"])
    shown = (tmp_path / "log_speed.txt").read_text()
    assert shown.strip() == done.output.strip()
    assert all(r["what"] in shown for r in facts["results"])
