"""What a PyTorch device is to lntune, and what kernels on it ask of tensors."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lntune import device as device_module
from lntune.cuda import launcher
from lntune.device import Device
from lntune.errors import LntuneError
from lntune.torch.constants import constant

WHOLE = 16
"""Bytes of the widest access of a GPU; a tensor that is aligned to them is aligned well enough for any."""
ANY = WHOLE
"""Elements: as many as an access ever has."""


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


def widest(device: Device, tensors: Sequence[Tensor]) -> int:
    """The most elements that an access of all these tensors may have for their alignment. CPUs do not mind, and for them it is ANY.

    Tensors that are not contiguous do not count: kernels are given copies, which are aligned.
    """
    most = ANY
    if device.kind == "gpu":
        for tensor in tensors:
            address = tensor.data_ptr() | WHOLE
            if (aligned := address & -address) < WHOLE and tensor.is_contiguous():
                most = min(most, aligned // tensor.element_size())
    return most


def serves(kind: str) -> bool:
    """True where kernels run on PyTorch's devices of a type, for code that torch.compile traces. The driver is asked for GPUs' tensors only:
    it starts CUDA, which a process that works on the CPU and forks does not want.
    """
    return kind == "cpu" or (kind == "cuda" and _gpus())


_gpus: Callable[[], bool] = constant(lambda: launcher.count() > 0)
