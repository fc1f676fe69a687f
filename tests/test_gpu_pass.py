"""tools/gpu_pass.sh, tried out on the CPU: every step in its place, what it leaves when it is
ended, and arguments that make no sense.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "gpu_pass.sh"
STEPS = (
    "facts",
    "doctor",
    "gpu_tests",
    "bringup",
    "bench_layer_norm",
    "bench_layer_norm_backward",
    "bench_lnlstm_step",
    "bench_lnlstm_step_backward",
)


def start(
    *arguments: object, packages: Path | str = "/nonexistent/packages"
) -> subprocess.Popen[str]:
    """The script with packages of its own folder first, as on a machine where nothing is installed
    and no home can be written to.
    """
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "LNTUNE_PACKAGES": str(packages),
        "HOME": "/proc/nowhere",
    }
    command = [str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def lines(out: Path) -> list[str]:
    """The index without times."""
    path = out / "index.txt"
    return (
        [line.partition(" ")[2] for line in path.read_text().splitlines()] if path.exists() else []
    )


@pytest.mark.slow
def test_a_pass_on_the_cpu(tmp_path: Path) -> None:
    """All steps in order, each with its start, end and exit code or the reason why there was none;
    facts, doctor and the tests' results can be read, the summary of the bringup is there, and the
    packages' folder came first.
    """
    # it takes one; the rest is for a machine that is busy
    run = start(tmp_path, 8, "--target", "cpu")
    printed, _ = run.communicate(timeout=540)
    index = lines(tmp_path)
    assert index[0] == "begin, 8 minutes, target cpu", printed
    assert re.fullmatch(r"done, \d+ of 480 s, 0 steps failed", index[-1]), printed
    assert run.returncode == 0
    assert [line.split()[0] for line in index[1:-1] if " end, " not in line] == [
        *STEPS,
        "sequence",
        "sanitizer",
    ]
    for name in (*STEPS, "sequence"):
        assert any(re.match(rf"{name} start, at most \d+ s: ", line) for line in index)
        assert any(re.fullmatch(rf"{name} end, exit code 0, \d+ s", line) for line in index)
        assert (tmp_path / f"{name}.txt").exists()
    assert "sanitizer skipped: the target is the CPU" in index
    assert "PYTHONPATH=/nonexistent/packages:" in (tmp_path / "facts.txt").read_text()
    assert re.search(r"^HOME=/(?!proc)", (tmp_path / "facts.txt").read_text(), re.MULTILINE)
    assert json.loads((tmp_path / "doctor.txt").read_text())["findings"]
    suites = ElementTree.parse(tmp_path / "gpu_tests.xml").getroot()
    assert (
        sum(
            int(suite.attrib["failures"]) + int(suite.attrib["errors"])
            for suite in suites.iter("testsuite")
        )
        == 0
    )
    assert json.loads((tmp_path / "bringup" / "summary.json").read_text())["ok"]
    assert "layer_norm" in (tmp_path / "bringup" / "summary.txt").read_text()
    for name in ("bench_layer_norm", "bench_lnlstm_step_backward"):
        assert json.loads((tmp_path / f"{name}.json").read_text())["records"]
    assert len(json.loads((tmp_path / "gpu_sequence.json").read_text())["results"]) == 4
    assert list((tmp_path / "tuning_logs").glob("*/layer_norm.jsonl"))


def alive(word: str) -> list[str]:
    """Command lines of the processes that have a word in them."""
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if word in text:
            commands.append(text)
    return commands


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_ended_in_the_middle(tmp_path: Path) -> None:
    """SIGTERM in the middle of a step ends the step and all it started; what was found so far is
    there, and the index says what happened. So it does that the tests were left out where there is
    no pytest.
    """
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "pytest.py").write_text("raise ImportError")
    run = start(tmp_path, 30, "--target", "cpu", packages=packages)
    try:
        until = time.monotonic() + 240
        while not (tmp_path / "bringup" / "summary.json").exists():
            assert run.poll() is None and time.monotonic() < until, lines(tmp_path)
            time.sleep(0.1)
        run.send_signal(signal.SIGTERM)
        run.communicate(timeout=120)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    index = lines(tmp_path)
    assert run.returncode == 1
    assert re.fullmatch(r"stopped by SIGTERM after \d+ s", index[-1]), index
    assert "gpu_tests skipped: there is no pytest" in index
    assert any(line.startswith("bringup start") for line in index)
    until = time.monotonic() + 30
    while alive(str(tmp_path)) and time.monotonic() < until:
        time.sleep(0.1)
    assert alive(str(tmp_path)) == []
    assert json.loads((tmp_path / "bringup" / "summary.json").read_text())["stages"]
    assert "doctor" in (tmp_path / "bringup.txt").read_text()


def test_an_interpreter_without_the_packages(tmp_path: Path) -> None:
    """What is missing and what to set is the last line, after the machine's facts; no step is tried
    that could only fail.
    """
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "typer.py").write_text("raise ImportError('no typer here')")
    run = start(tmp_path / "out", 8, "--target", "cpu", packages=packages)
    printed, _ = run.communicate(timeout=120)
    index = lines(tmp_path / "out")
    assert run.returncode == 1
    assert re.fullmatch(
        r"stopped: \S+ cannot import .*: ImportError: no typer here; set PYTHON .* LNTUNE_PACKAGES",
        index[-1],
    ), printed
    assert [line.split()[0] for line in index] == ["begin,", "facts", "facts", "stopped:"]
    assert "Python 3" in (tmp_path / "out" / "facts.txt").read_text()


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("OUT",),
        ("OUT", "0"),
        ("OUT", "ten"),
        ("OUT", "1", "--target"),
        ("OUT", "1", "--target", "tpu"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """They are refused with the usage, and nothing is made."""
    done = subprocess.run(
        [str(SCRIPT), *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr.startswith("usage: tools/gpu_pass.sh OUT MINUTES")
    assert list(tmp_path.iterdir()) == []
