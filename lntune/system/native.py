"""lntune's own C files as shared libraries: compiled once per machine, stored in one step, checked
before they are loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from lntune.errors import BuildError, StoreError
from lntune.system import paths, scratch, sealed, toolchain, turns
from lntune.system.sealed import DamagedError, ForeignError

Library = TypeVar("Library", bound=ctypes.CDLL)
Loaded = TypeVar("Loaded")
FORMAT = 2
"""Of built files, part of their names: since 2 they carry a digest."""


class Build(NamedTuple):
    """How one of our files is compiled, beside what all are."""

    includes: tuple[str, ...] = ()
    """Folders of headers."""
    flags: tuple[str, ...] = ()
    """The compiler's flags."""
    libraries: tuple[str, ...] = ()
    """The linker's flags."""
    against: str = ""
    """The release whose binary interface it uses, which makes it a file of its own; empty where
    that does not matter.
    """


PLAIN = Build()
shipped: dict[str, Path] = {}
"""Compiled forms of our files that came from elsewhere, by their names in the cache."""
PORTABLE = Path(__file__).parent / "portable.h"
"""Included before all else, so that what is compiled here loads where the C library is older."""
telling: list[Callable[[str], None]] = []
"""Who is told, the last one alone, before a file is compiled that takes more than a moment."""
_compiling: dict[Path, threading.RLock] = {}
os.register_at_fork(after_in_child=_compiling.clear)  # a child has not the thread that compiles


@functools.cache
def source_hash(source: Path) -> str:
    """Hash of a C file and of what is included in all of them."""
    return hashlib.sha256(source.read_bytes() + PORTABLE.read_bytes()).hexdigest()[:12]


def name_of(source: Path, build: Build = PLAIN) -> str:
    """What the compiled form of a C or C++ file of ours is called."""
    against = f"-{hashlib.sha256(build.against.encode()).hexdigest()[:8]}" if build.against else ""
    return f"{source.stem}-{source_hash(source)}{against}.{FORMAT}.so"


def path_of(source: Path, build: Build = PLAIN) -> Path:
    """Where the compiled form of a C or C++ file of ours is cached."""
    return paths.cached("runtime", name_of(source, build))


def is_there(source: Path, build: Build = PLAIN) -> bool:
    """True where a library can be loaded without compiling it."""
    return name_of(source, build) in shipped or path_of(source, build).is_file()


def compiled(source: Path, build: Build = PLAIN) -> Path:
    """The library of a C or C++ file, compiled now if it is not there yet.

    Raises:
        BuildError: it cannot be compiled or stored.
    """
    path = path_of(source, build)
    if not path.is_file():
        # threads that come at the same time wait for the first
        with _compiling.setdefault(path, threading.RLock()):
            if not path.is_file():
                _compile(source, build, path)
    return path


def _compile(source: Path, build: Build, path: Path) -> None:
    includes = [f"-I{folder}" for folder in build.includes]
    flags = ["-O2", "-include", str(PORTABLE), *build.flags, *includes, *toolchain.shared()]
    with turns.turn(path) as made:
        if made:  # by another process
            return
        if telling and source.suffix != ".c":
            telling[-1](
                f"compiling {source.name}, once for this machine and these versions: some ten"
                " seconds"
            )
        with atomic(path) as temporary:
            toolchain.run_compiler([*flags, str(source), *build.libraries, "-ldl"], temporary)
            sealed.seal(temporary, {"source": source.name})


def load(source: Path, kind: type[Library], build: Build = PLAIN) -> Library:
    """The loaded library of a C or C++ file, from where it was shipped if it was; a damaged file of
    the cache is put aside and compiled once more.

    Raises:
        BuildError: it cannot be compiled, stored or loaded.
    """
    if there := shipped.get(name_of(source, build)):
        with contextlib.suppress(DamagedError, OSError):  # then as if it were not there
            return sealed.loaded(there, lambda: kind(str(there)))
    path = compiled(source, build)

    def checked() -> Library:
        return sealed.loaded(path, lambda: kind(str(path)))

    return fetch(path, checked, lambda: _compile(source, build, path))


def fetch(path: Path, load: Callable[[], Loaded], make: Callable[[], object]) -> Loaded:
    """What `load` makes of a built file, which it checks (`sealed.loaded`, `sealed.read`). The file
    is made again by `make` where it is damaged, and then put aside, or where the system refuses to
    load it: it was built where there is another C library, or half of what it needs is gone.

    Raises:
        BuildError: it cannot be made, or not be loaded when it is new either.
    """
    try:
        return load()
    except DamagedError as e:
        sealed.put_aside(path, str(e), isinstance(e, ForeignError))
        make()
    except OSError as refused:
        try:
            make()
        except BuildError as e:  # the old file's error comes first: nothing can be built here
            raise BuildError(
                f"cannot load {path}: {refused}. Nor can it be built again: {e}"
            ) from refused
    try:
        return load()
    except OSError as e:
        raise BuildError(
            f"cannot load {path}: {e}."
            " Delete it, or choose another cache folder with LNTUNE_CACHE_DIR."
        ) from e


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A file of the cache, made as `scratch.whole` has it, which nobody else can write to.

    Raises:
        StoreError: the folder cannot be written or the disk is full.
    """
    try:
        with scratch.whole(path, closed=True) as temporary:
            yield temporary
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        raise StoreError(
            f"cannot store {path}: {e.strerror or e}."
            f" {'Free some space, or choose' if full else 'Choose'}"
            " another cache folder with LNTUNE_CACHE_DIR."
        ) from e
