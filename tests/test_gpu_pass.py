"""tools/gpu_pass.sh itself, on a GPU that is imagined: what part 1 does where there is neither TVM
nor a CUDA compiler, what it leaves when it is ended, and arguments that make no sense.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_gpu import SITE, FakeGpu
from test_prebuild import NO_METADATA, NO_TVM

from lntune.backends.cuda import launcher
from lntune.commands.gpu_pass import plan, prebuild
from lntune.torch import dispatch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "gpu_pass.sh"
IMAGINED = f"""
import sys

# Its tensors are the CPU's, in every process that works on them.
if "lntune" in " ".join(sys.orig_argv):
{"".join(f"    {line}{chr(10)}" for line in SITE.strip().splitlines())}
    from lntune.backends.cuda import timing

    timing.COPY_BYTES = 1 << 16
if any(f"{{name}} import main" in " ".join(sys.orig_argv) for name in ("perform", "steps")):
    import torch
    from lntune.backends.cuda import launcher
    from lntune.torch import devices, graphs
    from on_gpu import Recorder

    devices._known = lambda kind, index: launcher.device(0) if kind == "cpu" else None
    graphs.Recorder = Recorder
"""
"""A machine with an imagined GPU, for every process of Python's."""
MACHINE = f"""
{NO_TVM}
{NO_METADATA}
for name in ("typer", "rich", "scipy", "click"):
    sys.modules[name] = None  # as if it were not installed
{IMAGINED}
if "lntune" in " ".join(sys.orig_argv):
    from lntune.backends import cuda

    cuda.stamp = lambda: ""
"""
"""The same without TVM, a CUDA compiler and the command line's packages."""


