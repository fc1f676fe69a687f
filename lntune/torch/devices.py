"""What a PyTorch device is to lntune, and what kernels on it ask of tensors."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from lntune import device as device_module
from lntune.cuda import launcher
from lntune.device import Device
from lntune.errors import LntuneError

WHOLE = 16
"""Bytes of the widest access: what a tensor is aligned to at its best, on GPUs."""


def of(place: torch.device) -> Device | None:
    """The CPU or GPU behind a device of PyTorch's; None where kernels cannot run, which is said once where one would expect them to."""
    return _known(place.type, place.index if place.index is not None else -1)


@functools.cache
def _known(kind: str, index: int) -> Device | None:
    if kind == "cpu":
        return device_module.current()
    if kind != "cuda":
        return None
    number = torch.cuda.current_device() if index < 0 else index
    try:
        return launcher.device(number)
    except LntuneError as e:
        warnings.warn(f"lntune's kernels do not run on cuda:{number}, PyTorch's serve it: {e}", RuntimeWarning, stacklevel=3)
        return None


def of_tensors(tensors: Sequence[Tensor]) -> Device | None:
    """The device of tensors that are all on one; this machine's CPU where there are none."""
    return of(tensors[0].device) if tensors else device_module.current()


def alignment(device: Device, tensors: Sequence[Tensor]) -> int:
    """Bytes that all tensors are aligned to, at most WHOLE. CPUs do not mind, so there it is WHOLE whatever they are."""
    if device.kind != "gpu":
        return WHOLE
    addresses = WHOLE
    for tensor in tensors:
        addresses |= tensor.data_ptr()
    return addresses & -addresses


@torch.compiler.assume_constant_result
def types() -> tuple[str, ...]:
    """The types of PyTorch's devices on which kernels run."""
    return ("cpu", "cuda") if launcher.count() else ("cpu",)
