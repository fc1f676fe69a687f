"""`lntune export-log` and `lntune import`: the T4 auto-tuning format, as its schemas have it, and
back without a loss of what it can carry.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from any_records import any_record
from hypothesis import HealthCheck, given, settings
from test_prune import a_trial
from typer.testing import CliRunner

from lntune import schedule
from lntune.cli import app
from lntune.errors import InputError
from lntune.log import records, t4
from lntune.log.records import Timing

jsonschema = pytest.importorskip("jsonschema")  # of the extra `test`
SCHEMAS = {
    name: json.loads((Path(__file__).parent / f"t4_schema/{name}-schema.json").read_text())
    for name in ("results", "metadata")
}
KERNEL_TUNERS: dict[str, Any] = {
    "results": [
        {
            "timestamp": "2023-12-21 10:44:42.236642+00:00",
            "configuration": {"lanes": 4},
            "times": {
                "compilation_time": 661.5,
                "framework": 53.1,
                "search_algorithm": 0,
                "validation": 0,
                "runtimes": [12.25, 12.5, 12.75],
            },
            "invalidity": "correct",
            "correctness": 1,
            "measurements": [{"name": "time", "value": 12.5, "unit": "ms"}],
            "objectives": ["time"],
        },
        {
            "timestamp": "2023-12-21 10:44:43.236642+00:00",
            "configuration": {"lanes": 3},
            "times": {"runtimes": []},
            "invalidity": "compile",
            "correctness": 1,
        },
    ],
    "schema_version": "1.0.0",
}
"""As Kernel Tuner writes them."""


def run(*words: object) -> dict[str, Any]:
    """What a command that must succeed says as JSON."""
    done = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert done.exit_code == 0, done.output
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


@settings(deadline=None, max_examples=80, suppress_health_check=list(HealthCheck))
@given(record=any_record)
def test_what_t4_carries_comes_back(record: records.Record) -> None:
    """Every field of a trial but other contenders' times is the same afterwards, to the last digit
    of its times; the file is as the schema has it.
    """
    trial = msgspec.structs.replace(record, role="trial", default=None)
    if tuned := trial.timings.get("tuned"):
        trial = msgspec.structs.replace(trial, timings={"tuned": tuned})
    else:
        trial = msgspec.structs.replace(trial, timings={})
    ((_, file),) = t4.files([trial]).items()
    text = t4.encoded(file)
    jsonschema.validate(json.loads(text), SCHEMAS["results"])
    back = t4.decoded(text)
    assert back.lntune is not None
    assert t4.trial(back.results[0], back.lntune) == trial


def test_a_log_goes_out_and_comes_home(tmp_path: Path) -> None:
    """`lntune export-log` writes a file a case and schedule, and one of the machine, all as the
    schemas have them; `lntune import` adds its trials to a log, once; finals are said to be lost.
    """
    log = [
        a_trial(1, timings={"tuned": Timing((1.1, 1.2), 1.15)}, clocks=(1, 2), noticed=("a", "b")),
        a_trial(2, status="compile", timings={}, busy=False, time="2026-01-02"),
        a_trial(3, threads=1, time="2026-01-03"),
    ]
    for record in (*log, a_trial(4, role="final")):
        records.append(tmp_path / "logs", record)
    out = tmp_path / "out"
    facts = run("export-log", tmp_path / "logs", "-o", out)
    assert (facts["trials"], facts["lost"], len(facts["files"])) == (3, {"final": 1}, 2)
    for name in facts["files"]:
        jsonschema.validate(json.loads((out / name).read_text()), SCHEMAS["results"])
    (beside,) = out.glob("*/metadata.json")
    jsonschema.validate(json.loads(beside.read_text()), SCHEMAS["metadata"])
    home = tmp_path / "home"
    assert run("import", out, "--log-dir", home) == {
        "log": str(home),
        "added": 3,
        "known": 0,
        "left_out": [],
    }
    assert sorted(records.read([home]), key=lambda r: r.time) == log
    assert run("import", out, "--log-dir", home)["added"] == 0
    again = CliRunner().invoke(app, ["export-log", str(tmp_path / "logs"), "-o", str(out)])
    assert again.exit_code == 2 and "which is there" in again.output


def test_kernel_tuners_own_files(tmp_path: Path) -> None:
    """A file of Kernel Tuner's is taken where options say what it is of; knobs that the schedule
    does not take are left out, with the reason.
    """
    path, home = tmp_path / "results.json", tmp_path / "home"
    jsonschema.validate(KERNEL_TUNERS, SCHEMAS["results"])
    path.write_text(json.dumps(KERNEL_TUNERS))
    words = ["import", str(path), "--log-dir", str(home)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and "which does not say what it is of" in done.output
    of = ["--op", "layer_norm", "--hidden", 64, "--schedule", "cached_rows"]
    facts = run(*words, *of)
    assert facts["added"] == 1
    (left_out,) = facts["left_out"]
    assert left_out["line"] == 2 and "knob lanes: got 3" in left_out["why"]
    (record,) = records.read([home])
    assert record.timings["tuned"] == Timing((12250.0, 12500.0, 12750.0), 12500.0)
    assert record.knobs == {"lanes": 4}
    some = CliRunner().invoke(app, [*words, "--op", "layer_norm"])
    assert some.exit_code == 2 and "all or none" in some.output


@pytest.mark.parametrize(
    "text", [b"", b"[]", b'{"results": 1}', b"[" * 100_000, b'{"results": [{}]}', b"\xff"]
)
def test_what_is_no_file_of_t4(text: bytes) -> None:
    """Anything else is refused with what was expected."""
    with pytest.raises(InputError, match="expected a file in the T4 auto-tuning format"):
        t4.decoded(text)


def test_a_strangers_names(tmp_path: Path) -> None:
    """Names of schedules and variants that lead elsewhere become plain names of files."""
    case = msgspec.structs.replace(a_trial().case, variant="../../x")
    (name,) = t4.files([a_trial(case=case, schedule="/etc/passwd")])
    assert (tmp_path / name).resolve().parent.parent == tmp_path.resolve()
    assert schedule.get("cached_rows").name in next(iter(t4.files([a_trial()])))
