"""Strict mode and reload: what holds for all calls of a process, and what forgets how earlier calls
were decided.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

LOCK = threading.RLock()
"""Held while a case is decided on and its kernel built or loaded."""
_inner: list[Any] = []
"""Locks that are taken while LOCK is held, and never the other way round."""


def _before_fork() -> None:
    for lock in (LOCK, *_inner):
        lock.acquire()


def _after_fork() -> None:
    for lock in (*reversed(_inner), LOCK):
        lock.release()


# A process forks only between two decisions: a child that inherits a lock shut by another thread
# would wait for ever. Before a fork locks are taken in the order in which decisions take them.
os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


def hold_at_fork(lock: threading.Lock) -> threading.Lock:
    """The lock, which decisions take: a process forks only while nobody has it."""
    _inner.append(lock)
    return lock


_decisions: list[Callable[[], None]] = []
_kernel_users: list[Callable[[], None]] = []
_strict = os.environ.get("LNTUNE_STRICT", "") not in ("", "0")


class _RestoreStrict:
    """What `strict` gives: a context manager at whose end the mode is again what it was before."""

    def __init__(self, before: bool) -> None:
        self._before = before

    def __enter__(self) -> None:
        """The mode is set already."""

    def __exit__(self, *_: object) -> None:
        strict(self._before)


def strict(enabled: bool = True) -> _RestoreStrict:
    """From now on raise NotTunedError for a call whose case was not measured on this device,
    instead of stepping down.

    `with lntune.strict():` does so in a block, in all threads. `LNTUNE_STRICT=1` in the environment
    does the same from the start. Calls that no kernel takes whatever is measured (float64, tensor
    subclasses) are PyTorch's as before; why is logged (logger "lntune", level DEBUG).
    """
    global _strict
    before, _strict = _strict, enabled
    reload()
    return _RestoreStrict(before)


def is_strict() -> bool:
    """True in strict mode."""
    return _strict


def reload() -> None:
    """Forget every decision and read the tuning logs again at the next call: after tuning in the
    same process.
    """
    with LOCK:
        for forget in _decisions:
            forget()
        kernels_changed()


def kernels_changed() -> None:
    """Have everything forgotten that rests on which kernels serve, but not the decisions."""
    for forget in _kernel_users:
        forget()


def on_reload(forget: Callable[[], None]) -> Callable[[], None]:
    """Have `forget` called at every reload: for decisions and what was warned of. Gives it back,
    as a decorator does.
    """
    _decisions.append(forget)
    return forget


def on_kernels_changed(forget: Callable[[], None]) -> Callable[[], None]:
    """Have `forget` called at every reload and when a kernel can be had that could not before: for
    tables and graphs of kernels. Gives it back, as a decorator does.
    """
    _kernel_users.append(forget)
    return forget
