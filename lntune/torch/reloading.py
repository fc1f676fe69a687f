"""Strict mode and reload: what holds for all calls of a process, and what forgets how earlier calls
were decided.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from lntune.system.forks import DECISION, held_at_fork

LOCK = held_at_fork(threading.RLock(), DECISION)
"""Held while a case is decided on and its kernel built or loaded."""
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
