"""The README's table of gains: what other work disturbed is not quoted, whatever was thought of it
when it was measured.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results" / "amd-epyc-x86-64-v4-2c"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """The results of one CPU, to be changed."""
    shutil.copytree(RESULTS, tmp_path / "results" / RESULTS.name)
    return tmp_path / "results"


def change(results: Path, name: str, how: Any) -> None:
    """Put a file of results through a function."""
    path = results / RESULTS.name / name
    facts = json.loads(path.read_text())
    how(facts)
    path.write_text(json.dumps(facts))


def line(script: ModuleType, results: Path, begins: str) -> str:
    """A line of the table, without its name."""
    (table_row,) = [
        row for row in script.markdown(results).splitlines() if row.startswith(f"| {begins} |")
    ]
    return str(table_row.split("|")[2].strip())


def stretched(facts: dict[str, Any]) -> None:
    """Half of eager's samples of 1x1024 in float32 are of a scheduler's turn, as where others have
    the cores.
    """
    record = next(
        r
        for r in facts["records"]
        if (r["case"]["hidden"], r["case"]["rows"], r["case"]["dtype"]) == (1024, 1, "float32")
    )
    samples = record["timings"]["eager"]["samples_us"]
    record["timings"]["eager"] = {
        "samples_us": [8000.0 if i % 3 else s for i, s in enumerate(samples)],
        "median_us": 8000.0,
    }
    assert not record["busy"]


def test_a_disturbed_case_is_not_quoted(script: ModuleType, results: Path) -> None:
    """It is named as that in place of its figures, and is in no mean: the records count, not what
    was made of them when they were taken.
    """
    case, mean = "layer norm, float32, 1x1024", "geomean, layer norm"
    assert "x" in line(script, results, case)
    before = line(script, results, mean)
    assert before.endswith("x of 47, 1 disturbed")
    change(results, "layer_norm.json", stretched)
    assert line(script, results, case) == "disturbed"
    assert line(script, results, mean).endswith("x of 46, 2 disturbed")


def test_all_are_disturbed(script: ModuleType, results: Path) -> None:
    """Then there is no mean, and the others' stays."""
    change(
        results, "layer_norm.json", lambda facts: [r.update(busy=True) for r in facts["records"]]
    )
    assert line(script, results, "geomean, layer norm") == "48 disturbed"
    assert line(script, results, "geomean, layer norm backward").endswith("x of 36")


def test_a_disturbed_iteration_is_not_quoted(script: ModuleType, results: Path) -> None:
    """A training iteration that was measured beside other work is named as that."""
    name = "LN-LSTM training iteration, float32, 32x512"
    assert " ms, " in line(script, results, name)
    change(results, "lnlstm_training.json", lambda facts: facts["results"][0].update(busy=True))
    assert line(script, results, name) == "disturbed"
