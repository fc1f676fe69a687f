"""bench/calibration.py: how often verdicts are wrong, on a few families of each kind."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import msgspec
import numpy
import pytest

from lntune.case import Case
from lntune.device import Device
from lntune.log.records import Record, Timing

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "calibration.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bench/calibration.py as a module, with few families."""
    spec = importlib.util.spec_from_file_location("calibration", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "calibration", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FAMILIES", 5)
    monkeypatch.setattr(module, "CASES", 12)
    return module


def run(seed: int, faster: float = 0.0) -> list[Record]:
    """What --record writes, made up; "again" is `faster` by a share."""
    rng = numpy.random.default_rng(seed)
    records = []
    for hidden in (64, 128, 256):
        timings = {}
        for name, us in (("tuned", 10.0), ("again", 10 / (1 + faster)), ("eager", 20), ("copy", 5)):
            times = us * numpy.exp(rng.normal(0, 0.02, 200))
            timings[name] = Timing(tuple(times.tolist()), float(numpy.median(times)))
        records.append(
            Record(
                role="bench",
                case=Case("layer_norm", hidden, "float32", 512),
                device=Device("cpu", "made up", "x86-64-v4", 2),
                threads=2,
                schedule="cached_rows",
                knobs={},
                status="ok",
                timings=timings,
                busy=False,
            )
        )
    return records


def test_what_is_the_same_is_not_called_different(script: ModuleType) -> None:
    """Without a difference no simulated family is wrong, paired or between runs; of paired ones
    with a thousand rounds most of 3 % are found.
    """
    paired = script.simulated_pairs(1000, 0.0).facts
    assert paired["wrong"] == paired["families_wrong"] == 0
    assert paired["found"] > 0.9
    assert script.simulated_runs(0.05, 0.01).facts["wrong"] == 0


def test_kernels_of_shipped_runs(script: ModuleType) -> None:
    """There are kernels that two of the shipped runs have in common, and none is called faster or
    slower than itself.
    """
    facts = script.shipped().facts
    assert facts["families"] >= 5
    assert facts["wrong"] == 0


def test_a_difference_where_there_should_be_none_shows(script: ModuleType) -> None:
    """Recorded sides that are not the same kernel count as wrong verdicts: the figures do not come
    from the script's own expectations.
    """
    found = script.certainty.verdicts(script.paired_in(run(1, faster=0.1)))
    outcome = script.Outcome("recorded", "paired", 200, [list(found)], [])
    assert outcome.facts["wrong"] == outcome.facts["families_wrong"] == 1


def test_the_table_and_the_figures(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command prints a row for each kind, simulated, resampled and recorded, and writes the
    same as JSON; two recorded runs are also compared with each other.
    """
    files = [tmp_path / "morning.json", tmp_path / "evening.json"]
    for seed, path in enumerate(files):
        path.write_bytes(msgspec.json.encode({"records": run(seed)}))
    for name, value in (("ROUNDS", (30,)), ("OWN", (0.0,)), ("MOVED", (0.0,)), ("PLACED", (0.01,))):
        monkeypatch.setattr(script, name, value)
    output = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["calibration", *map(str, files), "--output", str(output)])
    script.main()
    printed = capsys.readouterr().out
    kinds = [row["kind"] for row in json.loads(output.read_text())["cases"]]
    assert [kind.split(",")[0] for kind in kinds] == [
        *("simulated", "simulated"),
        "recorded",
        *("resampled from morning", "recorded", "resampled from evening", "recorded"),
        "recorded",
    ]
    assert all(kind in printed for kind in kinds)
