"""The tensors that a scheduled CPU kernel is made for, beside those that it will be called with."""

from __future__ import annotations

from typing import Any

from lntune import ops
from lntune.case import Case
from lntune.device import Device


def is_of(module: Any, case: Case, device: Device) -> bool:
    """Whether a scheduled IRModule takes just what the operator's kernels take: as many arguments,
    each of its dtype and shape, any number of rows, contiguous.

    Such a kernel can be called by who makes those tensors without checking them; another would read
    what is not there.
    """
    from tvm import tirx

    arguments = ops.get(case.op).arguments(case)
    params = list(module["main"].params)
    if len(params) != len(arguments):
        return False
    rows: set[Any] = set()
    for param, arg in zip(params, arguments, strict=True):
        if arg.role == "scalar":
            if str(param.ty) != arg.dtype:
                return False
            continue
        if not hasattr(param.ty, "data_alignment") or str(param.dtype) != arg.dtype:
            return False
        sizes = arg.sizes(case.rows, case.hidden, case.blocks(device))
        if len(param.shape) != len(sizes) or len(param.strides) or int(param.elem_offset):
            return False
        for name, size, declared in zip(arg.shape, sizes, param.shape, strict=True):
            if name == "rows" and isinstance(declared, tirx.Var):
                rows.add(declared)
            elif name == "rows" or not isinstance(declared, tirx.IntImm) or int(declared) != size:
                return False
    return len(rows) <= 1
