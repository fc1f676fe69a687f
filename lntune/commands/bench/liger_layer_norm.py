"""Liger-Kernel's layer norm, a contender of the benchmark on GPUs, called as its users call it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from lntune.case import Case


def bound_call(_case: Case, inputs: Mapping[str, Any]) -> Callable[[], Any]:
    """The call bound to the operator's named inputs, see `Op.peers`.

    Raises:
        ImportError: Liger-Kernel is not installed.
    """
    function = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    x, weight, bias, eps = inputs["x"], inputs["weight"], inputs["bias"], float(inputs["eps"])
    return lambda: function.apply(x, weight, bias, eps)
