"""The alignment that a CPU kernel expects of its tensors."""

from __future__ import annotations

from typing import Any

from lntune.transforms import tir

SMALLEST = 2
"""Bytes of the smallest element of any dtype here."""


def element_aligned(func: Any) -> Any:
    """The PrimFunc with its parameters' alignment lowered to one element.

    By default TVM promises LLVM 64-byte alignment of every argument and checks nothing; a view that
    starts elsewhere then dies of an aligned vector move. Unaligned moves of aligned data cost
    nothing on any CPU of the last ten years.
    """
    from tvm import tirx

    lowered = {
        param: tirx.decl_buffer(
            param.shape,
            param.dtype,
            name=param.name,
            strides=param.strides,
            elem_offset=param.elem_offset,
            data_alignment=SMALLEST,
            offset_factor=param.offset_factor,
            layout=param.layout,
        )
        for param in func.params
        if hasattr(param.ty, "data_alignment")
    }
    if not lowered:
        raise RuntimeError("a kernel without tensors")
    return tirx.PrimFunc(
        [lowered.get(param, param) for param in func.params],
        tir.with_variables(func.body, lowered),
        ret_type=func.ret_type,
        attrs=func.attrs,
    )
