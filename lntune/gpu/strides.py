"""Matrices whose rows are further apart than they are long: views such as `x[:, :512]` and `x[:, t]`, read where they lie.

Kernels are made for rows that lie one behind the other, which is what almost every call brings. For other calls the same schedule is
built once more, with the distance between the rows of each matrix it reads as an argument.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lntune.ops.op import Arg


def names(arguments: Iterable[Arg]) -> dict[str, str]:
    """Of an operator's arguments those whose rows may lie anywhere, the matrices that are read (what is written is made by the caller); and
    what the distance between their rows is called in launches and in CUDA source.
    """
    return {a.name: f"{a.name}_stride" for a in arguments if a.role == "in" and a.shape[:1] == ("rows",) and len(a.shape) > 1}


def free_rows(module: Any, free: Mapping[str, str], access: int) -> Any:
    """The scheduled IRModule with the row strides of some of its parameters as parameters behind its own: int64, in elements, multiples of
    `access`. `free` has the names of both.
    """
    import tvm
    import tvm_ffi
    from tvm import tirx

    func = module["main"]
    moved: list[tuple[Any, Any]] = []
    strides: list[Any] = []
    for name, stride in free.items():
        old = next(p for p in func.params if str(p.name) == name)
        strides.append(tirx.Var(stride, "int64"))
        # Written as what it is, a multiple of whole accesses: TVM stores and loads vectors only where it can prove that they are aligned.
        whole = tirx.floordiv(strides[-1], tirx.IntImm("int64", access)) * tirx.IntImm("int64", access) if access > 1 else strides[-1]
        moved.append((old, tirx.decl_buffer(old.shape, old.dtype, name=name, strides=[whole, tirx.IntImm("int64", 1)])))

    def new(var: Any) -> Any:
        return next((made for old, made in moved if var.same_as(old)), var)

    body = tvm_ffi.structural_map(func.body, [(tvm.ir.Var, new)])
    made = tirx.PrimFunc([*(new(p) for p in func.params), *strides], body, ret_type=func.ret_type, attrs=func.attrs)
    return tvm.IRModule({"main": made})
