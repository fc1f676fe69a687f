"""Commands in folders of their own, for tests and tools that kill them: what lives of them, what
they have logged, and what they have left.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import msgspec

from lntune.log import records
from lntune.log.records import Record
from lntune.measure.jobs import Candidate

GRACE = 60.0
"""Seconds that what a killed command has started may take to end on a machine that is busy; it
takes some milliseconds.
"""
MARK = "LNTUNE_TEST_PLACE"
# Whatever the budget, what is measured at the end of a stage is measured briefly.
BRIEF = """
from lntune.commands import bringup
from lntune.backends.cpu import backend
from lntune.commands.bringup import steps
from lntune.tune import times
backend._COPIED, steps.COPY_SECONDS = 1 << 24, 0.05
times.FINAL_SHARE, bringup.BENCH_SECONDS = 1e-4, 0.05
from lntune.cli import main
main()
"""
COMMANDS = {
    "tune": [
        "tune",
        "layer_norm",
        "--hidden",
        "65",
        "--dtype",
        "float32",
        "--rows",
        "8",
        "--trials",
        "2",
        "--workers",
        "2",
        "--budget",
        "300s",
    ],
    "bringup": [
        "bringup",
        "--target",
        "cpu",
        "--grid",
        "small",
        "--ops",
        "layer_norm",
        "--no-compile",
        "--trials",
        "2",
        "--budget",
        "300s",
    ],
    # the first case is soon done, the second is not before the command is killed
    "compare": [
        "compare",
        "cached_rows",
        "cached_rows:lanes=8",
        "--measure",
        "--hidden",
        "1024",
        "--dtype",
        "float32",
        "--rows",
        "8,9",
        "--time",
        "2s",
    ],
}


class Place:
    """Folders of a command's own: its cache, its logs, its output, the system's temporary folder as
    it sees it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache, self.logs, self.out, self.tmp = (
            folder / name for name in ("cache", "logs", "out", "tmp")
        )
        self.cache.mkdir()
        self.tmp.mkdir()
        self.environment = {
            name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"
        }
        self.environment |= {
            "LNTUNE_CACHE_DIR": str(self.cache),
            "TMPDIR": str(self.tmp),
            MARK: str(folder),
        }
        self.environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)

    def start(self, name: str, *more: object, code: str = BRIEF) -> subprocess.Popen[str]:
        """One of COMMANDS as a user runs it, but for what the code before it changes."""
        output = ("--output", self.out) if name == "bringup" else ()
        arguments = [*COMMANDS[name], "--log-dir", self.logs, "--json", *output, *more]
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment
        )

    def alive(self) -> dict[int, str]:
        """The processes of this place, by id: its commands and all that they started, compilers
        too.
        """
        processes = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.folder}".encode() in (process / "environ").read_bytes().split(
                    b"\0"
                ):
                    processes[int(process.name)] = (
                        (process / "cmdline")
                        .read_bytes()
                        .replace(b"\0", b" ")
                        .decode(errors="replace")
                    )
            except OSError:  # it has ended, or is another user's
                continue
        return processes

    def end(self) -> None:
        """End all processes that are there."""
        for pid in self.alive():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def ended(self) -> dict[int, str]:
        """What lives on after a while; at best nothing."""
        until = time.monotonic() + GRACE
        while (processes := self.alive()) and time.monotonic() < until:
            time.sleep(0.05)
        return processes

    def records(self) -> list[Record]:
        """What is in the logs, every line of which is a record."""
        lines = []
        for path in self.logs.rglob("*.jsonl"):
            content = path.read_bytes()
            assert not content or content.endswith(b"\n"), "the last line is torn"
            lines += [
                msgspec.json.decode(line, type=dict[str, Any]) for line in content.splitlines()
            ]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read = records.read([self.logs])
        assert len(read) == len(lines)
        return read

    def left(self) -> list[str]:
        """Files that are neither records nor summaries nor built kernels, and folders in the
        temporary one.
        """
        kept = [
            path
            for path in self.tmp.iterdir()
            if not path.name.startswith(("torchinductor_", f"lntune-{os.getuid()}"))
        ]
        for folder, suffixes in (
            (self.logs, (".jsonl", ".lock")),
            (self.out, (".json", ".txt")),
            (self.cache, (".so", ".lock")),
        ):
            kept += [
                p
                for p in folder.rglob("*")
                if p.is_file() and (p.suffix not in suffixes or p.name.startswith("."))
            ]
        return [str(path.relative_to(self.folder)) for path in kept]


def repeated(logged: list[Record]) -> list[Record]:
    """Trials that were made though an earlier one of the same, undisturbed, is in the log."""
    made, twice = set(), []
    for record in logged:
        if record.role == "trial":
            one = (record.case, Candidate.of_record(record))
            twice += [record] if one in made else []
            made |= set() if record.disturbance else {one}
    return twice
