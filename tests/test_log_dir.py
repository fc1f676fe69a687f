"""`--log-dir`: that folder of tuning logs and no other; what is no such folder is an error. And
whose records `report` shows.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner, Result

from lntune import device, knobs, schedule
from lntune.case import Case
from lntune.cli import app, base
from lntune.errors import InputError
from lntune.log import records
from lntune.log.records import Record, Timing
from lntune.system import paths
from lntune.versions import Code

HERE = device.current()
CASE = Case("layer_norm", 96, "float32", 8)
READING = {
    "report": ["report"],
    "why": ["why", "layer_norm", "--hidden", "96"],
    "show": ["show", "layer_norm", "--hidden", "96", "--as", "te"],
    "check": ["check", "layer_norm"],
    "build": ["build", "layer_norm", "--hidden", "96", "--dtype", "float32", "--rows", "8"],
    "bench": [
        "bench",
        "--hidden",
        "96",
        "--dtype",
        "float32",
        "--rows",
        "8",
        "--no-compile",
        "--time",
        "1ms",
    ],
}


def final(hidden: int = CASE.hidden, **changes: Any) -> Record:
    """A final of the default knobs on this device."""
    case = msgspec.structs.replace(CASE, hidden=hidden)
    plan = schedule.get("cached_rows")
    timings = {name: Timing((us,), us) for name, us in (("tuned", 1.0), ("eager", 2.0))}
    setting = knobs.to_dict(plan.default(case, HERE))
    fields = {"code": plan.code, "knobs": setting, "device": HERE, "time": "2026-01-01", **changes}
    return Record(
        role="final",
        case=case,
        threads=1,
        schedule="cached_rows",
        status="ok",
        timings=timings,
        **fields,
    )


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of shipped logs with a final of this device, in place of those that are shipped."""
    folder = tmp_path / "shipped"
    monkeypatch.delenv("LNTUNE_SHIPPED_LOGS")
    records.append(folder, final(64))
    real = paths.content
    monkeypatch.setattr(
        paths, "content", lambda name: folder if name == "tuning_logs" else real(name)
    )
    return folder


def run(*arguments: Any) -> Result:
    """The command's result."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


def sizes(*arguments: Any) -> list[int]:
    """The hidden sizes in the report."""
    done = run("report", "--json", *arguments)
    return [case["hidden"] for table in json.loads(done.stdout) for case in table["cases"]]


def test_that_folder_and_no_other(shipped: Path, log_dir: Path, tmp_path: Path) -> None:
    """Shipped logs are read beside LNTUNE_LOG_DIR, and not beside --log-dir."""
    records.append(log_dir, final(128))
    records.append(tmp_path / "mine", final(96))
    assert sizes() == [64, 128]
    assert sizes("--log-dir", tmp_path / "mine") == [96]
    choice = json.loads(
        run(
            "why",
            "layer_norm",
            "--hidden",
            64,
            "--rows",
            8,
            "--log-dir",
            tmp_path / "mine",
            "--json",
        ).stdout
    )
    assert choice["tier"] == "near"  # the final of 64 itself is in the other folders
    assert "LNTUNE_SHIPPED_LOGS" not in os.environ and os.environ["LNTUNE_LOG_DIR"] == str(log_dir)


def test_an_empty_folder_has_nothing(shipped: Path, tmp_path: Path) -> None:
    """It is no reason to show the shipped table: exit code 1, and the folder is named."""
    (tmp_path / "empty").mkdir()
    done = run("report", "--log-dir", tmp_path / "empty")
    assert (
        done.exit_code == 1
        and done.stdout == ""
        and str(tmp_path / "empty") in done.stderr
        and str(shipped) not in done.stderr
    )


@pytest.mark.parametrize("command", READING)
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "which is not there"),
        ("file", "a file"),
        ("log/device", "the folder of one device"),
    ],
)
def test_what_is_no_folder_of_logs_is_an_error(
    command: str, name: str, reason: str, shipped: Path, tmp_path: Path
) -> None:
    """A folder that does not exist, a file, or one device's folder: said, with exit code 2, by
    every command that reads logs.
    """
    (tmp_path / "file").write_text("")
    (tmp_path / "log" / "device").mkdir(parents=True)
    (tmp_path / "log" / "device" / "layer_norm.jsonl").write_text("")
    done = run(*READING[command], "--log-dir", tmp_path / name)
    assert done.exit_code == 2 and f"--log-dir: got {tmp_path / name}, {reason}" in done.stderr, (
        done.output
    )
    assert "expected a folder of tuning logs" in done.stderr


def test_a_variable_that_names_a_file(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LNTUNE_LOG_DIR may name a folder that is to be made, and not a file."""
    monkeypatch.setenv("LNTUNE_LOG_DIR", str(tmp_path / "not yet"))
    assert sizes() == [64]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LNTUNE_LOG_DIR", str(tmp_path / "file"))
    done = run("report")
    assert done.exit_code == 2 and "LNTUNE_LOG_DIR: got" in done.stderr


