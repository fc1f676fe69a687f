"""What a folder of candidates says of itself, and that it is what was written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from lntune import bounds
from lntune.case import Case
from lntune.device import Device
from lntune.errors import InputError, got_expected
from lntune.log import lines
from lntune.measure.jobs import Candidate
from lntune.versions import Code

FORMAT = 1
"""Raised when a manifest changes its meaning."""
MANIFEST, RECORDS, SUMS = "manifest.json", "records", "records.json"
_PIECE = 1 << 20


class Built(msgspec.Struct, frozen=True):
    """A candidate, what code it is of, and its kernel's file below the folder. `default` is what
    serves the case where nothing is tuned.
    """

    case: Case
    candidate: Candidate
    code: Code
    file: bounds.Name
    default: bool = False


class Manifest(msgspec.Struct, frozen=True):
    """What a folder holds: candidates built for a device, `target` in a command's words, and the
    digest of each of its files. `python` is that of the packages that came along.
    """

    format: int
    lntune: bounds.Name
    target: bounds.Name
    device: Device
    python: bounds.Name
    candidates: tuple[Built, ...]
    files: dict[bounds.Name, bounds.Name]


class Sums(msgspec.Struct, frozen=True):
    """The digests of a folder's manifest and of the logs that were measured with it."""

    manifest: bounds.Name
    files: dict[bounds.Name, bounds.Name]


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    sum_ = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            sum_.update(piece)
    return sum_.hexdigest()


def digests(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """The digests of files by their names below a folder."""
    return {path.relative_to(folder).as_posix(): digest(path) for path in sorted(files)}


def read(folder: Path) -> Manifest:
    """The manifest of a folder of candidates.

    Raises:
        InputError: there is none, or it is of a newer lntune.
    """
    expected = "a folder that lntune export-candidates wrote"
    try:
        with lines.opened(folder / MANIFEST) as file:
            manifest = msgspec.json.decode(file.read(lines.LARGEST), type=Manifest)
    except (OSError, msgspec.DecodeError, RecursionError) as e:
        raise InputError(got_expected("folder", f"{folder} ({e})", expected)) from e
    if manifest.format > FORMAT:
        got = f"{folder}, of a newer lntune ({manifest.lntune}, format {manifest.format})"
        raise InputError(got_expected("folder", got, f"one of format {FORMAT}"))
    return manifest


def altered(folder: Path, files: Mapping[str, str]) -> list[str]:
    """The files that are not what they were, or are not there; names that lead elsewhere count."""
    root = folder.resolve()
    wrong = []
    for name, expected in files.items():
        path = (root / name).resolve()
        inside = path.is_relative_to(root)
        if not inside or not path.is_file() or digest(path) != expected:
            wrong.append(name)
    return wrong
