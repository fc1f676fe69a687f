"""Others' kernels for GPUs, where their packages are installed: contenders of the benchmark."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from lntune import ops
from lntune.case import Case

Call = Callable[[], Any]


def calls(case: Case, inputs: Mapping[str, Any]) -> dict[str, Call]:
    """Contender -> its call bound to a case's inputs on a GPU, of those that the operator names
    (`Op.peers`) and that are installed; they have its default variant only.
    """
    op = ops.get(case.op)
    if op.check_variant(case.variant) != op.variants[0]:
        return {}
    contenders = {}
    for name, module in op.peers.items():
        try:
            contenders[name] = importlib.import_module(module).bound_call(case, inputs)
        except ImportError:  # not installed
            continue
    return contenders
