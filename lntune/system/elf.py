"""What a shared library of Linux asks the system's libraries for: the versions of their symbols, as
`readelf -V` shows them. A library that asks for one that is newer than a system has does not load
there.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lntune.errors import BuildError

OLDEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
"""The newest versions that what is built may ask for: those of manylinux_2_28."""
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_NEED = struct.Struct("<HHIII")
_VERSION = struct.Struct("<IHHII")
_VERNEED = 0x6FFFFFFE
_NUMBERED = re.compile(r"([A-Z]+)_([0-9]+(?:\.[0-9]+)*)")


class Needed(NamedTuple):
    """A version of symbols that a file asks a library for: "libc.so.6", "GLIBC_2.14"."""

    library: str
    version: str


def needed(path: Path) -> list[Needed]:
    """The versions that a shared library asks others for, in their order in the file; none of a
    file that asks for none.

    Raises:
        BuildError: it is no ELF file of 64 bits.
        OSError: it cannot be read.
    """
    return of(path.read_bytes(), str(path))


def of(data: bytes, name: str) -> list[Needed]:
    """`needed` of a file's content; errors name the file."""
    try:
        return _needed(data)
    except (struct.error, ValueError, IndexError) as e:
        raise BuildError(f"{name} is no shared library of Linux that can be read: {e}") from e


def _needed(data: bytes) -> list[Needed]:
    identity, *_, start, _, _, _, _, size, count, _ = _HEADER.unpack_from(data)
    if identity[:6] != b"\x7fELF\2\1":
        raise ValueError("it does not begin as one of 64 bits, little-endian, does")
    sections = [_SECTION.unpack_from(data, start + i * size) for i in range(count)]
    found = []
    for _, kind, _, _, offset, _, link, entries, *_ in sections:
        if kind != _VERNEED:
            continue
        names = sections[link][4]
        at = offset
        for _ in range(entries):
            _, versions, file, first, following = _NEED.unpack_from(data, at)
            place = at + first
            for _ in range(versions):
                _, _, _, name, after = _VERSION.unpack_from(data, place)
                found.append(Needed(_text(data, names + file), _text(data, names + name)))
                place += after
            at += following
    return found


def _text(data: bytes, place: int) -> str:
    return data[place : data.index(b"\0", place)].decode()


def newest(needs: Iterable[Needed]) -> dict[str, tuple[int, ...]]:
    """The newest version of each kind that is asked for: {"GLIBC": (2, 14)}."""
    most: dict[str, tuple[int, ...]] = {}
    for _, version in needs:
        if match := _NUMBERED.fullmatch(version):
            number = tuple(map(int, match[2].split(".")))
            most[match[1]] = max(most.get(match[1], ()), number)
    return most


def too_new(path: Path) -> list[str]:
    """What a file asks for beyond OLDEST, "GLIBC_2.34 of libc.so.6"; errors: see `needed`."""
    return [
        f"{version} of {library}"
        for library, version in needed(path)
        if (match := _NUMBERED.fullmatch(version))
        and match[1] in OLDEST
        and tuple(map(int, match[2].split("."))) > OLDEST[match[1]]
    ]
