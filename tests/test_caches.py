"""What is told of a cold cache: by a record, by `lntune report --cold` and `lntune compare
--cold`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from made_up_records import bench_file, record, rival, samples
from typer.testing import CliRunner

from lntune.cli import app
from lntune.device import Device
from lntune.log import caches, records
from lntune.log.decision import Advantage, Decision
from lntune.log.records import Timing

RUNNER = CliRunner()
COLD = {"tuned": samples(80, seed=5), "eager": samples(120, seed=6), "copy": samples(90, seed=7)}
DECISION = Decision(
    "better", "time", Advantage(1.04, 1.02, 1.06, "FASTER"), runner_up=0, over_eager=None
)


def test_a_record_of_a_cold_cache() -> None:
    """Its cold timings stand in the place of the others, those of rivals too; rivals without one
    are left out. One without samples stands for the warm one.
    """
    cold_rival = msgspec.structs.replace(rival("widened_rows", samples(55)), cold=samples(85))
    made = record(cold=COLD, rivals=(cold_rival, rival("plain", samples(70))))
    cold = caches.cold(made)
    assert cold is not None
    assert cold.timings == COLD and cold.key == made.key
    assert [(r.schedule, r.timing) for r in cold.rivals] == [("widened_rows", samples(85))]
    beyond = {name: Timing((), t.median_us) for name, t in made.timings.items()}
    cold = caches.cold(msgspec.structs.replace(made, cold=beyond))
    assert cold is not None and cold.timings == made.timings


def test_what_has_no_cold_timings() -> None:
    """A record of before has none, and one of a GPU is of a cold cache as it is."""
    assert caches.cold(record()) is None
    gpu = record(device=Device("gpu", "Some GPU", "sm_90", 132, backend="cuda"), warm=COLD)
    assert caches.cold(gpu) is gpu


def test_old_records_are_read(tmp_path: Path) -> None:
    """Lines without cold timings, decision and notices, as earlier releases wrote them, are records
    whose fields are empty; and an earlier release finds all that it knows in a line of today.
    """
    path = records.log_path(tmp_path, record().device, "layer_norm")
    path.parent.mkdir(parents=True)
    new = {"cold", "warm", "decision", "noticed"}
    plain = msgspec.to_builtins(record(rivals=(rival("plain", samples(70)),)))
    for one in (plain, *plain["rivals"]):
        for name in new & one.keys():
            del one[name]
    path.write_bytes(msgspec.json.encode(plain) + b"\n")
    (old,) = records.read([tmp_path])
    assert (old.cold, old.warm, old.decision, old.noticed) == ({}, {}, None, ())
    assert old.rivals[0].cold is None
    today = msgspec.to_builtins(record(cold=COLD, decision=DECISION, noticed=("heat",)))
    assert {name: today[name] for name in plain if name != "rivals"} == {
        name: plain[name] for name in plain if name != "rivals"
    }
    assert records.SCHEMA == 3


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Two cases of a device, of which one was measured with a cold cache too."""
    folder = tmp_path / "log"
    records.append(folder, record(cold=COLD, decision=DECISION))
    records.append(folder, record(hidden=768))
    return folder


def run(*words: object) -> str:
    """What a command prints."""
    result = RUNNER.invoke(app, [*map(str, words)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_report_of_a_cold_cache(log: Path) -> None:
    """The figures are of the cold cache, of the cases that have some, and the table says so; the
    command that prints it again has the option.
    """
    words = ("report", "--device", "some-x86", "--log-dir", log)
    (found,) = json.loads(run(*words, "--cold", "--json"))
    assert [(c["hidden"], c["tuned_us"], c["eager_us"]) for c in found["cases"]] == [
        (1024, COLD["tuned"].median_us, COLD["eager"].median_us)
    ]
    assert found["cases"][0]["speedup"] == pytest.approx(1.5, rel=0.02)
    assert "--cold" in found["again"]
    text = run(*words, "--cold")
    assert "with nothing of it in a cache" in text and " 768 " not in text
    assert "in a cache" not in run(*words)


def test_report_says_how_certain_winners_are(log: Path) -> None:
    """The verdict and the ratio of a winner over its runner-up, where a record has them."""
    words = ("report", "--device", "some-x86", "--log-dir", log)
    (found,) = json.loads(run(*words, "--json"))
    told = [
        "winner",
        "decided_by",
        "over_runner_up",
        "over_runner_up_low",
        "over_runner_up_high",
    ]
    assert [[c[name] for name in told] for c in found["cases"]] == [
        ["", "", None, None, None],
        ["better", "time", 1.04, 1.02, 1.06],
    ]
    assert "better 1.04x" in run(*words)


@pytest.mark.parametrize("beside", ["--history", "--html", "--plot"])
def test_cold_figures_are_a_table(beside: str, log: Path, tmp_path: Path) -> None:
    """A history, a page or a plot of them is refused, with what there is."""
    file = [] if beside == "--history" else [tmp_path / "out.svg"]
    words = ["report", "--cold", "--log-dir", log, beside, *file]
    result = RUNNER.invoke(app, [*map(str, words)])
    assert result.exit_code != 0
    assert "--cold" in result.output


def test_no_cold_figures(tmp_path: Path) -> None:
    """Where no case was measured with a cold cache, this is what is said."""
    records.append(tmp_path, record())
    words = ["report", "--cold", "--device", "some-x86", "--log-dir", tmp_path]
    result = RUNNER.invoke(app, [*map(str, words)])
    assert result.exit_code == 1
    assert "no measurements with a cold cache" in result.output


def compared(*words: object) -> list[dict[str, Any]]:
    """The cases of a comparison."""
    return [*json.loads(run("compare", *words, "--json"))["cases"]]


def test_compare_with_a_cold_cache(log: Path, tmp_path: Path) -> None:
    """Sides of the log and files are compared by what was measured with a cold cache."""
    words = ("eager", "tuned", "--all-devices", "--log-dir", log)
    (cold,) = compared(*words, "--cold")
    assert cold["case"]["hidden"] == 1024
    assert cold["ratio"] == pytest.approx(1.5, rel=0.01)
    warm = {c["case"]["hidden"]: c["ratio"] for c in compared(*words)}
    assert warm == pytest.approx({1024: 2.0, 768: 2.0}, rel=0.01)
    slower = {name: samples(2 * t.median_us, seed=9) for name, t in COLD.items()}
    one = bench_file(tmp_path / "one.json", [record(cold=COLD)])
    other = bench_file(tmp_path / "other.json", [record(cold=slower)])
    (case,) = compared(one, other, "--cold")
    assert (case["a"]["us"], case["b"]["us"]) == pytest.approx((80, 160), rel=0.01)


def test_compare_without_cold_measurements(tmp_path: Path) -> None:
    """What is missing is named."""
    records.append(tmp_path, record())
    words = ["compare", "eager", "tuned", "--all-devices", "--cold", "--log-dir", tmp_path]
    result = RUNNER.invoke(app, [*map(str, words)])
    assert result.exit_code != 0
    assert "with a cold cache" in result.output
