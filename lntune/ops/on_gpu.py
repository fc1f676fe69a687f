"""PyTorch's calls as its CUDA kernels take them, where that is not as its CPU kernels do: what is
timed against on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lntune.case import Case
from lntune.ops import layer_norm_backward
from lntune.ops.op import Op, Tensors

if TYPE_CHECKING:
    from collections.abc import Callable


def baseline(op: Op, case: Case, given: Tensors) -> Callable[[], Any]:
    """`op.baseline` for tensors on a GPU."""
    return (
        _layer_norm_backward(case, given)
        if op.name == layer_norm_backward.NAME
        else op.baseline(case, given)
    )


def _layer_norm_backward(case: Case, given: Tensors) -> Callable[[], Any]:
    """torch.ops.aten.native_layer_norm_backward: statistics in float32 whatever the dtype of x, the
    weight in that of x.
    """
    import torch

    wanted_names = {a.name for a in layer_norm_backward.arguments(case) if a.role == "out"}
    wanted = [name in wanted_names for name in ("dx", "dgamma", "dbeta")]
    dy = given["dy"]
    x = given["x"] if "x" in given else torch.zeros_like(dy)
    mean, rstd = (
        given[name][:, None] if name in given else dy.new_ones(dy.shape[0], 1, dtype=torch.float32)
        for name in ("mean", "rstd")
    )
    ones = dy.new_ones(case.hidden)
    weight = given["weight"].to(dy.dtype) if "weight" in given else ones if wanted[1] else None
    bias = torch.zeros_like(ones) if wanted[2] else None
    shape = [case.hidden]
    return lambda: torch.ops.aten.native_layer_norm_backward(
        dy, x, shape, mean, rstd, weight, bias, wanted
    )
