"""Matrices whose rows are further apart than they are long: views such as `x[:, :512]` and `x[:,
t]`, read where they lie.

Kernels are made for rows that lie one behind the other, which is what almost every call brings. For
other calls the same schedule is built once more, with the distance between the rows of each matrix
that it reads left open.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lntune.ops.op import Arg


def names(arguments: Iterable[Arg]) -> dict[str, str]:
    """Of an operator's arguments those whose rows may lie anywhere, the matrices that are read
    (what is written is made by the caller); and what the distance between their rows is called in
    launches and in source.
    """
    return {
        a.name: f"{a.name}_stride"
        for a in arguments
        if a.role == "in" and a.shape[:1] == ("rows",) and len(a.shape) > 1
    }


def free_rows(module: Any, arguments: Iterable[Arg], access: int | None = None) -> Any:
    """The scheduled IRModule of an operator, with the row strides of `names(arguments)` left open:
    int64, in elements.

    They are what the tensors of a call have, which TVM's calling convention on CPUs finds there;
    or, with `access`, parameters behind the module's own, multiples of so many elements.
    """
    import tvm
    import tvm_ffi
    from tvm import tirx

    func = module["main"]
    moved: list[tuple[Any, Any]] = []
    strides: list[Any] = []
    for name, called in names(arguments).items():
        old = next(p for p in func.params if str(p.name) == name)
        stride = tirx.Var(called, "int64")
        # Written as what it is, a multiple of whole accesses: TVM loads vectors only where it can
        # prove that they are aligned.
        whole = (
            tirx.floordiv(stride, tirx.IntImm("int64", access)) * tirx.IntImm("int64", access)
            if access
            else stride
        )
        kept = {
            "elem_offset": old.elem_offset,
            "offset_factor": old.offset_factor,
            "data_alignment": old.data_alignment,
        }
        moved.append(
            (
                old,
                tirx.decl_buffer(
                    old.shape,
                    old.dtype,
                    name=name,
                    strides=[whole, tirx.IntImm("int64", 1)],
                    **kept,
                ),
            )
        )
        strides.append(stride)

    def new(var: Any) -> Any:
        return next((made for old, made in moved if var.same_as(old)), var)

    body = tvm_ffi.structural_map(func.body, [(tvm.ir.Var, new)])
    params = [*(new(p) for p in func.params), *(strides if access else ())]
    return tvm.IRModule(
        {"main": tirx.PrimFunc(params, body, ret_type=func.ret_type, attrs=func.attrs)}
    )
