"""Messages between a tuning run and its child, told from whatever a candidate writes.

A message is a header (the number of the job that it belongs to, a word, the length and the checksum
of what follows) and its content. The number is drawn for each job, so no bytes that a kernel writes
on every descriptor pass for an answer: the first that is not what it has to be ends the child.
"""

from __future__ import annotations

import os
import struct
import zlib

LONGEST = 64 << 20
"""Bytes of a message's content at most. An answer has some thousand."""
READY, JOB, TAKEN, ANSWER = b"READY", b"JOB  ", b"TAKEN", b"REPLY"
"""The words: the child is there, has work to do, has begun with it, has done it."""
UNHEARD = 86
"""The exit code of a child whose descriptors are not what they were, so that it cannot answer."""
NUMBER = 16
"""Bytes of a job's number."""
_HEADER = struct.Struct(f">{NUMBER}s5sII")
_SHOWN = 40


class GarbledError(Exception):
    """What came is no message; the text says what it is instead."""


def new_number() -> bytes:
    """A number for a job, which nobody can guess."""
    return os.urandom(NUMBER)


def packed(number: bytes, word: bytes, content: bytes = b"") -> bytes:
    """A message as it is sent."""
    return _HEADER.pack(number, word, len(content), zlib.crc32(content)) + content


class Reader:
    """Takes messages of one job from a stream that comes in pieces."""

    def __init__(self, number: bytes) -> None:
        self._number, self._come = number, bytearray()

    @property
    def waiting(self) -> bytes:
        """What came and is no whole message yet."""
        return bytes(self._come)

    def feed(self, piece: bytes) -> None:
        """More has come."""
        self._come += piece

    def message(self) -> tuple[bytes, bytes] | None:
        """The word and the content of the next message, None until all of it has come.

        Raises:
            GarbledError: what came is not the beginning of one.
        """
        if not self._number.startswith(self._come[:NUMBER]):
            raise GarbledError(f"no answer but {shown(self.waiting)}")
        if len(self._come) < _HEADER.size:
            return None
        _, word, length, checksum = _HEADER.unpack_from(self._come)
        if length > LONGEST:
            raise GarbledError(f"an answer of {length} bytes, at most {LONGEST} are expected")
        end = _HEADER.size + length
        if len(self._come) < end:
            return None
        content = bytes(self._come[_HEADER.size : end])
        if zlib.crc32(content) != checksum:
            raise GarbledError(f"an answer with other bytes in it: {shown(content)}")
        del self._come[:end]
        return word, content


def shown(content: bytes) -> str:
    """The beginning of some bytes, for messages."""
    return repr(content[:_SHOWN])[1:] + (" ..." if len(content) > _SHOWN else "")


def send(descriptor: int, message: bytes) -> None:
    """Write all of a message to a pipe.

    Raises:
        OSError: nobody reads it, or the descriptor is closed.
    """
    while message:
        message = message[os.write(descriptor, message) :]


def receive(descriptor: int) -> tuple[bytes, bytes] | None:
    """The number and the content of the next message on a pipe, whosever it is; None at the end.

    Raises:
        OSError: the descriptor is closed.
    """
    header = _exactly(descriptor, _HEADER.size)
    if len(header) < _HEADER.size:
        return None
    number, _, length, _ = _HEADER.unpack(header)
    content = _exactly(descriptor, length)
    return (number, content) if len(content) == length else None


def _exactly(descriptor: int, count: int) -> bytes:
    """So many bytes; fewer at the end."""
    content = bytearray()
    while len(content) < count and (piece := os.read(descriptor, count - len(content))):
        content += piece
    return bytes(content)
