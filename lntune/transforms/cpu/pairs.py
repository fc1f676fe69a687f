"""Kernels scheduled for pairs of bfloat16, called with tensors of bfloat16."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lntune.ops.op import Arg
from lntune.transforms import tir
from lntune.transforms.cpu.alignment import SMALLEST


def as_elements(mod: Any, arguments: Iterable[Arg]) -> Any:
    """The module, whose parameters are pairs of bfloat16 taken as one uint32 (see ops/dtypes.py),
    with parameters in bfloat16, as callers have them; its body sees them as before.
    """
    import tvm
    from tvm import tirx

    func = mod["main"]
    params, views = list(func.params), []
    dtypes = {arg.name: arg.dtype for arg in arguments}
    for place, pairs in enumerate(func.params):
        if dtypes[str(pairs.name)] != "bfloat16":
            continue
        *rows, columns = pairs.shape
        params[place] = tirx.decl_buffer(
            (*rows, columns * 2), "bfloat16", name=str(pairs.name), data_alignment=SMALLEST
        )
        views.append(tirx.DeclBuffer(pairs, data=params[place].data))
    root = func.body.block
    body = tir.block_with(root, body=tirx.SeqStmt([*views, root.body]))
    realized = type(func.body)(func.body.iter_values, func.body.predicate, body)
    new = tirx.PrimFunc(params, realized, ret_type=func.ret_type, attrs=func.attrs)
    return tvm.IRModule({"main": new})
