"""The operators, by name. A new one is a file here, a line below, and at least one schedule."""

from __future__ import annotations

from lntune.errors import unknown
from lntune.ops import layer_norm, layer_norm_backward, lnlstm_step, lnlstm_step_backward
from lntune.ops.op import Arg, Op

OPS: dict[str, Op] = {
    op.name: op
    for op in (layer_norm.OP, layer_norm_backward.OP, lnlstm_step.OP, lnlstm_step_backward.OP)
}

DEFAULT = layer_norm.NAME
"""The operator of a command that names none."""

PAPER_HIDDEN = (240, 256, 400, 1000, 1024, 2400)
"""Hidden sizes of the experiments of Ba, Kiros, Hinton 2016, section 6 and its supplement."""


def get(name: str) -> Op:
    """The operator `name`; UnknownNameError with the near miss when there is none."""
    if name not in OPS:
        raise unknown("operator", name, OPS)
    return OPS[name]


__all__ = ["DEFAULT", "OPS", "PAPER_HIDDEN", "Arg", "Op", "get"]
