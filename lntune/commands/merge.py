"""`lntune merge`: logs of several machines or runs in one."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from lntune.errors import InputError, LogError, got_expected
from lntune.log import records, union
from lntune.log.union import Conflict, Fault, Line, Union
from lntune.system import locks, scratch
from lntune.words import counted


class Input(msgspec.Struct, frozen=True):
    """A log or folder that was put in: its files, its records (the same ones counted again), and
    how many no other input has.
    """

    path: str
    files: int
    records: int
    only_here: int


class File(msgspec.Struct, frozen=True):
    """A file that came of it."""

    path: str
    device: str
    op: str
    records: int
    finals: int
    runs: int


class Merged(msgspec.Struct, frozen=True):
    """What came of a merge. `duplicates` were there more than once, `newer` are of a newer schema,
    and kept as they are; `left_out` are lines that cannot be used.
    """

    output: str
    inputs: tuple[Input, ...]
    files: tuple[File, ...]
    records: int
    duplicates: int
    newer: int
    conflicts: tuple[Conflict, ...]
    left_out: tuple[Fault, ...]


def merge(
    inputs: Sequence[Path],
    output: Path,
    overwrite: bool = False,
    on_file: Callable[[Path], None] = lambda _: None,
) -> Merged:
    """Put the records of logs, and of folders of logs, into one file (where `output` ends in
    .jsonl) or one folder, each once and in its device's file. Inputs stay as they are. `on_file` is
    told of each file before it is read.

    Raises:
        InputError: an input holds no logs; the output is there already, unless it is one of the
            inputs and to be overwritten; or it lies within one.
        LogError: a log cannot be read, or the output not be written; then nothing was.
    """
    sources = [(path, logs_of(path)) for path in inputs]
    _refuse(inputs, output, overwrite)
    try:
        if output.exists() and _own(output, inputs):
            return _in_place(sources, output, on_file)
        merged = _read(sources, on_file)
        files = _files(merged, output)
        if output.suffix == ".jsonl":
            output.parent.mkdir(parents=True, exist_ok=True)
            write(output, files[0].lines)
        else:
            new_folder(output, lambda folder: _fill(folder, output, files))
    except OSError as e:
        if isinstance(e, LogError):
            raise
        reason = e.strerror or e
        raise LogError(f"cannot write the merged log {output}: {reason}.") from e
    return _told(merged, sources, output, files)


def logs_of(path: Path) -> list[Path]:
    """The logs of an input: the file itself, or those of a folder of logs or of one device.

    Raises:
        InputError: there is none.
    """
    expected = "a tuning log (.jsonl), or a folder of them"
    if path.is_dir():
        own = sorted(file for file in path.glob("*.jsonl") if not file.name.startswith("."))
        if found := [*own, *records.files(path)]:
            return found
        raise InputError(got_expected("log", f"{path}, in which there is none", expected))
    if not path.exists():
        raise InputError(got_expected("log", f"{path}, which is not there", expected))
    return [path]


class _Made(NamedTuple):
    """A file to be written."""

    path: Path
    lines: Sequence[Line]


def _own(output: Path, inputs: Sequence[Path]) -> bool:
    return output.resolve() in [path.resolve() for path in inputs]


def _refuse(inputs: Sequence[Path], output: Path, overwrite: bool) -> None:
    """Complain of an output that something would be lost by."""
    target = output.resolve()
    for path in map(Path.resolve, inputs):
        if target in path.parents or path in target.parents:
            expected = f"a place of its own, apart from the input {path}"
            raise InputError(got_expected("-o", output, expected))
    if output.is_dir() and any(output.glob("*.jsonl")):
        remedy = f"Give {target.parent}."
        raise InputError(
            got_expected("-o", f"{output}, the folder of one device", "a folder of logs", remedy)
        )
    if output.is_dir() and output.suffix == ".jsonl":
        raise InputError(got_expected("-o", f"{output}, a folder", "a file, by its ending"))
    if output.is_file() and output.suffix != ".jsonl":
        raise InputError(got_expected("-o", f"{output}, a file", "FILE.jsonl or a folder"))
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not _own(output, inputs):
        remedy = "To add to it, name it among the logs as well, with --overwrite."
        expected = "a file or folder that is not there yet"
        raise InputError(got_expected("-o", f"{output}, which is there already", expected, remedy))
    if not overwrite:
        remedy = "--overwrite puts the union in its place."
        got = f"{output}, which is one of the logs to be merged"
        raise InputError(got_expected("-o", got, "another place", remedy))


def _read(sources: Sequence[tuple[Path, list[Path]]], on_file: Callable[[Path], None]) -> Union:
    merged = Union()
    for _, logs in sources:
        for log in logs:
            on_file(log)
            merged.add(log)
    return merged


def _files(merged: Union, output: Path) -> list[_Made]:
    """What is to be written."""
    found = merged.lines()
    if output.suffix == ".jsonl":
        return [_Made(output, found)]
    places: dict[tuple[str, str], list[Line]] = {}
    for line in found:
        places.setdefault(line.place, []).append(line)
    return [_Made(output.joinpath(*place), places[place]) for place in sorted(places)]


def write(path: Path, kept: Sequence[Line]) -> None:
    """Put a log in place, whole and on disk, with the mode of one that it takes the place of.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    with scratch.whole(path) as temporary:
        with temporary.open("wb") as file:
            file.write(union.joined(kept))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(path, temporary)


