"""Shared memory whose every place is one thread's own: more registers, in effect, and no barriers on its account."""

from __future__ import annotations

from typing import Any

_ATTRIBUTE = "lntune_private_shared"


def declare(mod: Any) -> Any:
    """The module, saying that no thread reads what another has written to its shared memory, but for sums over threads.

    TVM 0.27 otherwise puts a barrier between any two accesses to different places of a buffer, dozens a row, and refuses those that only some
    threads make. Sums over threads have barriers of their own.
    """
    import tvm

    return tvm.IRModule({name: func.with_attr(_ATTRIBUTE, True) for name, func in mod.functions_items()})


def needless(mod: Any) -> list[str]:
    """The passes of TVM that a module can do without: those that put barriers between accesses, where it was declared."""
    return ["s_tir.ThreadSync"] if any(func.attrs and _ATTRIBUTE in func.attrs for _, func in mod.functions_items()) else []
