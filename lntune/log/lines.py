"""The lines of a tuning log, whoever wrote it: one at a time, none of any length, of files alone.

Nothing here knows what a line means.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lntune.errors import LogError

LONGEST = 4 << 20
"""Bytes of a line; the longest that a tuning run has written has 41,257."""
LARGEST = 256 << 20
"""Bytes of a file: some 150,000 trials of an operator on a device, or a hundred runs of an hour."""
_PIECE = 1 << 16


def opened(path: Path) -> BinaryIO:
    """A log, to be read.

    Raises:
        LogError: it cannot be read, or is no file: a pipe, a device, or a link to a file that is no
            log.
    """
    try:
        if path.is_symlink() and path.resolve().suffix != path.suffix:
            raise LogError(
                f"cannot read the tuning log {path}: it is a link to {path.resolve()}, which is no"
                f" {path.suffix or 'tuning log'}."
            )
        # a pipe is opened without waiting for who writes to it
        file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb")
    except (OSError, ValueError) as e:
        if isinstance(e, LogError):
            raise
        reason = getattr(e, "strerror", None) or e
        raise LogError(f"cannot read the tuning log {path}: {reason}.") from e
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise LogError(f"cannot read the tuning log {path}: it is no file.")
    return file


def of_file(path: Path, largest: int | None = LARGEST) -> Iterator[tuple[int, bytes, str]]:
    """The lines of a log: number, content and why it cannot be used, in words; one that is too long
    is passed over, and so is what lies beyond `largest` bytes of the file, where that is not None.

    Raises:
        LogError: it cannot be read, see `opened`.
    """
    with opened(path) as file:
        number = size = 0
        try:
            while line := file.readline(LONGEST + 1):
                number += 1
                size += len(line)
                fault = ""
                if len(line) > LONGEST:
                    fault = f"it is longer than {LONGEST:,} bytes"
                    while not line.endswith(b"\n") and not _beyond(size, largest):
                        if not (line := file.readline(_PIECE)):
                            break
                        size += len(line)
                    line = b""
                if _beyond(size, largest):
                    remedy = "lntune prune makes a log smaller"
                    yield number, b"", f"the file is larger than {largest:,} bytes; {remedy}"
                    return
                yield number, line.rstrip(b"\n"), fault
        except OSError as e:
            raise LogError(f"cannot read the tuning log {path}: {e.strerror or e}.") from e


def _beyond(size: int, largest: int | None) -> bool:
    return largest is not None and size > largest
