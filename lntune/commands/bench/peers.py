"""Others' layer norms for GPUs, where their packages are installed: contenders of the benchmark.

Liger-Kernel's is called as its users call it. Triton brings none of its own; the usual one is that
of its tutorial, which has it in a script, so the same kernel stands in triton_layer_norm.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from lntune.case import Case
from lntune.errors import gist
from lntune.ops import layer_norm

Call = Callable[[], Any]


def calls(case: Case, given: Mapping[str, Any]) -> dict[str, Call]:
    """Contender -> its call bound to a case's inputs on a GPU; empty for what they do not have:
    other operators, other variants.
    """
    if case.op != layer_norm.NAME or case.variant not in ("", layer_norm.DEFAULT_VARIANT):
        return {}
    made = {}
    for name, make in (("liger", _liger), ("triton", _triton)):
        try:
            made[name] = make(given)
        except ImportError:  # not installed
            continue
    return made


def _liger(given: Mapping[str, Any]) -> Call:
    function = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    x, weight, bias, eps = given["x"], given["weight"], given["bias"], float(given["eps"])
    return lambda: function.apply(x, weight, bias, eps)


def _triton(given: Mapping[str, Any]) -> Call:
    forward = importlib.import_module("lntune.commands.bench.triton_layer_norm").forward
    x, weight, bias, eps = given["x"], given["weight"], given["bias"], float(given["eps"])
    return lambda: forward(x, weight, bias, eps)


def refusal(call: Call) -> str:
    """Why a contender does not take the case, on a line, or the empty string: some refuse long
    rows, others the GPU or the machine.
    """
    try:
        call()
    except Exception as e:  # theirs, of whatever kind
        return f"{type(e).__name__}: {gist(e)}"
    return ""
