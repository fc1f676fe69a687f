"""Row-strided matrices, whose rows are not contiguous in memory: views such as `x[:, :512]` and
`x[:, t]`, which kernels read without a copy.

Kernels are built for contiguous rows, which is what almost every call brings. For other calls the
same schedule is built once more, with the row stride of each matrix that it reads as an argument.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lntune.errors import UnfitError
from lntune.ops.op import Arg

CONTIGUOUS = "lntune_contiguous"
"""Attribute of a scheduled PrimFunc whose rows have to follow one another in memory."""


def names(arguments: Iterable[Arg]) -> dict[str, str]:
    """Argument -> what its row stride is called in launches and in source, of those that may be
    row-strided: the matrices that are read (those that are written the caller allocates).
    """
    return {
        a.name: f"{a.name}_stride"
        for a in arguments
        if a.role == "in" and a.shape[:1] == ("rows",) and len(a.shape) > 1
    }


def free_rows(module: Any, arguments: Iterable[Arg], vector_width: int | None = None) -> Any:
    """The scheduled IRModule of an operator, for row strides of `names(arguments)` that are known
    only at the call: int64, in elements.

    They are those of the call's tensors, from which TVM's calling convention on CPUs takes them;
    or, with `vector_width`, parameters behind the module's own, multiples of so many elements.

    Raises:
        UnfitError: it is scheduled for rows that follow one another in memory.
    """
    import tvm
    import tvm_ffi
    from tvm import tirx

    func = module["main"]
    if CONTIGUOUS in func.attrs:
        reason = "vectors that do not divide a row are for rows that follow one another in memory"
        raise UnfitError(f"{reason}: choose another vector_width for rows that lie apart.", reason)
    replaced: list[tuple[Any, Any]] = []
    strides: list[Any] = []
    for name, called in names(arguments).items():
        old = next(p for p in func.params if str(p.name) == name)
        stride = tirx.Var(called, "int64")
        # Written as a multiple of whole vectors: TVM loads vectors only where it can prove that
        # they are aligned.
        whole = (
            tirx.floordiv(stride, tirx.IntImm("int64", vector_width))
            * tirx.IntImm("int64", vector_width)
            if vector_width
            else stride
        )
        kept = {
            "elem_offset": old.elem_offset,
            "offset_factor": old.offset_factor,
            "data_alignment": old.data_alignment,
        }
        replaced.append(
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
        return next((strided for old, strided in replaced if var.same_as(old)), var)

    body = tvm_ffi.structural_map(func.body, [(tvm.ir.Var, new)])
    params = [*(new(p) for p in func.params), *(strides if vector_width else ())]
    return tvm.IRModule(
        {"main": tirx.PrimFunc(params, body, ret_type=func.ret_type, attrs=func.attrs)}
    )
