"""Programs that a pass runs: with a time limit, in a group that ends with them, their output in a
file from the first line on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from lntune.commands.gpu_pass.jobs import Answer

LISTENS = 15.0
"""Seconds that a program has after SIGINT, at which pytest and lntune write what they have."""
_TAIL = 300


def run(
    words: Sequence[str], seconds: float, output: Path, environment: Mapping[str, str], folder: Path
) -> Answer:
    """Run a program to its end, in a folder, for so many seconds at most, of which the last are for
    ending. Also when an interrupt comes, it and all it started end. What it prints is added to its
    output of earlier runs.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    ending = min(LISTENS, seconds / 4)
    try:
        with output.open("ab") as file:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                cwd=folder,
                start_new_session=True,
            )
    except OSError as e:
        return Answer("failed", f"{words[0]}: {e.strerror or e}")
    late = False
    try:
        try:
            process.wait(seconds - ending)
        except subprocess.TimeoutExpired:
            late = True
            _signal(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(ending)
    finally:
        _signal(process.pid, signal.SIGKILL)
        code = process.wait()
    tail = output.read_bytes()[-_TAIL:].decode(errors="replace").strip()
    last = tail.splitlines()[-1] if tail else ""
    values = {"code": code, "output": output.name}
    if late:
        return Answer("late", f"ended after {seconds:.0f} s: {last}", values)
    return Answer("ok" if code == 0 else "failed", "" if code == 0 else last, values)


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