def test_a_folder_that_will_be_written(tmp_path: Path) -> None:
    """Commands that tune make their folder; a file in its place is an error for them, too."""
    with base.using_logs(tmp_path / "new", may_be_new=True):
        assert paths.log_dirs() == [tmp_path / "new"]
    (tmp_path / "file").write_text("")
    for command in (["demo"], ["bringup"], ["tune"]):
        done = run(*command, "--log-dir", tmp_path / "file")
        assert done.exit_code == 2 and str(tmp_path / "file") in done.stderr


@pytest.mark.parametrize("command", ["demo", "bringup"])
def test_a_folder_need_not_be_there(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`demo` and `bringup` go on to their work where the folder is still to be made."""
    seen: list[Path] = []

    def begun(*_: Any, **__: Any) -> None:
        seen.append(paths.log_dir())
        raise InputError("enough")

    monkeypatch.setattr(f"lntune.commands.{command}.run", begun)
    done = run(command, "--log-dir", tmp_path / "new")
    assert done.exit_code == 2 and "enough" in done.stderr and seen == [tmp_path / "new"]


def test_report_shows_this_device_only(log_dir: Path) -> None:
    """Another generation of the same name, whose old records lie in a folder of the same name, is
    another device.
    """
    old = msgspec.structs.replace(HERE, model="")
    records.append(
        log_dir, final(64, device=msgspec.structs.replace(old, l1=HERE.l1 + 1, l2=HERE.l2 + 1))
    )
    records.append(log_dir, final(128, device=old))
    records.append(log_dir, final(256))
    tables = json.loads(run("report", "--json", "--log-dir", log_dir).stdout)
    assert [t["device"] for t in tables] == [HERE.slug] and [
        c["hidden"] for c in tables[0]["cases"]
    ] == [128, 256]
    everywhere = json.loads(run("report", "--json", "--all-devices", "--log-dir", log_dir).stdout)
    assert sorted((t["device"], [c["hidden"] for c in t["cases"]]) for t in everywhere) == sorted(
        [(old.slug, [64]), (old.slug, [128]), (HERE.slug, [256])]
    )


def test_report_marks_what_is_stale(log_dir: Path) -> None:
    """A record whose schedule has changed since carries a mark that a line explains, and says so to
    machines; what serves is what is shown.
    """
    records.append(log_dir, final(64, code=Code("0123456789ab")))
    records.append(log_dir, final(96))
    records.append(log_dir, final(96, time="2026-05-01", busy=True, knobs={}))
    (table,) = json.loads(run("report", "--json", "--log-dir", log_dir).stdout)
    assert [(c["hidden"], c["stale"], c["disturbed"]) for c in table["cases"]] == [
        (64, True, ""),
        (96, False, ""),
    ]
    assert table["summary"]["stale"] == 1
    shown = run("report", "--log-dir", log_dir).stdout
    assert "1.00!" in shown and "! 1 stale, measured before the schedule changed" in shown
