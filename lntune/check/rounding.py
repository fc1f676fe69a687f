"""What float32 may do to a computation, in float64: numbers are moved by roundings of float32, up
or down, as other orders of sums and other activations that are right move them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

_EXACT = ("double", "cat", "neg")
"""Operations of PyTorch's that round nothing, and make no views."""
_SHIFT, _SHIFTS = 7919, 4093
"""Factors are drawn once; from one tensor to the next they begin elsewhere, within so many."""


class Moving:
    """Moves float64 tensors by so many `roundings` of float32, each number up or down at random,
    the same for the same `seed`; or all of them away from 0, so that none undoes another.
    """

    def __init__(self, roundings: float, seed: int, outwards: bool = False) -> None:
        import torch

        self._outwards = outwards
        self._by, self._count = roundings * 2.0**-24, 0
        self._generator = torch.Generator().manual_seed(seed)
        self._factors = torch.empty(0, dtype=torch.float64)

    def moved(self, value: Any) -> Any:
        """A float64 tensor that is no view, moved; anything else as it is."""
        import torch

        is_number = isinstance(value, torch.Tensor) and value.dtype == torch.float64
        if not is_number or value._is_view():
            return value
        size = value.numel()
        if len(self._factors) < size + _SHIFTS or self._factors.device != value.device:
            signs = torch.randint(0, 2, (size + _SHIFTS,), generator=self._generator, device="cpu")
            signs = torch.ones_like(signs) if self._outwards else signs
            self._factors = (1 + (2 * signs - 1) * self._by).to(value.device, torch.float64)
        self._count += 1
        start = self._count * _SHIFT % _SHIFTS
        return value * self._factors[start : start + size].view(value.shape)

    def all_results(self) -> AbstractContextManager[Any]:
        """In the block, in this thread, whatever an operation of PyTorch's gives in float64 is
        moved. A TorchDispatchMode, which would do it too, reaches other threads and imports dynamo.
        """
        from torch.overrides import TorchFunctionMode

        moving = self

        class Moved(TorchFunctionMode):
            def __torch_function__(
                self, operation: Any, _: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                out = operation(*args, **(kwargs or {}))
                if operation.__name__ in _EXACT:
                    return out
                return tuple(map(moving.moved, out)) if type(out) is tuple else moving.moved(out)

        mode: Callable[[], AbstractContextManager[Any]] = Moved
        return mode()
