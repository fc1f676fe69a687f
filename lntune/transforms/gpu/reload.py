"""An argument loaded again where the compiler would keep it in registers."""

from __future__ import annotations

from typing import Any

from lntune.transforms import tir

FUNCTION = "lntune_reload"
"""What CUDA source calls with an argument's pointer: a macro, defined in
lntune/backends/cuda/device_code.py, after which the compiler takes it for another pointer.
"""


def after(mod: Any, stage: str, name: str) -> Any:
    """The module with the argument `name` loaded again by what follows the block `stage`.

    It comes from the cache. nvcc otherwise keeps what it has loaded before in registers, which what
    follows needs more.
    """
    import tvm_ffi
    from tvm import tirx
    from tvm.s_tir.stmt import SBlock

    func = mod["main"]
    argument = next(p for p in func.params if str(p.name) == name)

    def with_call(block: Any) -> Any:
        if block.name_hint != stage:
            return block
        call = tirx.Evaluate(tirx.call_extern("int32", FUNCTION, argument.data))
        return tir.block_with(block, body=tirx.SeqStmt([block.body, call]))

    return tir.module_with(mod, tvm_ffi.structural_map(func.body, [(SBlock, with_call)]))