@pytest.fixture
def machine(fake_gpu: FakeGpu, own_cache: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a machine for which kernels were built on another one."""
    dispatch.reload()
    built = prebuild.build([launcher.device(0)])
    assert {one.status for one in built} == {"built"}, [one.message for one in built]
    yield environment_of(tmp_path, MACHINE)
    dispatch.reload()


def environment_of(folder: Path, site: str) -> dict[str, str]:
    """The environment of a machine whose Python begins with `site`, and where no home can be
    written to.
    """
    packages = folder / "packages"
    packages.mkdir()
    (packages / "sitecustomize.py").write_text(site)
    own = {"PYTHON": sys.executable, "PYTHONPATH": "", "LNTUNE_PACKAGES": str(packages)}
    return {**os.environ, **own, "HOME": "/proc/nowhere"}


def start(
    folder: Path, environment: dict[str, str], *options: str, part: int = 1
) -> subprocess.Popen[str]:
    """The script; its archive goes to out, what it did to work."""
    command = [str(SCRIPT), str(folder / "out"), str(part), "--work", str(folder / "work")]
    command += options
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def archived(folder: Path, part: int = 1) -> tuple[list[dict[str, Any]], set[str]]:
    """The results in the archive, and the names of its files; it is all there is in the folder."""
    (archive,) = (folder / "out").iterdir()
    assert archive.name == f"gpu_pass-part{part}.tar.gz"
    with tarfile.open(archive) as tar:
        file = tar.extractfile("results.jsonl")
        assert file is not None
        return [json.loads(line) for line in file.read().splitlines()], set(tar.getnames())


@pytest.mark.skipif(sys.platform != "linux", reason="the imagined driver is Linux's")
def test_the_first_part(machine: dict[str, str], tmp_path: Path) -> None:
    """With kernels that were built beforehand, without TVM, a CUDA compiler or the command line's
    packages, every work comes to a good end: facts, checks, yardsticks, speeds and a sequence.
    """
    run = start(tmp_path, machine, "--minutes", "30")
    printed, _ = run.communicate(timeout=540)
    lines, names = archived(tmp_path)
    bad = [line for line in lines if line["answer"]["status"] != "ok"]
    assert run.returncode == 0 and not bad, f"{bad}\n{printed}"
    steps = list(dict.fromkeys(line["step"] for line in lines))
    assert [s for s in steps if s != "profile"] == [
        *("facts", "first", "checks", "doctor", "yardsticks"),
        *("defaults", "knobs", "sequence", "few rows"),
    ]
    assert {"log.txt", "doctor-doctor.txt", "facts-packages.txt"} <= names
    (sequence,) = (line["answer"]["values"] for line in lines if line["step"] == "sequence")
    assert sequence["us"]["lntune"] > 0
    assert all(line["answer"]["values"]["us"]["tuned"] for line in lines if "few" in line["step"])
    assert printed.splitlines()[-1].endswith("end: all is done")


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("part", "steps"),
    [
        (2, ["facts", "doctor", "tests", "bringup"]),
        (3, ["facts", "bringup on", "compile", "rest"]),
    ],
)
def test_the_other_parts(part: int, steps: list[str], fake_gpu: FakeGpu, tmp_path: Path) -> None:
    """Each runs all of its programs, ends by itself, and leaves their logs and summaries in its
    archive.
    """
    run = start(tmp_path, environment_of(tmp_path, IMAGINED), "--minutes", "4", part=part)
    printed, _ = run.communicate(timeout=540)
    lines, names = archived(tmp_path, part)
    assert list(dict.fromkeys(line["step"] for line in lines)) == steps, printed
    assert "bringup/summary.json" in names
    bringup = next(name for name in names if name.startswith("bringup") and "bringup.txt" in name)
    assert "goes on" in (tmp_path / "work" / bringup).read_text()
    assert " end: " in printed.splitlines()[-1]


def alive(word: str) -> list[str]:
    """Command lines of the processes that have a word in them."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        lines += [text] if word in text else []
    return lines


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_ended_in_the_middle(machine: dict[str, str], tmp_path: Path) -> None:
    """SIGTERM ends the work in hand and all it started; what was done until then is in the archive,
    and the same command goes on from it.
    """
    run = start(tmp_path, machine, "--minutes", "30")
    results = tmp_path / "work" / "results.jsonl"
    try:
        until = time.monotonic() + 240
        while not (results.exists() and '"checks"' in results.read_text()):
            assert run.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        run.send_signal(signal.SIGTERM)
        printed, _ = run.communicate(timeout=120)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 130 and printed.splitlines()[-1].endswith("stopped by a signal")
    lines, _ = archived(tmp_path)
    assert {"facts", "first", "checks"} <= {line["step"] for line in lines}
    until = time.monotonic() + 30
    while alive(str(tmp_path)) and time.monotonic() < until:
        time.sleep(0.1)
    assert alive(str(tmp_path)) == []
    again = start(tmp_path, machine, "--minutes", "0.5")
    printed, _ = again.communicate(timeout=240)
    after, _ = archived(tmp_path)
    assert after[: len(lines)] == lines
    known = {(line["step"], line["key"]) for line in lines}
    assert not known & {(line["step"], line["key"]) for line in after[len(lines) :]}


def test_without_what_it_needs(tmp_path: Path) -> None:
    """The facts are in the archive, and the last line says what is missing."""
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "torch.py").write_text("raise ImportError('no torch here')")
    environment = {**os.environ, "PYTHON": sys.executable, "LNTUNE_PACKAGES": str(packages)}
    run = start(tmp_path, environment)
    printed, _ = run.communicate(timeout=240)
    lines, names = archived(tmp_path)
    assert run.returncode == 1
    last = printed.splitlines()[-1]
    assert "stopped: --target cuda: " in last and "no torch here" in last, printed
    assert {line["step"] for line in lines} == {"facts"} and "facts-packages.txt" in names


@pytest.mark.parametrize(
    "arguments",
    [(), ("OUT",), ("OUT", "4"), ("OUT", "1", "--minutes", "0"), ("OUT", "1", "--minutes", "x")],
    ids=str,
)
def test_arguments_that_make_no_sense(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """They are refused with the usage, and nothing is made."""
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        [str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("usage: tools/gpu_pass.sh")
    assert list(tmp_path.iterdir()) == []


def test_sizes_here_and_elsewhere(fake_gpu: FakeGpu) -> None:
    """An imagined GPU is measured on tiny sizes."""
    assert plan.sizes_for(launcher.device(0)) is plan.TINY