def _fill(folder: Path, output: Path, files: Sequence[_Made]) -> None:
    for made in files:
        path = folder / made.path.relative_to(output)
        path.parent.mkdir(exist_ok=True)
        write(path, made.lines)


def new_folder(output: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder at once, of what is put into another one: all of it is there, or nothing.

    Raises:
        OSError: it cannot be made.
    """
    target = output.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)
        fill(temporary)
        temporary.replace(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _in_place(
    sources: Sequence[tuple[Path, list[Path]]], output: Path, on_file: Callable[[Path], None]
) -> Merged:
    """Merge into one of the inputs, to which others may append meanwhile: what they add before a
    file is taken its place is in it.
    """
    there = set(logs_of(output))
    while True:
        with _locked(sorted(there)):
            current = [(path, logs_of(path)) for path, _ in sources]
            if set(logs_of(output)) <= there:
                merged = _read(current, on_file)
                files = _files(merged, output)
                new = {made.path for made in files} - there
                if not new:
                    for made in files:
                        write(made.path, made.lines)
                    for moved in there - {made.path for made in files}:
                        moved.unlink(missing_ok=True)  # its records lie where they belong now
                    return _told(merged, current, output, files)
                there |= new
                for path in new:
                    path.parent.mkdir(parents=True, exist_ok=True)
            there |= set(logs_of(output))


@contextlib.contextmanager
def _locked(files: Sequence[Path]) -> Iterator[None]:
    """Nobody appends to any of the files in the block.

    Raises:
        LogError: somebody else has one, and does not give it up.
    """
    with contextlib.ExitStack() as stack:
        for file in files:
            stack.enter_context(locked(file))
        yield


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Nobody appends to a log in the block.

    Raises:
        LogError: another process has it, and does not give it up.
    """
    try:
        with locks.locked(file):
            yield
    except locks.LockedError as e:
        raise LogError(f"cannot change the tuning log {file}: {e.strerror}.") from e


def _told(
    merged: Union,
    sources: Sequence[tuple[Path, list[Path]]],
    output: Path,
    files: Sequence[_Made],
) -> Merged:
    found = [line for made in files for line in made.lines]
    return Merged(
        str(output),
        tuple(
            Input(str(path), len(logs), merged.count(logs), merged.only_in(logs))
            for path, logs in sources
        ),
        tuple(_file(made) for made in files),
        len(found),
        merged.read - len(found),
        sum(line.newer for line in found),
        tuple(merged.conflicts()),
        tuple(merged.faults),
    )


def _file(made: _Made) -> File:
    devices = {line.device.slug for line in made.lines}
    ops = {line.op for line in made.lines}
    return File(
        str(made.path),
        devices.pop() if len(devices) == 1 else counted(len(devices), "device"),
        ops.pop() if len(ops) == 1 else counted(len(ops), "operator"),
        len(made.lines),
        sum(line.role == "final" for line in made.lines),
        len({line.run for line in made.lines if line.run}),
    )
