"""`lntune doctor`: what it finds on a sound machine, and what it says of each thing that can be
missing or broken.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from typer.testing import CliRunner

from lntune import device, schedule
from lntune.backends import cuda
from lntune.backends.cpu import runtime
from lntune.backends.cuda import driver
from lntune.case import Case
from lntune.cli import app
from lntune.commands import doctor
from lntune.commands.doctor import Finding
from lntune.kernels import direct
from lntune.log import records, select
from lntune.log.records import Record, Timing
from lntune.system import native, paths, sealed, toolchain
from lntune.torch import layer_norm_node, products
from lntune.versions import Code


@pytest.fixture(autouse=True)
def only_this_log(log_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Shipped logs are left out, and nothing remembered of schedules outlives a test."""
    monkeypatch.setattr(paths, "log_dirs", lambda: [log_dir])
    yield
    schedule._load.cache_clear()


def findings() -> dict[str, Finding]:
    """What the doctor finds, by topic."""
    results = doctor.examine()
    assert len({f.topic for f in results}) == len(results)
    return {f.topic: f for f in results}


def final(hidden: int = 1024, **fields: Any) -> Record:
    """A final of this device, of a schedule as it is now."""
    name = fields.setdefault("schedule", "cached_rows")
    known = schedule.all_schedules()
    values: dict[str, Any] = {
        "role": "final",
        "threads": 1,
        "knobs": {},
        "status": "ok",
        "timings": {"tuned": Timing((1.0,), 1.0)},
    }
    values |= {"code": known[name].code if name in known else Code(), **fields}
    return Record(
        case=Case("layer_norm", hidden, "float32", 512), device=device.current(), **values
    )


@pytest.mark.slow
def test_a_sound_machine() -> None:
    """Everything is looked at: versions, compiler, CPU, threads, GPU, folders, schedules, records;
    nothing fails here.
    """
    by_topic = findings()
    topics = {
        "python",
        "lntune",
        "apache-tvm",
        "apache-tvm-ffi",
        "torch",
        "C++ compiler",
        "cpu",
        "log folder name",
        "threads",
        "direct calls",
        "training",
        "matrix products",
    }
    topics |= {
        "gpu",
        "CUDA compiler",
        "tuning log",
        "kernel cache",
        "built kernels",
        "kernel checks",
        "temporary files",
        "environment",
        "bundle",
        "schedules",
        "tuned cases",
        "stale records",
        "disturbed records",
        "future records",
        "skipped records",
    }
    assert set(by_topic) == topics
    assert not [f for f in by_topic.values() if f.status == "fail"]
    assert by_topic["log folder name"].detail == device.current().slug
    assert (
        "LNTUNE_LOG_DIR" in by_topic["tuning log"].detail
        and os.environ["LNTUNE_LOG_DIR"] in by_topic["tuning log"].detail
    )
    assert "cached_rows" in by_topic["schedules"].detail
    assert (by_topic["tuned cases"].status, by_topic["tuned cases"].remedy) == (
        "warn",
        "Run: lntune tune layer_norm",
    )


def test_every_complaint_has_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever is not ok says what to do about it."""
    (tmp_path / "file").write_text("")
    for variable in ("LNTUNE_LOG_DIR", "LNTUNE_CACHE_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "file"))
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setattr(toolchain, "installed", lambda package: "not installed")
    bad = [f for f in doctor.examine() if f.status != "ok"]
    assert {"apache-tvm", "torch", "tuning log", "kernel cache", "C++ compiler", "threads"} <= {
        f.topic for f in bad
    }
    assert [f.topic for f in bad if not f.remedy] == []


@pytest.mark.parametrize(
    ("package", "version", "failing"),
    [
        ("torch", "not installed", {"torch", "threads"}),
        ("apache-tvm-ffi", "0.1.15", {"apache-tvm-ffi"}),
        ("apache-tvm", "0.28.0", {"apache-tvm"}),
    ],
)
def test_a_package_that_is_missing_or_does_not_fit(
    package: str, version: str, failing: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails under its own name with the version to install; the rest is still examined, and the
    exit code is 1.
    """
    real = toolchain.installed
    monkeypatch.setattr(
        toolchain, "installed", lambda name: version if name == package else real(name)
    )
    by_topic = findings()
    assert {t for t, f in by_topic.items() if f.status == "fail"} == failing
    assert by_topic[package].detail == version and "nstall" in by_topic[package].remedy
    if package == "torch":
        assert by_topic["gpu"].status == "warn" and "without torch" in by_topic["gpu"].detail
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 1
    facts = json.loads(done.stdout)
    assert (
        facts["ok"] is False
        and {f["topic"] for f in facts["findings"] if f["status"] == "fail"} == failing
    )


