"""The operators as PyTorch functions and modules."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from lntune import ops
from lntune.case import Case


def bound_call(case: Case, inputs: Mapping[str, Any]) -> Callable[[], Any]:
    """The public call of a case's operator bound to its named inputs: what a benchmark times.

    Raises:
        UnknownNameError: there is no such operator.
    """
    binding = importlib.import_module(ops.get(case.op).binding)
    call: Callable[[], Any] = binding.bound_call(case, inputs)
    return call
