"""Where measurements are read from: folders of tuning logs, as they are or as a revision of git has
them, and files of benchmarks.
"""

from __future__ import annotations

import io
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from lntune.errors import InputError, LogError, got_expected
from lntune.log import records
from lntune.log.records import Record

EXPECTED = (
    "JSON of `lntune bench --output`, a folder of tuning logs, a device's folder in it, or one"
    " .jsonl"
)


class _File(msgspec.Struct):
    """What `lntune bench --output` writes, as far as it matters here."""

    records: list[Record]


def load(path: Path) -> list[Record]:
    """The measured records of a file of `lntune bench --output`, or the finals that count
    (`records.finals`) of a folder of tuning logs, of one device's folder in it, or of one log file.

    Raises:
        InputError: neither, or nothing was measured there.
        LogError: it cannot be read.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(got_expected(str(path), "a device or a pipe", EXPECTED))
    try:
        logs = path.is_dir() or path.suffix == ".jsonl"
        measured = _finals(path) if logs else _benchmarks(path)
    except OSError as e:
        raise LogError(f"cannot read {path}: {e.strerror or e}. Give {EXPECTED}.") from e
    except (msgspec.MsgspecError, UnicodeDecodeError) as e:
        raise InputError(got_expected(str(path), f"a file that is not one ({e})", EXPECTED)) from e
    remedy = "Fill it with lntune bench --output or lntune tune --log-dir."
    return _measured(str(path), measured, remedy)


def _measured(name: str, found: Sequence[Record], remedy: str) -> list[Record]:
    """Those with a time of the kernel, of which there must be some."""
    measured = [r for r in found if r.status == "ok" and r.median() is not None]
    if not measured:
        raise InputError(got_expected(name, "no measurements", "some", remedy))
    return measured


def _benchmarks(path: Path) -> list[Record]:
    return msgspec.json.decode(path.read_bytes(), type=_File).records


def _finals(path: Path) -> list[Record]:
    files = [path] if path.is_file() else sorted(path.glob("*.jsonl"))
    read = (
        records.merged(list(records.read_file(file, "final")) for file in files)
        if files
        else records.read([path], role="final")
    )
    return [r for group in records.by_device(read) for r in records.finals(group).values()]


def of_revision(name: str, folders: Sequence[Path]) -> list[Record]:
    """The finals that count of the logs as a git revision has them: of the first of the folders
    that is in a repository.

    Raises:
        InputError: git is not installed, none is in a repository, the repository does not know the
            revision or has no logs in it, or nothing was measured there.
    """
    argument = f"rev:{name}"
    top, folder = _repository(argument, folders)
    inside = folder.relative_to(top).as_posix()
    commit = _git(top, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    if commit.returncode:
        remedy = f"`git -C {top} log --oneline -- {inside}` lists those that changed the logs."
        expected = f"a revision of {top}: a branch, a tag or a commit"
        raise InputError(got_expected(argument, repr(name), expected, remedy))
    archive = _git(top, "archive", "--format=tar", commit.stdout.decode().strip(), "--", inside)
    if archive.returncode:
        got = f"a revision without the folder {inside} of {top}"
        raise InputError(got_expected(argument, got, "one that holds it"))
    with tempfile.TemporaryDirectory() as temporary:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            for member in tar:
                if member.isfile() and member.name.endswith(".jsonl"):
                    path = Path(temporary, member.name)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
        found = _finals(Path(temporary, inside))
    return _measured(argument, found, "It has logs without a final.")


def _repository(argument: str, folders: Sequence[Path]) -> tuple[Path, Path]:
    """(top of the repository, folder of logs in it)."""
    for folder in (folder.resolve() for folder in folders if folder.is_dir()):
        try:
            top = _git(folder, "rev-parse", "--show-toplevel")
        except OSError as e:
            got = f"no git to ask ({e.strerror or e})"
            raise InputError(got_expected(argument, got, "git to be installed")) from e
        if not top.returncode:
            return Path(top.stdout.decode().rstrip("\n")).resolve(), folder
    where = ", ".join(map(str, folders))
    expected = "a folder of tuning logs in a git repository"
    raise InputError(got_expected(argument, where, expected, "Name one with --log-dir."))


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, check=False)
