"""What a bundle holds, as its file `manifest.json` has it, and whether the folder is as it was
written: each file by its SHA-256 sum, and no other file.

A bundle's kernels are programs that run as who loads them, so it is refused whole where anything of
it was altered, or where others can write to it (see lntune/system/trust.py).
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec

from lntune.case import Case
from lntune.device import Device
from lntune.errors import BuildError, InputError, got_expected
from lntune.knobs import Value
from lntune.log.select import Tier
from lntune.system import trust

NAME = "manifest.json"
SCHEMA = 1
LARGEST = 1 << 24
"""Bytes of a manifest at most: some ten thousand kernels."""
KERNELS, LIBRARIES, RECORDS = "kernels", "runtime", "records"
"""Folders of a bundle: kernels, what loads and calls them, a log of the records that chose them."""
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class BundleError(BuildError):
    """A bundle cannot be used: it is not there, was altered, or others can write to it."""


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file of a bundle was when it was written."""

    sha256: str
    bytes: int


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What serves a case, whose rows stand for their bucket: the kernel in a `file`, or eager mode
    where there is none. `strided`: for matrices whose rows lie apart. `tier` and `schedule` with
    its knobs are those of the choice that was made where the bundle was written, `record` is the
    line of the record that it rests on, counted from 0 in the log of its operator, -1 without one.
    """

    case: Case
    tier: Tier
    schedule: str = ""
    knobs: dict[str, Value] = {}
    strided: bool = False
    file: str = ""
    record: int = -1


class Target(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Kernels for one device, and what they need of the lntune that loads them: the release of
    tvm_ffi, `runtime` (a hash of lntune's own C), and the newest glibc whose symbols they use,
    empty for no matter which.
    """

    device: Device
    abi: str
    runtime: str
    glibc: str = ""
    kernels: tuple[Entry, ...] = ()


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a bundle holds; `versions` are those of what wrote it. `libraries` are the files that
    lntune compiles of its own C once a machine; `files` has all of the folder but the manifest.
    """

    schema: int
    lntune: str
    versions: dict[str, str] = {}
    targets: tuple[Target, ...]
    libraries: tuple[str, ...] = ()
    files: dict[str, File]

    def encoded(self) -> bytes:
        """The text of manifest.json."""
        encoded = msgspec.json.encode(self, order="deterministic")
        return msgspec.json.format(encoded, indent=1) + b"\n"


class _Schema(msgspec.Struct):
    schema: int


def digest_of(content: bytes) -> str:
    """The SHA-256 sum of a file, as `sha256sum` prints it."""
    return hashlib.sha256(content).hexdigest()


def read(folder: Path, sha256: str = "") -> tuple[Manifest, str]:
    """The manifest of a bundle whose files are all as they were written, and its SHA-256 sum, which
    stands for the whole bundle; `sha256` is what it has to be, where that is known.

    Raises:
        InputError: the folder is no bundle, or `sha256` no such sum.
        BundleError: something of it was altered or is missing, it has something else, others can
            write to it, or it is of a newer lntune.
    """
    if sha256 and not _DIGEST.fullmatch(sha256.lower()):
        raise InputError(got_expected("sha256", sha256, "64 hexadecimal digits"))
    if not (folder / NAME).exists():
        got = f"{folder}, {_why_none(folder)}"
        remedy = "lntune export writes one."
        raise InputError(got_expected("bundle", got, f"a folder with a {NAME}", remedy))
    _refuse_others(folder)
    content = _content(folder, NAME)
    found = digest_of(content)
    if sha256 and found != sha256.lower():
        raise BundleError(f"{folder} is another bundle: its sum is {found}, expected {sha256}.")
    manifest = _decoded(folder, content)
    for name in manifest.files:
        _refuse_name(folder, name)
    there = set(_files(folder))
    for name in sorted(there - {NAME, *manifest.files}):
        raise BundleError(f"{folder} has {name}, which is no part of the bundle. Remove it.")
    for name, file in sorted(manifest.files.items()):
        if name not in there:
            raise BundleError(f"{folder} lacks {name}. {_AGAIN}")
        check(folder, name, file)
    _refuse_strangers(folder, manifest)
    return manifest, found


_AGAIN = "Copy the bundle again, or write it again: lntune export."


def check(folder: Path, name: str, file: File) -> bytes:
    """The content of a file of a bundle.

    Raises:
        BundleError: it is not what was written.
    """
    content = _content(folder, name)
    if len(content) != file.bytes or digest_of(content) != file.sha256:
        raise BundleError(
            f"{folder / name} was altered: it is not what was written (SHA-256). {_AGAIN}"
        )
    return content


def _why_none(folder: Path) -> str:
    if folder.is_dir():
        return "in which there is none"
    return "a file" if folder.exists() else "which is not there"


def _decoded(folder: Path, content: bytes) -> Manifest:
    try:
        schema = msgspec.json.decode(content, type=_Schema).schema
        if schema > SCHEMA:
            raise BundleError(
                f"{folder} was written by a newer lntune (schema {schema}, this one reads up to"
                f" {SCHEMA}). Update lntune here, or write the bundle with this release."
            )
        return msgspec.json.decode(content, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise BundleError(f"{folder / NAME} was altered: it cannot be read: {e}. {_AGAIN}") from e


def _refuse_name(folder: Path, name: str) -> None:
    """Complain of a name that leads out of the folder, or into a place where a bundle has none."""
    parts = name.split("/")
    known = parts[0] in (KERNELS, LIBRARIES, RECORDS) and len(parts) > 1
    if known and all(map(_PART.fullmatch, parts)):
        return
    raise BundleError(
        f"{folder / NAME} was altered: it names the file {name!r}, which no bundle has. {_AGAIN}"
    )


def _refuse_strangers(folder: Path, manifest: Manifest) -> None:
    """Complain of kernels and libraries that are no files of the bundle."""
    named = [(entry.file, KERNELS) for target in manifest.targets for entry in target.kernels]
    named += [(name, LIBRARIES) for name in manifest.libraries]
    for name, place in named:
        if name and (name not in manifest.files or not name.startswith(f"{place}/")):
            raise BundleError(f"{folder / NAME} was altered: {name!r} is no file of it. {_AGAIN}")


def _refuse_others(folder: Path) -> None:
    """Complain where others can change what a bundle holds."""
    for doubt in (trust.doubt_folder(folder), trust.doubt_file(folder / NAME)):
        if doubt:
            why = f"the bundle {folder} is not used, since what others put there would run as you"
            remedy = doubt.remedy(folder, "LNTUNE_BUNDLE")
            raise BundleError(f"{why}: {doubt.reason}. {remedy}")


def _files(folder: Path) -> Iterator[str]:
    """All files below a folder, by their names in it.

    Raises:
        BundleError: there is something else than files and folders, or others can write to one.
    """
    for place, folders, files in os.walk(folder, onerror=_unreadable):
        for name in (*folders, *files):
            path = Path(place, name)
            kind = path.lstat().st_mode
            shown = path.relative_to(folder).as_posix()
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                what = "a link" if stat.S_ISLNK(kind) else "no file"
                raise BundleError(f"{folder} was altered: {shown} is {what}. {_AGAIN}")
            doubt = trust.doubt_file(path) if stat.S_ISREG(kind) else trust.doubt_folder(path)
            if doubt:
                remedy = doubt.remedy(folder, "LNTUNE_BUNDLE")
                raise BundleError(f"the bundle {folder} is not used: {doubt.reason}. {remedy}")
            if stat.S_ISREG(kind):
                yield shown


def _unreadable(error: OSError) -> None:
    raise BundleError(f"cannot read {error.filename}: {error.strerror or error}.") from error


def _content(folder: Path, name: str) -> bytes:
    """What a file holds that is a file and no link."""
    path = folder / name
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0))
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BundleError(f"{folder} was altered: {name} is no file. {_AGAIN}")
            if name == NAME and status.st_size > LARGEST:
                raise BundleError(f"{path} was altered: it has {status.st_size} bytes. {_AGAIN}")
            return file.read()
    except OSError as e:
        raise BundleError(f"cannot read {path} of the bundle: {e.strerror or e}. {_AGAIN}") from e