@pytest.mark.parametrize(
    ("slow", "onednn", "status", "word"),
    [
        (False, True, "ok", "own operators"),
        (True, True, "ok", "by oneDNN"),
        (True, False, "warn", "by MKL"),
    ],
)
def test_matrix_products(
    slow: bool, onednn: bool, status: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which library multiplies is said, and what to do where only the slow one is there."""
    monkeypatch.setattr(products, "mkl_is_slow", lambda: slow)
    monkeypatch.setattr(products, "_enabled", lambda: onednn)
    finding = findings()["matrix products"]
    assert (finding.status, word in finding.detail, bool(finding.remedy)) == (
        status,
        True,
        status == "warn",
    )


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a C++ compiler it fails and says that one must be installed or CXX set; one that does
    not run is named.
    """
    monkeypatch.setenv("CXX", "/no/such/compiler")
    finding = findings()["C++ compiler"]
    assert (
        finding.status == "fail"
        and "/no/such/compiler" in finding.remedy
        and "CXX" in finding.remedy
    )
    monkeypatch.setenv("CXX", "/bin/false")
    assert findings()["C++ compiler"].detail.startswith("does not run")


def test_unwritable_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A log or cache folder that cannot be written fails with the variable to set."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LNTUNE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    by_topic = findings()
    assert by_topic["tuning log"].status == "ok"
    assert (
        by_topic["kernel cache"].status == "fail"
        and "LNTUNE_CACHE_DIR" in by_topic["kernel cache"].remedy
    )


def test_tuned_cases_are_counted(log_dir: Path) -> None:
    """Cases tuned on this device are counted once each; records of other devices are not."""
    elsewhere = msgspec.structs.replace(device.current(), name="Other")
    for record in (
        final(64, time="1"),
        final(64, time="2"),
        final(128),
        msgspec.structs.replace(final(256), device=elsewhere),
    ):
        records.append(log_dir, record)
    by_topic = findings()
    assert (
        by_topic["tuned cases"].status == "ok"
        and by_topic["tuned cases"].detail == "2 on this device, hidden 64, 128"
    )
    assert (by_topic["stale records"].status, by_topic["stale records"].detail) == ("ok", "none")


def test_stale_records_are_a_warning(log_dir: Path) -> None:
    """Records whose schedule has changed since, or is gone, are counted; they still serve, so it is
    no failure.
    """
    for record in (final(64), final(128, code=Code("old")), final(256, schedule="gone")):
        records.append(log_dir, record)
    finding = findings()["stale records"]
    assert (
        finding.status == "warn"
        and finding.detail == "2 of 3: cached_rows, gone changed or went since they were measured"
    )
    assert (
        finding.remedy == "Run: lntune tune layer_norm --hidden 128,256 --dtype float32 --rows 512"
    )


def test_records_of_a_wrong_clock_are_a_warning(log_dir: Path) -> None:
    """A final dated 2038 is named, with what to do; one of today is not, nor is one of another
    generation of the same name.
    """
    old = msgspec.structs.replace(device.current(), model="", l1=1, l2=1)
    for record in (
        final(64, time="2026-01-01"),
        final(128, time="2038-01-19"),
        msgspec.structs.replace(final(256, time="2038-01-19"), device=old),
    ):
        records.append(log_dir, record)
    by_topic = findings()
    assert (
        by_topic["future records"].status == "warn"
        and "layer_norm 512x128 float32 of 2038-01-19" in by_topic["future records"].detail
    )
    assert (
        by_topic["future records"].remedy
        == "Set the clock. Run: lntune tune layer_norm --hidden 128 --dtype float32 --rows 512"
    )
    assert by_topic["tuned cases"].detail.startswith("2 on this device")


def test_disturbed_records_are_a_warning(log_dir: Path) -> None:
    """A case that has only a disturbed measurement is named; one that has a quiet one too is
    not.
    """
    for record in (final(64, busy=True), final(128, time="1"), final(128, time="2", busy=True)):
        records.append(log_dir, record)
    finding = findings()["disturbed records"]
    assert finding.detail.startswith("1 of 2 ") and "--hidden 64 " in finding.remedy


def test_lines_that_cannot_be_used_are_a_warning(log_dir: Path) -> None:
    """Corrupt lines and newer schemas are counted and named with file and line; the good records
    count all the same.
    """
    records.append(log_dir, final(64))
    path = records.log_path(log_dir, device.current(), "layer_norm")
    path.write_bytes(path.read_bytes() + b'{"half\n' + b'{"schema": 99}\n' + 3 * b"x\n")
    by_topic = findings()
    assert by_topic["tuned cases"].detail.startswith("1 on this device")
    skipped = by_topic["skipped records"]
    assert (
        skipped.status == "warn"
        and skipped.detail.startswith(f"5: {path}:2: ")
        and f"{path}:3: " in skipped.detail
    )
    assert "newer" in skipped.detail and skipped.detail.endswith("and 2 more")
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0


def test_a_log_that_cannot_be_read_fails(log_dir: Path) -> None:
    """A folder where a log file should be is a failure that names it, not a traceback."""
    records.log_path(log_dir, device.current(), "layer_norm").mkdir(parents=True)
    finding = findings()["tuned cases"]
    assert finding.status == "fail" and "layer_norm.jsonl" in finding.detail


def test_the_command_prints_each_finding_on_a_line() -> None:
    """Without --json: a line each, ok, warn or FAIL first, and the remedy of what is not ok."""
    lines = CliRunner().invoke(app, ["doctor"]).output.splitlines()
    assert len(lines) == len(findings())
    assert {line[:4] for line in lines} <= {"ok  ", "warn", "FAIL"}
    assert any(line.endswith("-> Run: lntune tune layer_norm") for line in lines)


FAULTS: list[tuple[Any, str]] = [
    (toolchain, "incompatible"),
    (toolchain, "command"),
    (toolchain, "run"),
    (device, "current"),
    (torch, "get_num_threads"),
    (direct, "has_shim"),
    (layer_norm_node, "reason_missing"),
    (products, "mkl_is_slow"),
    (torch.cuda, "is_available"),
    (driver, "opened"),
    (cuda, "available"),
    (paths, "log_dir"),
    (paths, "cached"),
    (sealed, "read"),
    (schedule, "all_schedules"),
    (paths, "schedule_dirs"),
    (records, "read"),
    (select, "served"),
    (tempfile, "TemporaryFile"),
]


@pytest.mark.parametrize(
    "error",
    [RuntimeError("no home"), OSError(116, "Stale file handle"), ImportError("libtvm.so")],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize(("module", "name"), FAULTS, ids=lambda p: p if isinstance(p, str) else "")
def test_whatever_goes_wrong_is_a_finding(
    module: Any, name: str, error: Exception, monkeypatch: pytest.MonkeyPatch, cache_dir: Path
) -> None:
    """No fault ends the examination: it is found under its topic, with a remedy, and all else is
    examined.
    """

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    native.compiled(runtime.SOURCE)
    monkeypatch.setattr(module, name, fail)
    by_topic = findings()
    wrong = [
        f
        for f in by_topic.values()
        if f.status != "ok"
        and (str(error) in f.detail or "damaged" in f.detail or str(error.args[-1]) in f.detail)
    ]
    assert wrong
    assert all(f.remedy for f in wrong)
    assert {"python", "schedules", "gpu"} <= set(by_topic) or name == "incompatible"


def test_built_kernels_are_looked_at(own_cache: Path) -> None:
    """They are counted, with what the look at each load costs; a damaged one is named."""
    path = own_cache / "kernels" / "layer_norm" / f"some.{native.FORMAT}.so"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"content")
    sealed.seal(path, {})
    finding = findings()["built kernels"]
    assert finding.status == "ok" and " MiB, checked in " in finding.detail
    path.write_bytes(b"damaged")
    finding = findings()["built kernels"]
    assert finding.status == "warn" and "1 damaged: some." in finding.detail and finding.remedy


def test_a_cache_that_is_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the user's cache cannot be, the temporary folder that serves instead is named with the
    reason.
    """
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("LNTUNE_CACHE_DIR", "~/x")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    finding = findings()["kernel cache"]
    assert (
        finding.status == "warn"
        and f"kernels are kept in {tmp_path}" in finding.detail
        and "LNTUNE_CACHE_DIR" in finding.remedy
    )
