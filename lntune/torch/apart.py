"""Work that a user's modes do not reach, and that does not reach them.

What PyTorch holds of a thread is all that a `with` block or a transform changes: gradients,
inference mode, autocast, default devices, dispatch and function modes, functorch's levels, the
current stream, how denormal numbers are taken. A new thread has none of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from lntune.check import team

Result = TypeVar("Result")
_threads: set[int] = set()


def here() -> bool:
    """True in a thread of `run`."""
    return threading.get_ident() in _threads


def run(work: Callable[[], Result]) -> Result:
    """What `work` gives in a thread of its own, which shares its work with as many others
    as this one does, or raises there. An interrupt leaves it to end by itself, unheard.

    Raises:
        RuntimeError: there can be no thread: too many, or Python is about to end.
        Exception: what `work` raises.
    """
    import torch

    results: list[Result] = []
    errors: list[BaseException] = []
    threads = torch.get_num_threads()

    def perform() -> None:
        _threads.add(threading.get_ident())
        try:
            torch.set_flush_denormal(False)  # a thread begins as the one that starts it
            team.of(threads)  # and with what torch.set_num_threads was told last, in any thread
            results.append(work())
        except BaseException as e:
            errors.append(e)
        finally:
            _threads.discard(threading.get_ident())

    thread = threading.Thread(target=perform, name="lntune-check", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
