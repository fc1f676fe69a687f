"""Kinds of devices: all that differs between them, one folder a kind, behind `backend.Backend`.

    backend = backends.of(device)
    kernel = backend.load(path)

A backend is loaded when first asked for, so that a machine without a GPU pays for none.
"""

from __future__ import annotations

import difflib
import functools
import importlib
from typing import TYPE_CHECKING

from lntune.device import Device
from lntune.errors import UnknownNameError, unknown

if TYPE_CHECKING:
    from lntune.backends.backend import Backend

DEFAULT = "cpu"
"""The target of commands that are given none."""
BACKENDS = ("cpu", "cuda", "emulated")
"""The folders. A device whose `backend` is empty has its kind's first."""
_FIRST = {"cpu": "cpu", "gpu": "cuda"}
TORCH_TYPES = {"cpu": "cpu", "cuda": "cuda"}
"""PyTorch's types of devices on whose tensors kernels run -> the backend that runs them."""


@functools.cache
def get(name: str) -> Backend:
    """A backend by its name.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in BACKENDS:
        raise unknown("backend", name, BACKENDS)
    backend: Backend = importlib.import_module(f"lntune.backends.{name}.backend").BACKEND
    return backend


def of(device: Device) -> Backend:
    """The backend of a device."""
    return get(device.backend or _FIRST[device.kind])


def targets() -> list[str]:
    """Everything `--target` may say on any machine."""
    return [target for name in BACKENDS for target in get(name).targets()]


def device_of(target: str) -> Device:
    """The device of a target: "cpu" (this machine's), "cuda" or "cuda:1" (a GPU that is here), an
    architecture such as "cuda:sm_90", a product such as "nvidia/nvidia-h100", or "emulated:sm_90"
    (an architecture whose kernels this machine's CPU runs, thread by thread).

    Raises:
        UnknownNameError: there is no such target.
        ToolchainError: it is a device of this machine, and none can be used.
        InputError: it is a device of this machine, and there are fewer.
    """
    for name in BACKENDS:
        if (device := get(name).find(target)) is not None:
            return device
    raise _unknown_target(target)


def _unknown_target(target: str) -> UnknownNameError:
    """An error that says in words what targets there are, and which may have been meant."""
    asked, known = target.lower().strip(), targets()
    holding = [name for name in known if asked and asked in name]
    near = ["cuda"] if "gpu" in asked else holding or difflib.get_close_matches(asked, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    anywhere = [name for name in get("cuda").targets() if name != "cuda"]
    stand_ins = get("emulated").targets()
    return UnknownNameError(
        f"unknown target {target!r}.{hint} There are: cpu (this machine's); cuda or cuda:1 (a GPU"
        f" that is here); a GPU that need not be here: {', '.join(anywhere)}; for tests a GPU that"
        f" this CPU stands in for: {stand_ins[0]} to {stand_ins[-1]}."
    )


def best() -> tuple[Device, str]:
    """(the device of this machine that is worth most, a note in words or the empty string): the
    first GPU that can be used, else the CPU, with why there is no GPU.
    """
    gpus = get("cuda")
    if why := gpus.missing():
        cpu = get("cpu").device_of(-1)
        return cpu, f"no GPU that can be used ({why}): this is for the CPU"
    return gpus.device_of(0), ""


def option(device: Device) -> str:
    """What to add to a command that is for a device of this machine: nothing for the CPU, which all
    commands are for unless they are told otherwise, and for a device of a kind that is not known.
    """
    if (device.backend or _FIRST.get(device.kind)) not in BACKENDS:
        return ""
    target = of(device).option
    return "" if target == DEFAULT else f" --target {target}"


def of_torch(kind: str, index: int) -> Device | None:
    """The device behind PyTorch's device number `index` (-1: the current one) of a type; None where
    no backend runs kernels on tensors of that type.

    Raises:
        ToolchainError, InputError: kernels could run there, and cannot here.
    """
    if (stand_in := _serving.get(kind)) is not None:
        return stand_in
    name = TORCH_TYPES.get(kind)
    return None if name is None else get(name).device_of(index)


_serving: dict[str, Device] = {}


def serve(device: Device | None = None) -> Device | None:
    """Have tensors of the CPU served as those of a device that works on such tensors, from now on:
    an emulated GPU. Without one, as the CPU's again. `lntune.reload()` makes calls ask anew. The
    answer is the device that stood in until now.
    """
    before = next(iter(_serving.values()), None)
    _serving.clear()
    if device is not None:
        backend = of(device)
        _serving[backend.torch_type] = device
    return before
