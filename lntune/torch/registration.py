"""Entries for lntune's functions and modules in the tables of PyTorch's tools, beside those of the
functions and modules they take the place of.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def register_with_torchscript(function: Callable[..., Any], operator: str) -> None:
    """Have TorchScript compile a call of the function to an operator of the same arguments, instead
    of reading its Python.
    """
    # PyTorch without TorchScript has no such table, and one that lists its functions elsewhere
    # reports ours as one it cannot compile.
    register = getattr(sys.modules.get("torch.jit._builtins"), "_register_builtin", None)
    if register is not None:
        register(function, operator)


def register_with_quantization(ours: type, theirs: type) -> None:
    """Have torch.ao.quantization put in the place of a module of our class what it puts in the
    place of one of PyTorch's.
    """
    mappings = sys.modules.get("torch.ao.quantization.quantization_mappings")
    for name in (
        "DEFAULT_STATIC_QUANT_MODULE_MAPPINGS",
        "DEFAULT_QAT_MODULE_MAPPINGS",
        "DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS",
    ):
        mapping = getattr(mappings, name, {})
        if theirs in mapping:
            mapping[ours] = mapping[theirs]
