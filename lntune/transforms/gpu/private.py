"""Shared memory whose every place is one thread's own: more registers, in effect, and no barriers
on its account.
"""

from __future__ import annotations

import re
from typing import Any

_ATTRIBUTE = "lntune_private_shared"


def declare(mod: Any) -> Any:
    """The module, saying that no thread reads what another has written to its shared memory, but
    for sums over threads.

    TVM 0.27 otherwise puts a barrier between any two accesses to different places of a buffer,
    dozens a row, and refuses those that only some threads make. Sums over threads have barriers of
    their own.
    """
    return type(mod)(
        {name: func.with_attr(_ATTRIBUTE, True) for name, func in mod.functions_items()}
    )


def _declared(mod: Any) -> bool:
    return any(func.attrs and _ATTRIBUTE in func.attrs for _, func in mod.functions_items())


def needless(mod: Any) -> list[str]:
    """The passes of TVM that a module can do without: those that put barriers between accesses,
    where it was declared.
    """
    return ["s_tir.ThreadSync"] if _declared(mod) else []


def alone(mod: Any, source: str) -> str:
    """The module's source, telling the compiler where it was declared that one block has a
    multiprocessor to itself.

    Its shared memory leaves no room for more; ptxas 13.0 rather spills than take more registers
    than two blocks of 256 threads could have.
    """
    return (
        re.sub(r"__launch_bounds__\((\d+)\)", r"__launch_bounds__(\1, 1)", source)
        if _declared(mod)
        else source
    )
