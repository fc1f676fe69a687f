"""The benchmark of TVM's own tuner: what it says was tried is what the log has, and what it leaves
is what it prints.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from made_up_records import samples

from lntune import device, schedule, tune
from lntune.case import Case
from lntune.log import records
from lntune.log.records import Record, Rival


def made_up(cases: Sequence[Case], settings: tune.Settings, _: Any) -> tune.Summary:
    """A run in which MetaSchedule's kernel takes 20 us, and ours 10."""
    (case,) = cases
    assert settings.log_dir is not None
    ours, theirs = settings.schedules[0], settings.schedules[-1]
    knobs = {name: schedule.get(name).knobs().__dict__ for name in (ours, theirs)}
    for name, status in ((ours, "ok"), (theirs, "ok"), (theirs, "wrong")):
        records.append(settings.log_dir, of(case, name, knobs[name], status=status))
    rival = Rival(theirs, knobs[theirs], samples(20, seed=1), schedule.get(theirs).code)
    records.append(
        settings.log_dir, of(case, ours, knobs[ours], role="final", status="ok", rivals=(rival,))
    )
    summary = tune.Summary()
    summary.notes.append("a note")
    return summary


def of(case: Case, name: str, knobs: dict[str, Any], status: Any, **fields: Any) -> Record:
    """A record of this CPU."""
    timings = {"tuned": samples(10 if name == "cached_rows" else 20)} if status == "ok" else {}
    return Record(
        case=case,
        device=device.current(),
        threads=2,
        schedule=name,
        code=schedule.get(name).code,
        knobs=knobs,
        status=status,
        timings=timings,
        busy=False,
        **fields,
    )


def test_what_is_left_is_what_was_found(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Candidates by what came of them, the best of each, notes, and the comparison's verdict."""
    monkeypatch.setattr(tune, "tune", made_up)
    script.main(["--cases", "1", "--seconds", "7", "--output", str(tmp_path)])
    text = (tmp_path / "metaschedule.txt").read_text()
    assert text.startswith("7 s a case")
    assert "metaschedule: 2 candidates (1 ok, 1 wrong), best trial 20.0 us" in text
    assert "cached_rows: 1 candidate (1 ok), best trial 10.0 us" in text and "a note" in text
    assert "FASTER" in text and "FASTER" in capsys.readouterr().out
    facts = json.loads((tmp_path / "metaschedule.json").read_text())
    assert facts["seconds"] == 7 and set(facts["compared"]) == {"layer_norm"}


def test_every_operator_has_a_contender(script: ModuleType) -> None:
    """Cases are of operators that MetaSchedule is tried on, each case once."""
    assert len(set(script.CASES)) == len(script.CASES)
    assert script.contender("lnlstm_step") == "metaschedule_step"
