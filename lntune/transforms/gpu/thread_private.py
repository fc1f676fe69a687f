"""Shared memory that serves each thread as more registers: every element is written and read by one
thread only, so no barriers are needed for it.
"""

from __future__ import annotations

import re
from typing import Any

_ATTRIBUTE = "lntune_private_shared"


def declare(mod: Any) -> Any:
    """The module, marked: no thread reads shared memory that another has written, except in sums
    over threads.

    TVM 0.27 otherwise puts a barrier between any two accesses to different elements of a buffer,
    dozens a row, and refuses those that only some threads make. Sums over threads have barriers of
    their own.
    """
    return type(mod)(
        {name: func.with_attr(_ATTRIBUTE, True) for name, func in mod.functions_items()}
    )


def _declared(mod: Any) -> bool:
    return any(func.attrs and _ATTRIBUTE in func.attrs for _, func in mod.functions_items())


def passes_to_skip(mod: Any) -> list[str]:
    """The passes of TVM that must not run on a module: for one that is marked, the pass that puts
    barriers between accesses.
    """
    return ["s_tir.ThreadSync"] if _declared(mod) else []


def with_launch_bounds(mod: Any, source: str) -> str:
    """The module's CUDA source; where the module is marked, it tells the compiler that one block
    has a multiprocessor to itself (`__launch_bounds__(threads, 1)`).

    Its shared memory leaves no room for more; ptxas 13.0 rather spills than take more registers
    than two blocks of 256 threads could have.
    """
    return (
        re.sub(r"__launch_bounds__\((\d+)\)", r"__launch_bounds__(\1, 1)", source)
        if _declared(mod)
        else source
    )
