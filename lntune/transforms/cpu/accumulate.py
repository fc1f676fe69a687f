"""Reductions of CPU kernels that add to what their outputs hold, which neither TE nor s_tir can
say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lntune import ops
from lntune.case import Case
from lntune.transforms import tir


def add_to_outputs(mod: Any, names: Sequence[str]) -> Any:
    """The module with the reduction blocks called `names` adding to their outputs: without the init
    that would set these to 0.

    Raises:
        RuntimeError: there is no block of one of the names.
    """
    import tvm_ffi
    from tvm.s_tir.stmt import SBlock

    left = set(names)

    def without_init(block: Any, mutator: Any) -> Any:
        block = mutator.default_mutate(block)
        if block.name_hint not in left:
            return block
        left.discard(block.name_hint)
        return tir.block_with(block, init=None)

    changed = tvm_ffi.structural_mutate(mod["main"].body, [(SBlock, without_init)])
    if left:
        raise RuntimeError(f"no blocks {sorted(left)} to accumulate in")
    return tir.module_with(mod, changed)


def add_to_sums(mod: Any, case: Case) -> Any:
    """The module, whatever became of its blocks, with the arguments of role "sum" added to: without
    what sets them to 0 beforehand, which is done once for each element.
    """
    import tvm_ffi
    from tvm import tirx

    main = mod["main"]
    given = zip(ops.get(case.op).arguments(case), main.params, strict=True)
    sums = [parameter for argument, parameter in given if argument.role == "sum"]
    if not sums:
        return mod

    def kept(store: Any) -> Any:
        value = store.value
        zero = isinstance(value, tirx.FloatImm) and float(value.value) == 0.0
        held = zero and any(store.buffer.same_as(one) for one in sums)
        return tirx.Evaluate(0) if held else store

    changed = tvm_ffi.structural_map(main.body, [(tirx.BufferStore, kept)])
    return tir.module_with(mod, changed)
