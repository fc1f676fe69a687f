"""Which kernels of a bundle a device can run, and what keeps it from the others, in words.

Machine code runs where the processor has what it was compiled for, whatever the processor is
called: a bundle's kernels serve a CPU of the same or a higher level of instructions, and a GPU of
the same architecture. That it was tuned there is another question, see `Device.differences`.
"""

from __future__ import annotations

import platform

from lntune import backends, ops
from lntune.bundle.manifest import Entry, Target
from lntune.device import Device
from lntune.system import toolchain

LEVELS = ("x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4")
"""Levels of x86-64's instructions; each has those before it."""


def reasons(target: Target, here: Device, lntune: str) -> list[str]:
    """Why none of a target's kernels can be loaded on a device, one reason each; empty where they
    can. `lntune` is the release that wrote the bundle.
    """
    there = target.device
    if there.kind != here.kind or there.backend != here.backend:
        return [f"it is for a {there.kind.upper()}"]
    found = _code(there, here)
    if target.abi != toolchain.COMPATIBLE["apache-tvm-ffi"]:
        needs = f"apache-tvm-ffi {target.abi}*"
        found.append(f"it is built for {needs}, and this lntune takes {_own_abi()}*")
    if target.runtime != backends.of(here).runtime():
        found.append(f"it is built for lntune {lntune}, whose C this lntune does not share")
    if missing := _libc(target.glibc):
        found.append(missing)
    return found


def _own_abi() -> str:
    return toolchain.COMPATIBLE["apache-tvm-ffi"]


def _code(there: Device, here: Device) -> list[str]:
    """What machine code of one device asks for that another lacks."""
    if here.kind != "cpu":
        gpu = f"its code is for {there.isa}, and this GPU is of {here.isa}"
        return [] if there.isa == here.isa else [gpu]
    if there.isa == here.isa:
        found = []
    elif there.isa in LEVELS and here.isa in LEVELS:
        lower = LEVELS.index(there.isa) > LEVELS.index(here.isa)
        found = [f"its code is for {there.isa}, and this CPU has {here.isa}"] if lower else []
    else:
        found = [f"its code is for {there.isa}, and this CPU is of {here.isa}"]
    if missing := sorted(set(there.features) - set(here.features)):
        found.append(f"its code uses {', '.join(missing)}, which this CPU lacks")
    return found


def _libc(needs: str) -> str:
    """What the system's C library lacks; empty where that is not known, or nothing."""
    name, release = platform.libc_ver()
    if not needs or name != "glibc" or not release:
        return ""
    there, here = (tuple(map(int, text.split("."))) for text in (needs, release))
    return f"it needs glibc {needs}, and this system has {release}" if there > here else ""


def sums(entry: Entry, there: Device, here: Device) -> str:
    """Why a kernel does not fit a device with other cores, empty where it does: what sums over rows
    keeps as many sums as there are blocks of them.
    """
    case = entry.case
    if not any("blocks" in a.shape for a in ops.get(case.op).arguments(case)):
        return ""
    of, on = case.blocks(there), case.blocks(here)
    return "" if of == on else f"it sums in {of} blocks, and this device has {on}"


def rank(target: Target, here: Device) -> tuple[bool, int, bool, int]:
    """The smaller, the better a target suits a device that can run it: one that it was tuned on,
    then one of as many instructions, of its model, of as many cores.
    """
    there = target.device
    level = LEVELS.index(there.isa) if there.isa in LEVELS else 0
    return (
        bool(here.differences(there)),
        -level - len(there.features),
        (there.name, there.model) != (here.name, here.model),
        abs(there.cores - here.cores),
    )
