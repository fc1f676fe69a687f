"""The operators that kernels are tuned for, by name.

A new one is a file here and a line in _FILES, at least one schedule, and its PyTorch binding
(`Op.binding`).
"""

from __future__ import annotations

import importlib

from lntune.case import Case
from lntune.errors import unknown
from lntune.ops.op import STATISTICS, Arg, Op

_FILES = (
    "layer_norm",
    "layer_norm_backward",
    "lnlstm_step",
    "lnlstm_step_backward",
)

OPS: dict[str, Op] = {
    op.name: op for op in (importlib.import_module(f"lntune.ops.{file}").OP for file in _FILES)
}
"""Operators by name, in the order in which they are listed and, at the same priority, tuned."""

DEFAULT = next(iter(OPS))
"""The operator of a command that names none."""


def get(name: str) -> Op:
    """The operator `name`; UnknownNameError with the near miss when there is none."""
    if name not in OPS:
        raise unknown("operator", name, OPS)
    return OPS[name]


def forward_of(name: str) -> Op | None:
    """The operator whose gradients the operator `name` is; None where it is none's."""
    return next((op for op in OPS.values() if op.backward == name), None)


def backward_of(case: Case) -> Case | None:
    """The case whose finals time a step of training, for a case that is its forward; None for
    others, such as the forward of inference.
    """
    op = get(case.op)
    if not op.backward or STATISTICS not in case.variant.split("+"):
        return None
    return Case(op.backward, case.hidden, case.dtype, case.rows)


__all__ = [
    "DEFAULT",
    "OPS",
    "STATISTICS",
    "Arg",
    "Op",
    "backward_of",
    "forward_of",
    "get",
]
