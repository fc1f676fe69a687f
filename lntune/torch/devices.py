"""From a PyTorch device to the CPU or GPU behind it, and how tensors lie in memory, which decides
what kernels can take them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lntune import backends
from lntune import device as device_module
from lntune.device import Device
from lntune.errors import LntuneError
from lntune.system import callers
from lntune.system.later import Later, passes
from lntune.torch.constants import constant
from lntune.torch.reloading import on_reload, reload

WHOLE = 16
"""Bytes of the widest access of a GPU; a tensor that is aligned to them is aligned well enough for
any.
"""
ANY = WHOLE
"""Elements: as many as an access ever has."""


TYPES = tuple(backends.TORCH_TYPES)
"""PyTorch's types of devices on whose tensors kernels run."""


def of(torch_device: torch.device) -> Device | None:
    """The CPU or GPU behind a device of PyTorch's; None where kernels cannot run, of which it warns
    once where one would expect them to.
    """
    index = torch_device.index
    return _known(torch_device.type, -1 if index is None else index)


def _known(kind: str, index: int) -> Device | None:
    key = kind, index
    device = _devices.get(key, _UNKNOWN)  # one step: another thread may reload in between
    retry = device is None and (later := _retries.get(key)) is not None and later.due
    if retry or isinstance(device, _Unknown):
        device = _devices[key] = _look(key)
    return device


class _Unknown:
    """Stands for a device that was not looked for yet."""


_UNKNOWN = _Unknown()
_devices: dict[tuple[str, int], Device | None] = {}
_retries: dict[tuple[str, int], Later] = {}
"""Devices on which kernels cannot run because of what may pass, and when each is asked again."""


@on_reload
def _forget() -> None:
    """Ask anew which devices serve: another one may stand in for the CPU (`backends.serve`)."""
    _devices.clear()


@contextlib.contextmanager
def serving(device: Device) -> Iterator[None]:
    """In the block calls with tensors of the device are served by its own kernels: those of an
    emulated GPU, whose tensors are the CPU's, would be served by the CPU's, and the other way round
    after `backends.serve`.
    """
    backend = backends.of(device)
    own = backends.TORCH_TYPES.get(backend.torch_type) == backend.name
    stand_in = None if own else device
    before = backends.serve(stand_in)
    if before == stand_in:
        yield
        return
    reload()
    try:
        yield
    finally:
        backends.serve(before)
        reload()


def _look(key: tuple[str, int]) -> Device | None:
    kind, index = key
    if kind not in backends.TORCH_TYPES:
        return None
    later = _retries.get(key) or Later()
    try:
        with later.trying():
            device = backends.of_torch(kind, index)
    except Exception as e:
        if key not in _retries:
            name = kind if index < 0 else f"{kind}:{index}"
            reason = str(e) if isinstance(e, LntuneError) else f"{type(e).__name__}: {e}"
            retry = " It is tried again later." if passes(e) else ""
            callers.warn(
                f"lntune's kernels do not run on {name}, PyTorch's serve it: {reason}{retry}",
                RuntimeWarning,
            )
        if passes(e):
            _retries[key] = later
        return None
    _retries.pop(key, None)
    return device


def have_node(tensor: Tensor) -> bool:
    """True where layer norm's backward is a node of autograd's graph in C++."""
    device = of(tensor.device)
    return device is not None and backends.of(device).node


def of_tensors(tensors: Sequence[Tensor]) -> Device | None:
    """The device of tensors that are all on one; this machine's CPU where there are none."""
    return of(tensors[0].device) if tensors else device_module.current()


class Layout(NamedTuple):
    """What the tensors of a call ask of a kernel."""

    widest: int = ANY
    """The most elements that an access may have; CPUs do not mind alignment."""
    strided: bool = False
    """Whether the rows of a matrix do not follow one another in memory."""


def layout(device: Device, tensors: Sequence[Tensor], hidden: int) -> Layout:
    """What tensors ask of a kernel, all of rows of `hidden` elements, or of as many as their last
    axis has if these are more (gates).

    Tensors that are neither contiguous nor evenly strided do not count: kernels are given copies,
    which are aligned.
    """
    most, strided = ANY, False
    aligned = backends.of(device).aligned
    for tensor in tensors:
        length = max(hidden, tensor.shape[-1] if tensor.ndim else 1)
        if (stride := row_stride(tensor, length)) is None:
            continue
        strided |= stride != length
        if aligned:
            address = (
                tensor.data_ptr()
                | (stride * tensor.element_size() if stride != length else 0)
                | WHOLE
            )
            if (alignment := address & -address) < WHOLE:
                most = min(most, alignment // tensor.element_size())
    return Layout(most, strided)


def row_stride(tensor: Tensor, length: int) -> int | None:
    """Elements from one row of so many to the next, whatever the axes of a row and of the rows;
    None where the elements of a row are not side by side, or the rows not evenly spaced.
    """
    if tensor.is_contiguous():
        return length
    axes = [(n, stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n != 1]
    inside = 1
    while axes and inside < length:
        n, stride = axes.pop()
        if stride != inside:
            return None
        inside *= n
    if not axes:
        return length
    rows, distance = axes.pop()
    for n, stride in reversed(axes):
        if stride != rows * distance:
            return None
        rows *= n
    return distance


def matrix(tensor: Tensor, length: int) -> Tensor:
    """A tensor as kernels take it, as (rows, length): evenly strided rows stay where they are,
    everything else that is not contiguous is copied.
    """
    tensor = tensor.resolve_neg()
    return (tensor.contiguous() if row_stride(tensor, length) is None else tensor).view(-1, length)


def serves(kind: str) -> bool:
    """True where kernels run on PyTorch's devices of a type, for code that torch.compile traces.
    The driver is asked for GPUs' tensors only: it starts CUDA, which a process that works on the
    CPU and forks does not want.
    """
    return kind in _here and _here[kind]()


def _is_here(backend: str) -> Callable[[], bool]:
    return constant(lambda: backends.get(backend).count() > 0)


_here = {kind: _is_here(backend) for kind, backend in backends.TORCH_TYPES.items()}
"""Whether there are devices of one of PyTorch's types, a constant of what is compiled."""
