"""Candidates that are built here and measured elsewhere: the folder is all that it takes, in a
process that has neither TVM nor a compiler; it goes on where it ended; what comes home is what was
measured.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_prebuild import NO_METADATA
from typer.testing import CliRunner

from lntune import device, schedule
from lntune.case import Case
from lntune.cli import app
from lntune.commands.candidates import home, manifest
from lntune.errors import InputError
from lntune.log import records, select
from lntune.tune.earlier import Earlier

ALONE = """
import importlib.machinery, importlib.metadata, sys

# As where PyTorch and apache-tvm-ffi are installed, and nothing else that lntune takes.
find_spec = importlib.machinery.PathFinder.find_spec
def alone(cls, name, path=None, target=None):
    top = name.partition(".")[0]
    if top in ("tvm", "scipy", "rich", "typer"):
        return None
    if top in ("msgspec", "platformdirs") and path is None:
        path = [p for p in sys.path if p.endswith("/packages")]
    return find_spec(name, path, target)

importlib.machinery.PathFinder.find_spec = classmethod(alone)
"""
TRIALS = 3
SIZE = ("--hidden", "64", "--dtype", "float32", "--rows", "8")
PROBE = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("from", sys.modules["lntune"].__file__, "tvm" in sys.modules)
"""


def export(folder: Path, target: str) -> None:
    """A folder of candidates of one case."""
    words = ["export-candidates", str(folder), *SIZE, "--target", target, "--trials", str(TRIALS)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert f"{TRIALS} candidates of 1 case for {target}" in done.stdout


def measure(
    folder: Path, hidden: Path, *options: str, path: str = ""
) -> subprocess.CompletedProcess[str]:
    """What `python measure.py` says in a process without TVM, compilers and an installed lntune;
    compilers are found on `path`.
    """
    hidden.mkdir(exist_ok=True)
    (hidden / "sitecustomize.py").write_text(ALONE + NO_METADATA)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LNTUNE_", "CXX"))}
    environment |= {
        "PYTHONPATH": str(hidden),
        "PATH": path or str(hidden / "bin"),
        "LNTUNE_NVCC": "",
    }
    return subprocess.run(
        [sys.executable, "-c", PROBE, str(folder / "measure.py"), "--trial-seconds=0.02", *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=hidden,
        env=environment,
        timeout=240,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that was measured on this CPU, of which a first call found its time over."""
    base = tmp_path_factory.mktemp("candidates")
    export(base / "there", "cpu")
    (base / "there").rename(base / "elsewhere")
    over = measure(base / "elsewhere", base / "hidden", "--minutes", "1e-9")
    assert over.returncode == 1, over.stdout + over.stderr
    assert "the time is over; the same command goes on" in over.stdout
    done = measure(base / "elsewhere", base / "hidden")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"from {base / 'elsewhere' / 'lntune' / '__init__.py'} False" in done.stdout
    return base / "elsewhere"


def measured(folder: Path) -> list[records.Record]:
    """What was measured in a folder."""
    return records.read([folder / manifest.RECORDS])


def test_it_is_measured_without_tvm_and_compilers(folder: Path) -> None:
    """Every candidate has a trial, and the case a final with eager mode, of this device; the
    versions say that there was no TVM.
    """
    log = measured(folder)
    trials = [r for r in log if r.role == "trial"]
    assert len(trials) == TRIALS == len({json.dumps(r.knobs) for r in trials})
    (final,) = (r for r in log if r.role == "final")
    assert {"tuned", "eager", "copy"} <= set(final.timings)
    assert all(r.status == "ok" and r.device == device.current() for r in log)
    assert {r.versions["tvm"] for r in log} == {"not installed"}


def test_it_goes_on_where_it_ended(folder: Path, tmp_path: Path) -> None:
    """A call again measures nothing twice; with half a log it measures what is missing."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    (log,) = records.files(copy / manifest.RECORDS)
    whole = log.read_bytes()
    log.write_bytes(b"\n".join(whole.splitlines()[:-2])[:-30])
    done = measure(copy, tmp_path / "hidden")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len([r for r in _quietly(copy) if r.role == "trial"]) == TRIALS
    assert len([r for r in _quietly(copy) if r.role == "final"]) == 1
    assert home.take(copy, tmp_path / "logs").added == TRIALS + 1


@pytest.mark.filterwarnings("ignore::lntune.log.records.LogWarning")
def _quietly(folder: Path) -> list[records.Record]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return measured(folder)


def test_its_records_come_home(folder: Path, tmp_path: Path) -> None:
    """`lntune import` adds the records as they are, once; the final serves the case."""
    logs = tmp_path / "logs"
    words = ["import", str(folder), "--log-dir", str(logs), "--json"]
    first, again = (json.loads(CliRunner().invoke(app, words).stdout) for _ in range(2))
    assert (first["added"], first["known"], first["left_out"]) == (TRIALS + 1, 0, [])
    assert (again["added"], again["known"]) == (0, TRIALS + 1)
    log = records.read([logs])
    assert [r for r in log if r.role == "trial"] == measured(folder)[:-1]
    assert log[-1].timings["eager"] == measured(folder)[-1].timings["eager"]
    assert log[-1].decision is not None
    case = Case("layer_norm", 64, "float32", 8)
    choice = select.select(case, device.current(), log, schedule.for_op(case.op, "cpu"))
    assert choice.record is not None and choice.measured
    assert not Earlier([logs], device.current(), 1).trials(case)  # of other versions: no TVM


def altered(folder: Path, what: str) -> None:
    """Change something of a folder."""
    if what == "manifest":
        path = folder / manifest.MANIFEST
        path.write_text(path.read_text().replace('"default": true', '"default": false'))
    elif what == "record":
        (path,) = records.files(folder / manifest.RECORDS)
        path.write_text(path.read_text().replace('"busy":', '"busy" :', 1))
    elif what == "another log":
        (path,) = records.files(folder / manifest.RECORDS)
        shutil.copy(path, path.with_name("lnlstm_step.jsonl"))
    elif what == "sums":
        (folder / manifest.SUMS).unlink()
    elif what == "newer":
        path = folder / manifest.MANIFEST
        path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    else:
        (folder / manifest.MANIFEST).write_text("{}")


@pytest.mark.parametrize("what", ["manifest", "record", "another log", "sums", "newer", "empty"])
def test_what_was_altered_stays_out(folder: Path, tmp_path: Path, what: str) -> None:
    """A folder that is not what was measured is refused, and nothing is added."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    altered(copy, what)
    with pytest.raises(InputError, match="folder: got"):
        home.take(copy, tmp_path / "logs")
    assert not (tmp_path / "logs").exists()


def test_records_of_something_else_stay_out(folder: Path, tmp_path: Path) -> None:
    """Records of other knobs, code or devices than were built are left out, each with the
    reason, though their digests are right.
    """
    copy = shutil.copytree(folder, tmp_path / "copy")
    (log,) = records.files(copy / manifest.RECORDS)
    line: dict[str, Any] = json.loads(log.read_bytes().splitlines()[0])
    others = [
        line | {"knobs": {"lanes": 16}},
        line | {"code": {"schedule": 99}},
        line | {"device": line["device"] | {"isa": "x86-64"}},
    ]
    log.write_bytes(b"".join(json.dumps(other).encode() + b"\n" for other in others))
    sums = {
        "manifest": manifest.digest(copy / manifest.MANIFEST),
        "files": manifest.digests(copy, [log]),
    }
    (copy / manifest.SUMS).write_text(json.dumps(sums))
    found = home.take(copy, tmp_path / "logs")
    assert found.added == 0
    whys = {fault.why.split(",")[0][:30] for fault in found.left_out}
    assert len(found.left_out) == len(whys) == 3


def test_a_kernel_that_was_altered_is_not_loaded(folder: Path, tmp_path: Path) -> None:
    """`measure.py` runs nothing of a folder in which a file is not what was written."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    kernel = next((copy / "cache" / "kernels").rglob("*.so"))
    kernel.write_bytes(kernel.read_bytes()[:-1] + b"x")
    done = subprocess.run(
        [sys.executable, str(copy / "measure.py")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert f"altered or missing: {kernel.relative_to(copy)}" in done.stdout


def test_an_emulated_gpu(tmp_path: Path) -> None:
    """The same for a GPU, which the emulator stands in for: that compiles by itself."""
    export(tmp_path / "out", "emulated:sm_90")
    done = measure(tmp_path / "out", tmp_path / "hidden", path=os.environ["PATH"])
    assert done.returncode == 0, done.stdout + done.stderr
    found = home.take(tmp_path / "out", tmp_path / "logs")
    assert found.added == TRIALS + 1 and not found.left_out
    assert {r.device.backend for r in records.read([tmp_path / "logs"])} == {"emulated"}


def test_a_folder_that_is_there(tmp_path: Path) -> None:
    """Nothing is written over."""
    done = CliRunner().invoke(app, ["export-candidates", str(tmp_path), *SIZE])
    assert done.exit_code == 2 and "which is there" in done.output
