"""Files that carry a digest of their content, so that one changed bit is found before it is run.

The digest stands at the end of the file, behind facts on how the content was made, where the loader
of shared libraries does not look: one rename puts file and digest in place, and nothing parts them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from lntune.errors import BuildError
from lntune.system import callers

Loaded = TypeVar("Loaded")
Facts = dict[str, str]

_END = struct.Struct("<Q32s8s")
"""Bytes of the facts, SHA-256 of all before it, the mark."""
_MARK = b"lntune\0\1"
_KEPT = 8
"""Damaged files that are kept in a folder, for whoever wants to know what became of them."""
_ATTEMPTS = 3


class DamagedError(BuildError):
    """A file in the cache is not what was put there."""


class ForeignError(DamagedError):
    """A file in the cache is whole, and was made for something else than its name stands for."""


class DamagedWarning(UserWarning):
    """A file in the cache was damaged; it was put aside."""


class Sealed(NamedTuple):
    """What a sealed file has, and which of all files that had its name it is."""

    content: memoryview
    facts: Facts
    identity: tuple[int, ...]


def end(content: bytes, facts: Mapping[str, str]) -> bytes:
    """What follows the content of a sealed file."""
    encoded = msgspec.json.encode(dict(facts), order="sorted")
    length = struct.pack("<Q", len(encoded))
    return encoded + length + hashlib.sha256(content + encoded + length).digest() + _MARK


def seal(path: Path, facts: Mapping[str, str]) -> None:
    """Add facts and digest to a file that was just written, before it takes its name."""
    with path.open("rb+") as file:
        file.write(end(file.read(), facts))


def read(path: Path) -> Sealed:
    """The content and the facts of a sealed file.

    Raises:
        DamagedError: the file is not there, cut short, or was changed.
        OSError: it cannot be read at the moment.
    """
    try:
        with path.open("rb") as file:
            whole = memoryview(file.read())
            identity = _identity(os.fstat(file.fileno()))
    except FileNotFoundError as e:
        raise DamagedError(f"{path} is not there.") from e
    if len(whole) < _END.size or whole[-len(_MARK) :] != _MARK:
        raise DamagedError(f"{path} is damaged: it is cut short, or was overwritten.")
    length, digest, _ = _END.unpack_from(whole, len(whole) - _END.size)
    if hashlib.sha256(whole[: len(whole) - len(digest) - len(_MARK)]).digest() != digest:
        raise DamagedError(f"{path} is damaged: its content is not what was stored (SHA-256).")
    place = len(whole) - _END.size - length
    return Sealed(
        whole[:place], msgspec.json.decode(whole[place : place + length], type=Facts), identity
    )


def digest(path: Path) -> str:
    """The digest at the end of a sealed file; not checked.

    Raises:
        DamagedError: there is no such file, or none is in it.
    """
    try:
        with path.open("rb") as file:
            file.seek(-_END.size, os.SEEK_END)
            stored: bytes
            _, stored, mark = _END.unpack(file.read())
    except FileNotFoundError as e:
        raise DamagedError(f"{path} is not there.") from e
    except (OSError, struct.error) as e:
        raise DamagedError(f"{path} is damaged: {e}") from e
    if mark != _MARK:
        raise DamagedError(f"{path} is damaged: it is cut short, or was overwritten.")
    return stored.hex()


def facts(path: Path) -> Facts:
    """The facts of a sealed file alone, at no more than the cost of reading these; not checked.

    Raises:
        DamagedError: there is no such file, or no facts are in it.
    """
    try:
        with path.open("rb") as file:
            place = file.seek(-_END.size, os.SEEK_END)
            length, _, mark = _END.unpack(file.read())
            file.seek(max(place - length, 0))
            if mark != _MARK:
                raise DamagedError(f"{path} is damaged: it is cut short, or was overwritten.")
            return msgspec.json.decode(file.read(length), type=Facts)
    except FileNotFoundError as e:
        raise DamagedError(f"{path} is not there.") from e
    except (ValueError, OverflowError, OSError, msgspec.MsgspecError) as e:
        raise DamagedError(f"{path} is damaged: {e}") from e


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def loaded(path: Path, load: Callable[[], Loaded]) -> Loaded:
    """What `load` makes of a sealed file, whose digest was checked: that of the very file that was
    loaded, should another process have put a new one in its place meanwhile.

    Raises:
        DamagedError, OSError: as read. Nothing was loaded then, or a new file is damaged.
    """
    for _ in range(_ATTEMPTS):
        checked = read(path)
        content = load()
        try:
            if _identity(path.stat()) == checked.identity:
                break
        except FileNotFoundError:  # the cache was emptied meanwhile
            break
    return content


def put_aside(path: Path, reason: str, whole: bool = False) -> None:
    """Rename a damaged file to NAME.damaged, so that nobody loads it, and warn of it; `whole`: it
    is none by its digest.
    """
    with contextlib.suppress(DamagedError, OSError):
        if not whole:
            read(path)
            return  # another process has put a new one in its place
    aside = path.with_name(f"{path.name}.damaged")
    try:
        path.replace(aside)
        outcome = f"it is kept as {aside.name}"
    except FileNotFoundError:  # another process was faster, and has said it
        return
    except OSError as e:
        outcome = f"it cannot be put aside: {e.strerror or e}"
    remedy = "It is built again where that is possible."
    callers.warn(f"{reason.rstrip('.')}; {outcome}. {remedy}", DamagedWarning)
    with contextlib.suppress(OSError):
        damaged = sorted(path.parent.glob("*.damaged"), key=lambda p: p.stat().st_mtime_ns)
        for old in damaged[:-_KEPT]:
            old.unlink()
