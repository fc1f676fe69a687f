"""Every error lntune raises on purpose; each message names what was got, what was expected and the
remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LntuneError(Exception):
    """Base of all errors raised by lntune."""


class InputError(LntuneError, ValueError):
    """An argument has a wrong shape, dtype, device or value."""


class UnknownNameError(LntuneError, LookupError):
    """An operator, schedule, knob, search or command option that does not exist."""


class LogError(LntuneError, OSError):
    """A tuning log cannot be read or written."""


class BuildError(LntuneError, RuntimeError):
    """A kernel could not be compiled, linked or stored."""


class StoreError(BuildError):
    """What was built cannot be kept: the cache's folder cannot be written, or the disk is full."""


class ToolchainError(BuildError):
    """The machine lacks something building needs: a C++ compiler or a matching TVM."""


class LaunchError(LntuneError, RuntimeError):
    """A GPU's driver refused to launch a kernel, or an earlier kernel failed on the device."""


class ScheduleError(LntuneError, RuntimeError):
    """A schedule file cannot be loaded, or its knobs do not fit the case."""


class UnfitError(ScheduleError):
    """Knobs do not fit a case; `reason` is what the schedule says of them."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class NotTunedError(LntuneError, LookupError):
    """`strict=True` was asked for and no record of this device serves the call."""


class DisagreementError(LntuneError, RuntimeError):
    """Processes that work together call different kernels."""


def got_expected(argument: str, got: object, expected: str, remedy: str = "") -> str:
    """One sentence in the form all argument errors share."""
    tail = f" {remedy}" if remedy else ""
    return f"{argument}: got {got}, expected {expected}.{tail}"


def unknown(kind: str, got: str, known: Iterable[str]) -> UnknownNameError:
    """An UnknownNameError that lists what exists and suggests the near miss."""
    names = sorted(known)
    near = difflib.get_close_matches(got, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UnknownNameError(f"unknown {kind} {got!r}.{hint} Known: {', '.join(names) or 'none'}.")


def gist(error: Exception) -> str:
    """An error without the program TVM prints in it: its first and its last line, which says what
    is wrong.
    """
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [""]
    return lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"
