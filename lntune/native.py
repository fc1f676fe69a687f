"""Our own C files as shared libraries: compiled once per machine, stored in one step, checked before they are mapped."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from lntune import paths, toolchain
from lntune.errors import BuildError

Library = TypeVar("Library", bound=ctypes.CDLL)


@functools.cache
def source_hash(source: Path) -> str:
    """Hash of a C file."""
    return hashlib.sha256(source.read_bytes()).hexdigest()[:12]


def path_of(source: Path) -> Path:
    """Where the compiled form of a C file of ours is cached."""
    return paths.cache_dir() / "runtime" / f"{source.stem}-{source_hash(source)}.so"


def compiled(source: Path, includes: Sequence[str] = ()) -> Path:
    """The library of a C file, compiled now if it is not there yet.

    Raises:
        BuildError: it cannot be compiled or stored.
    """
    path = path_of(source)
    if not path.is_file():
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        with atomic(path) as temporary:
            toolchain.run_compiler(["-O2", "-shared", "-fPIC", *(f"-I{i}" for i in includes), *undefined, str(source), "-ldl"], temporary)
    return path


def load(source: Path, kind: type[Library], includes: Sequence[str] = ()) -> Library:
    """The loaded library of a C file; a damaged file is compiled once more.

    Raises:
        BuildError: it cannot be compiled, stored or loaded.
    """
    path = compiled(source, includes)
    try:
        check_whole(path)
        return kind(str(path))
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink()
        try:
            return kind(str(compiled(source, includes)))
        except OSError as e:
            raise BuildError(f"cannot load the runtime {path}: {e}. Delete it, or choose another cache folder with LNTUNE_CACHE_DIR.") from e


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name when the block ends well and vanishes when it does not.

    Raises:
        BuildError: the folder cannot be written or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as e:
        raise BuildError(f"cannot store {path}: {e.strerror or e}. Free some space, or choose another cache folder with LNTUNE_CACHE_DIR.") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_whole(path: Path) -> None:
    """OSError for a library that was cut short: the system would map what is missing, and kill the process on touching it.

    In an ELF file the section headers come last, and their place is in the first 64 bytes.
    """
    size = 64
    with path.open("rb") as file:
        head = file.read(size)
    if sys.platform != "linux" or sys.maxsize < 2**32:
        return
    end = int.from_bytes(head[40:48], sys.byteorder) + int.from_bytes(head[58:60], sys.byteorder) * int.from_bytes(head[60:62], sys.byteorder)
    if head[:4] != b"\x7fELF" or len(head) < size or path.stat().st_size < end:
        raise OSError(f"{path} is not a whole shared library")
