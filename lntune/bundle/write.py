"""Writing a bundle: a folder that is there whole or not at all, and the same whenever the same is
written: no time, place or name of the machine is in it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lntune import __version__
from lntune.bundle import manifest as manifests
from lntune.bundle.manifest import File, Manifest, Target
from lntune.errors import InputError, StoreError, got_expected
from lntune.system import toolchain

FOLDER, FILE = 0o755, 0o644


def manifest_of(
    targets: Sequence[Target], libraries: Sequence[str], contents: Mapping[str, bytes]
) -> Manifest:
    """The manifest of a bundle that holds these files, by their names in it."""
    files = {
        name: File(manifests.digest_of(content), len(content))
        for name, content in sorted(contents.items())
    }
    versions = {k: v for k, v in toolchain.versions().items() if k in ("tvm", "tvm_ffi", "torch")}
    return Manifest(
        schema=manifests.SCHEMA,
        lntune=__version__,
        versions=versions,
        targets=tuple(targets),
        libraries=tuple(sorted(libraries)),
        files=files,
    )


def ensure_new(folder: Path, marks: Sequence[str] = (manifests.NAME,)) -> None:
    """Complain of a folder that cannot be written or has something else in it, before any work is
    done; `marks` are the names of which an earlier one of its kind has one.

    Raises:
        InputError: it is a file, or a folder with other things in it.
    """
    if folder.is_dir():
        there = {path.name for path in folder.iterdir()}
        if there and not there & set(marks):
            got = f"{folder}, in which there are other files"
            raise InputError(
                got_expected("output", got, "a new folder, or one of an earlier export")
            )
    elif folder.exists():
        raise InputError(got_expected("output", f"{folder}, a file", "a folder"))


def folder_of(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Put a folder with these files in the place of whatever is there; others cannot write to it.
    One that is there already, with the same files, stays as it is.

    Raises:
        StoreError: it cannot be written.
    """
    folder = folder.absolute()
    if _is(folder, contents):
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _beside(folder) as new, _beside(folder) as old:
            for name, content in sorted(contents.items()):
                path = new / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                path.chmod(FILE)
            for place in (new, *(path for path in new.rglob("*") if path.is_dir())):
                place.chmod(FOLDER)
            if folder.is_dir():
                folder.rename(old / folder.name)
            new.rename(folder)
    except OSError as e:
        raise StoreError(f"cannot write {folder}: {e.strerror or e}. Choose another folder.") from e


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A hidden folder beside another, on the same file system, which is removed if it is left."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is(folder: Path, contents: Mapping[str, bytes]) -> bool:
    """True where a folder has just these files."""
    there = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if not p.is_dir()}
    return (
        there.keys() == contents.keys()
        and all(
            not path.is_symlink()
            and path.stat().st_size == len(contents[name])
            and path.read_bytes() == contents[name]
            for name, path in there.items()
        )
        and os.access(folder, os.R_OK)
    )
