"""Marking functions whose result torch.compile may take for a constant, without loading
torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])
_MARK = "_dynamo_marked_constant"


def constant(function: Function) -> Function:
    """The function, marked as torch.compiler.assume_constant_result marks it: dynamo calls it while
    it traces.

    PyTorch's own imports all of dynamo for that, most of a second in each process, whether or not
    it compiles anything.
    """
    setattr(function, _MARK, True)
    return function
