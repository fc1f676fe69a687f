"""The README's plots: drawn of the committed results, small, and as they would be drawn today."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
NAMES = ("speedups.svg", "lstm_scaling.svg")
LARGEST = 200_000


def words(path: Path) -> list[str]:
    """What is written in an SVG: matplotlib notes each text that it draws in a comment."""
    return re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"), re.DOTALL)


def test_the_readme_shows_them(script: ModuleType) -> None:
    """Both, and they are small enough for a page."""
    shown = re.findall(r"!\[[^]]+\]\(bench/results/(.*?)\)", README.read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(script.PLOTS) == sorted(NAMES)
    for name in NAMES:
        assert (script.RESULTS / name).stat().st_size <= LARGEST


@pytest.mark.parametrize("name", NAMES)
def test_they_are_drawn_of_the_results(script: ModuleType, tmp_path: Path, name: str) -> None:
    """What is written in a committed plot is what is written in one drawn now."""
    script.PLOTS[name](script.RESULTS, tmp_path / name)
    assert words(tmp_path / name) == words(script.RESULTS / name)
    assert {"hidden 512", "rows"} & set(words(tmp_path / name))


def test_what_changed_is_said(script: ModuleType, tmp_path: Path) -> None:
    """A plot of other figures than it shows is named; that of the same is not."""
    results = tmp_path / "results"
    shutil.copytree(script.RESULTS / script.CPU, results / script.CPU)
    for name, draw in script.PLOTS.items():
        draw(results, results / name)
    path = results / script.CPU / "layer_norm.json"
    facts = json.loads(path.read_text())
    for record in facts["records"]:
        for timing in (record["timings"]["eager"], record["timings"]["compile"]):
            timing["samples_us"] = [2 * us for us in timing["samples_us"]]
    path.write_text(json.dumps(facts))
    assert script.changed(results) == ["speedups.svg"]


def iteration(sequence: int, batch: int, **fields: Any) -> dict[str, Any]:
    """A result of bench/lnlstm_training.py."""
    ms = {"eager modules": 3.0, "TorchScript": 2.0, "lntune": 1.0}
    rows = [{"contender": name, "ms": sequence * batch * each} for name, each in ms.items()]
    plain = {"dtype": "float32", "busy": False, "sequence": sequence, "batch": batch, "rows": rows}
    return {**plain, **fields}


def test_iterations_of_several_sizes(script: ModuleType) -> None:
    """A line for each batch, in the order of sequences, against the best of PyTorch's ways; neither
    what was disturbed nor another dtype is in it.
    """
    results = [iteration(s, b) for s, b in ((20, 8), (10, 8), (10, 1), (20, 1))]
    results += [iteration(40, 8, busy=True), iteration(30, 8, dtype="bfloat16")]
    one, eight = script.iterations(results, "float32")
    assert (one.name, eight.name) == ("batch 1", "batch 8")
    assert eight.sizes == [10, 20]
    assert eight.ours == [80.0, 160.0]
    assert eight.theirs == [160.0, 320.0]


def test_how_training_scales_is_drawn_where_it_was_measured(
    script: ModuleType, tmp_path: Path
) -> None:
    """With lnlstm_scaling.json of any CPU there is a panel of iterations for each dtype, and its
    CPU is named.
    """
    shutil.copytree(script.RESULTS / script.CPU, tmp_path / script.CPU)
    results = [iteration(s, b, dtype=d) for d in script.DTYPES for s in (10, 100) for b in (1, 77)]
    facts = {
        "settings": {"hidden": 256, "layers": 1, "input": 5},
        "name": "another-cpu",
        "time": "2026-01-02T03:04:05",
        "results": results,
    }
    (tmp_path / "another").mkdir()
    (tmp_path / "another" / "lnlstm_scaling.json").write_text(json.dumps(facts))
    script.draw_scaling(tmp_path, tmp_path / "a.svg")
    drawn = words(tmp_path / "a.svg")
    assert {"training iteration, hidden 256, bfloat16", "batch 77", "sequence"} <= set(drawn)
    assert "another-cpu, 2026-01-02" in "".join(drawn)
