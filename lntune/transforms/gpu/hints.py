"""Cache hints on GPUs, which TVM has no way to ask for: set in the CUDA source of a kernel.

What is read once or written for somebody later need not push out what others will read again. Such
accesses are marked as the first to leave the cache (PTX `ld.global.cs` and `st.global.cs`, "likely
accessed once"; CUDA C++ Programming Guide, *Load Functions Using Cache Hints*). Whether that pays
depends on what comes before and behind a kernel, so it is a knob.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lntune.case import Case
from lntune.device import Device
from lntune.errors import BuildError

ATTRIBUTE = "lntune_once"
"""Attribute of a scheduled PrimFunc: the names of the parameters each of whose elements is accessed
once.
"""

_KERNEL = re.compile(r"__global__ void [^{;]*\{.*?^\}$", re.DOTALL | re.MULTILINE)


def misfit(case: Case, device: Device, again: bool) -> str | None:
    """Why accesses to a case's matrices should not be marked, or None; `again`: they are read more
    than once.
    """
    if again:
        return "what is read again should stay in the cache"
    size = case.rows * case.hidden * case.itemsize
    if size <= device.l2:
        return f"a matrix of {size} bytes need not leave a cache of {device.l2}"
    return None


def request(module: Any, parameters: tuple[str, ...]) -> Any:
    """The scheduled IRModule with accesses to `parameters` to be marked when it is compiled."""
    return type(module)({"main": module["main"].with_attr(ATTRIBUTE, ",".join(parameters))})


def requested(module: Any) -> tuple[str, ...]:
    """The parameters of a scheduled IRModule whose accesses are to be marked."""
    attributes = module["main"].attrs
    return (
        tuple(str(attributes[ATTRIBUTE]).split(","))
        if attributes and ATTRIBUTE in attributes
        else ()
    )


def apply(source: str, parameters: tuple[str, ...]) -> str:
    """CUDA source with the loads and stores of `parameters` in all its kernels marked.

    Raises:
        BuildError: a parameter that no kernel accesses, or an access of another form than TVM
            writes.
    """
    for name in parameters:
        marked = _KERNEL.sub(lambda kernel, name=name: _marked(kernel[0], f"{name}_ptr"), source)  # type: ignore[misc]
        if marked == source:
            raise BuildError(
                f"no access to {name} was found in the kernel, to give it a cache hint"
            )
        source = marked
    return source


def _marked(kernel: str, pointer: str) -> str:
    """One kernel with the accesses through a pointer marked; `*(float4*)(x_ptr + i)` and `x_ptr[i]`
    are what TVM writes.
    """
    made, at = [], kernel.index("{")
    done = at
    made.append(kernel[:at])
    for start, end, address in _accesses(kernel, pointer, at):
        made.append(kernel[done:start])
        line_start = kernel.rfind("\n", 0, start) + 1
        stored = (
            re.match(r" = (.*);$", kernel[end : kernel.index("\n", end)])
            if not kernel[line_start:start].strip()
            else None
        )
        if stored:
            made.append(f"__stcs({address}, {stored[1]});")
            done = end + stored.end()
        else:
            made.append(f"__ldcs({address})")
            done = end
    return "".join([*made, kernel[done:]])


def _accesses(kernel: str, pointer: str, begin: int) -> Iterator[tuple[int, int, str]]:
    """(where it begins, where it ends, the address) of each access through a pointer."""
    for found in re.finditer(rf"\*\((\w+\*)\)\({pointer} \+ |\b{pointer}\b", kernel[begin:]):
        start, end = begin + found.start(), begin + found.end()
        if found[1]:
            close = _closing(kernel, kernel.index(f"({pointer}", start))
            yield start, close + 1, f"({found[1]})({kernel[kernel.index(pointer, start) : close]})"
        elif kernel[end : end + 1] == "[":
            close = _closing(kernel, end)
            yield start, close + 1, f"{pointer} + ({kernel[end + 1 : close]})"
        else:
            raise BuildError(
                f"an access to {pointer} is of a form that is not known:"
                f" {kernel[start : start + 60]!r}"
            )


def _closing(text: str, opening: int) -> int:
    """Where the bracket that opens at a place is closed."""
    depth = 0
    for at in range(opening, len(text)):
        depth += (text[at] in "([") - (text[at] in ")]")
        if not depth:
            return at
    raise BuildError("brackets of a kernel's source do not match")
