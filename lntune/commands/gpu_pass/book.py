"""What came of each work of a pass: a line of JSON as soon as it is known, in a folder that
outlives the process, and all of it in one archive.
"""

from __future__ import annotations

import datetime
import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from lntune.commands.gpu_pass import summary
from lntune.commands.gpu_pass.jobs import Answer
from lntune.errors import InputError, got_expected

LARGEST = 16 << 20
"""Bytes of a file that goes into the archive."""


class Line(msgspec.Struct, frozen=True):
    """One work of a step, and what came of it in `seconds`."""

    step: str
    key: str
    time: str
    seconds: float
    answer: Answer


def now() -> str:
    """The time, for people and for logs of other machines."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


class Book:
    """The folder: `results.jsonl`, `log.txt`, and what programs wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._results, self._log = folder / "results.jsonl", folder / "log.txt"
        for path in (self._results, self._log):
            path.touch()
            _end_line(path)
        self._lines = {(line.step, line.key): line for line in self._read()}
        self._done = {at for at, line in self._lines.items() if line.answer.status == "ok"}

    def _read(self) -> Iterator[Line]:
        """The lines that are whole: the last may have been cut."""
        for raw in self._results.read_bytes().splitlines():
            try:
                yield msgspec.json.decode(raw, type=Line)
            except msgspec.MsgspecError:
                continue

    def answer(self, step: str, key: str) -> Answer | None:
        """What came of a work; None where it is still to be done: what went well before is not done
        again, what did not is, once.
        """
        return self._lines[step, key].answer if (step, key) in self._done else None

    def lines(self) -> list[Line]:
        """What came of every work, each once."""
        return list(self._lines.values())

    def add(self, step: str, key: str, answer: Answer, seconds: float) -> None:
        """Keep what came of a work."""
        line = Line(step, key, now(), round(seconds, 2), answer)
        self._lines[step, key] = line
        if answer.status != "cut":
            self._done.add((step, key))
        with self._results.open("ab") as file:
            file.write(msgspec.json.encode(line) + b"\n")
        words = [text for text in (answer.message, summary.figures(answer)) if text]
        self.log(f"{': '.join([f'{step}, {key}', answer.status, *words])} ({seconds:.1f} s)")

    def log(self, text: str) -> None:
        """A line for people, also on the screen."""
        line = f"{now()} {' '.join(text.split())}"
        print(line, flush=True)
        with self._log.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def pack(self, to: Path) -> None:
        """Everything in one archive, which takes its name when it is whole; `summary.txt` is
        written anew.
        """
        answers = [(line.step, line.key, line.answer) for line in self.lines()]
        text = "".join(f"{line}\n" for line in summary.lines(answers))
        (self.folder / "summary.txt").write_text(text, encoding="utf-8")
        temporary = to.with_name(f".{to.name}")
        with tempfile.TemporaryDirectory() as folder:
            archive = Path(folder) / to.name
            with tarfile.open(archive, "w:gz") as tar:
                for path in sorted(self.folder.rglob("*")):
                    if path.is_file() and path.stat().st_size <= LARGEST:
                        tar.add(path, str(path.relative_to(self.folder)))
            temporary.write_bytes(archive.read_bytes())
        temporary.replace(to)


def _end_line(path: Path) -> None:
    """What follows begins a line of its own, wherever the last one was cut."""
    if path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")


def unpack(archive: Path, folder: Path) -> None:
    """Go on from an archive where the folder has no results yet.

    Raises:
        InputError: it is no archive of `Book.pack`.
    """
    results = folder / "results.jsonl"
    if results.is_file() and results.stat().st_size:
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    except (OSError, tarfile.TarError) as e:
        raise InputError(
            got_expected("--after", archive, f"an archive that an earlier part left ({e})")
        ) from e
