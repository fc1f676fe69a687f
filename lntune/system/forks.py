"""Locks that a forked child must not find shut: a process forks only while nobody has them.

A child has none of its parent's other threads, and would wait for ever for a lock that one of them
held. Before a fork all locks are therefore taken, in the order in which the code takes them inside
each other, whichever module was imported first.
"""

from __future__ import annotations

import os
from typing import Protocol, TypeVar

OUTER, DECISION, INNER = range(3)
"""A lock's rank: those of a higher one are taken inside those of a lower one, never the other way
round.
"""


class Lock(Protocol):
    """threading.Lock or threading.RLock."""

    def acquire(self) -> bool:
        """Take it."""

    def release(self) -> None:
        """Give it up."""


AnyLock = TypeVar("AnyLock", bound=Lock)
_locks: list[tuple[int, Lock]] = []
_taken: list[Lock] = []


def held_at_fork(lock: AnyLock, rank: int) -> AnyLock:
    """The lock, which this process from now on holds while it forks."""
    _locks.append((rank, lock))
    _locks.sort(key=lambda one: one[0])
    return lock


def _take() -> None:
    for _, lock in list(_locks):
        lock.acquire()
        _taken.append(lock)


def _give_up() -> None:
    while _taken:
        _taken.pop().release()


os.register_at_fork(before=_take, after_in_parent=_give_up, after_in_child=_give_up)
