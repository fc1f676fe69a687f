"""Calls of layer norm that eager mode was measured to serve best: they go to PyTorch at once, since
all that is asked of a call on the way to a kernel costs more than eager mode's call of a few rows.

What is remembered is what a call looks like that went all that way before, to the last size, so
that nothing of it needs to be checked again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lntune.case import Case
from lntune.device import Device
from lntune.torch.reloading import on_kernels_changed
from lntune.torch.support import needs_gradients

MOST = 4096
"""Calls that are remembered; with more sizes than that all are forgotten."""
_known: dict[tuple[object, ...], tuple[Case, Device | None]] = {}
_tracing = torch._C._is_tracing
on_kernels_changed(_known.clear)


def known(
    input: Tensor, shape: object, weight: Tensor | None, bias: Tensor | None, eps: object
) -> tuple[Case, Device | None] | None:
    """Case and device of a call that is torch.nn.functional.layer_norm's as it stands, or None."""
    looks = _looks(input, shape, weight, bias, eps) if _known else None
    return None if looks is None else _known.get(looks)


def remember(
    input: Tensor,
    shape: object,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: object,
    case: tuple[Case, Device | None],
) -> None:
    """Have calls like this one served by PyTorch at once: a call that is right and that eager mode
    serves, and its case and device. Not those whose vectors PyTorch does not take as they are.
    """
    if any(v is not None and v.dtype != input.dtype for v in (weight, bias)):
        return
    looks = _looks(input, shape, weight, bias, eps)
    if looks is not None:
        if len(_known) >= MOST:
            _known.clear()
        _known[looks] = case


def _looks(
    input: Tensor, shape: object, weight: Tensor | None, bias: Tensor | None, eps: object
) -> tuple[object, ...] | None:
    """What is remembered of a call; None for one that is unusual, or watched by who writes a
    program of it.
    """
    if (
        type(input) is not Tensor
        or type(eps) is not float
        or not isinstance(shape, tuple | list)
        or _tracing()
    ):
        return None
    looks = [input.shape, input.dtype, input.device, tuple(shape), eps]
    for vector in (weight, bias):
        if vector is not None:
            if type(vector) is not Tensor and type(vector) is not torch.nn.Parameter:
                return None
            looks += vector.shape, vector.dtype, vector.device
        looks.append(None)
    return *looks, needs_gradients(input, weight, bias)
