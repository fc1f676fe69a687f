"""The operators as PyTorch functions and modules."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from lntune import ops
from lntune.case import Case
from lntune.errors import LntuneError


def bound_call(case: Case, inputs: Mapping[str, Any]) -> Callable[[], Any]:
    """The public call of a case's operator bound to its named inputs: what a benchmark times.

    Raises:
        UnknownNameError: there is no such operator.
    """
    binding = importlib.import_module(ops.get(case.op).binding)
    call: Callable[[], Any] = binding.bound_call(case, inputs)
    return call


def prepare_training(op: str) -> None:
    """Compile what steps of training of an operator run on beside kernels, where that was not done
    yet; what cannot be compiled they do without.
    """
    binding = importlib.import_module(ops.get(op).binding)
    prepare = getattr(binding, "prepare_training", None)
    if prepare is not None:
        with contextlib.suppress(LntuneError):
            prepare()
