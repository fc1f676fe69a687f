"""The operators, by name. A new one is a file here, a line below, and at least one schedule."""

from __future__ import annotations

from lntune.errors import unknown
from lntune.ops import layer_norm, layer_norm_backward
from lntune.ops.op import Arg, Op

OPS: dict[str, Op] = {op.name: op for op in (layer_norm.OP, layer_norm_backward.OP)}


def get(name: str) -> Op:
    """The operator `name`; UnknownNameError with the near miss when there is none."""
    if name not in OPS:
        raise unknown("operator", name, OPS)
    return OPS[name]


__all__ = ["OPS", "Arg", "Op", "get"]
