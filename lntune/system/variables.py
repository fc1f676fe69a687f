"""The environment variables that lntune reads, and those that were meant to be one: a name or a
value that is mistyped would otherwise change nothing, and nobody would say so.
"""

from __future__ import annotations

import difflib
import os
import threading
from collections.abc import Mapping

from lntune.system import callers, scratch

PREFIX = "LNTUNE_"
KNOWN = {
    "LNTUNE_BUNDLE": "bundles that serve before the logs, separated as in PATH",
    "LNTUNE_CACHE_DIR": "the folder of built kernels",
    "LNTUNE_CHECK": "0: kernels are not checked before they serve their first call",
    "LNTUNE_CUDA_GRAPHS": "0: an LSTM's time loop does not become a CUDA graph",
    "LNTUNE_EARLY_START": "0: on GPUs every kernel begins after the one before it",
    "LNTUNE_LOG_DIR": "the folder of tuning logs",
    "LNTUNE_NVCC": "the path of nvcc, or nvrtc for the library",
    "LNTUNE_RECORD_CASES": "the file that notes which cases a program's calls go through",
    "LNTUNE_SCHEDULES": "folders of schedules of your own, separated as in PATH",
    "LNTUNE_SHIPPED_LOGS": "0: the logs that lntune comes with decide nothing",
    "LNTUNE_STRICT": "1: a call that nothing measured serves raises NotTunedError",
    "LNTUNE_TRACEBACK": "1: a command that fails shows where",
    "LNTUNE_TRUST": "folders that are used whoever can write to them, separated as in PATH",
}
"""What a user may set, and what it does."""
SWITCHES = ("CHECK", "CUDA_GRAPHS", "EARLY_START", "SHIPPED_LOGS", "STRICT", "TRACEBACK")
"""Those, without the prefix, that are 0 or 1."""
OTHERS = ("LNTUNE_PACKAGES", "LNTUNE_UPDATE_GOLDEN", scratch.SYSTEM)
"""Read by tools, by the tests, and by processes that lntune starts."""
_TESTS = "LNTUNE_TEST_"
_warned = threading.Lock()
"""Taken for good by the first warning."""


class VariableWarning(UserWarning):
    """An environment variable looks like one of lntune's, and is none."""


def mistaken(environment: Mapping[str, str] | None = None) -> list[str]:
    """What is wrong with the environment's variables, a sentence each."""
    given = os.environ if environment is None else environment
    said = []
    for name in sorted(given):
        if not name.upper().startswith(PREFIX) or name in OTHERS or name.startswith(_TESTS):
            continue
        if name not in KNOWN:
            rest = name.upper().removeprefix(PREFIX)
            near = difflib.get_close_matches(rest, [n.removeprefix(PREFIX) for n in KNOWN], n=1)
            hint = (
                f" Did you mean {PREFIX}{near[0]}?"
                if near
                else " README.md has a table of those it has."
            )
            said.append(
                f"{name} is set, which is no variable of lntune's and changes nothing.{hint}"
            )
        elif name.removeprefix(PREFIX) in SWITCHES and given[name] not in ("", "0", "1"):
            said.append(f"{name}: got {given[name]}, expected 0 or 1; it is taken for 1.")
    return said


def warn_once() -> None:
    """Warn of what is mistaken, at the line that called lntune; once a process, and not again in
    the processes that it starts.
    """
    if not _warned.acquire(blocking=False) or scratch.SYSTEM in os.environ:
        return
    for message in mistaken():
        callers.warn(message, VariableWarning)
