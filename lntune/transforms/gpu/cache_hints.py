"""Cache hints of GPU kernels, which TVM cannot ask for: loads and stores in a kernel's CUDA source
that the cache need not keep.

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

ATTRIBUTE = "lntune_cache_hints"
"""Attribute of a scheduled PrimFunc: the names of the parameters whose loads and stores get
hints.
"""

_OF_STRUCTS = "lntune"
"""What the names of hints begin with for TVM's own structs of four two-byte elements, which CUDA
has no such loads and stores of; see SOURCE.
"""
_STRUCTS = ("half4*", "nv_bfloat164*")
SOURCE = f"""#ifdef __CUDACC__
template <typename V> __device__ __forceinline__ V {_OF_STRUCTS}__ldcs(V* address) {{
  uint2 bits = __ldcs((uint2*)address);
  return *(V*)&bits;
}}
template <typename V> __device__ __forceinline__ void {_OF_STRUCTS}__stcs(V* address, V value) {{
  __stcs((uint2*)address, *(uint2*)&value);
}}
#else
#define {_OF_STRUCTS}__ldcs __ldcs
#define {_OF_STRUCTS}__stcs __stcs
#endif
"""

_KERNEL = re.compile(r"__global__ void [^{;]*\{.*?^\}$", re.DOTALL | re.MULTILINE)


def reason_invalid(case: Case, device: Device, reloaded: bool) -> str | None:
    """Why accesses to a case's matrices should have no hints, or None; `reloaded`: the matrices are
    read more than once.
    """
    if reloaded:
        return "what is read again should stay in the cache"
    size = case.rows * case.hidden * case.itemsize
    if size <= device.l2:
        return f"a matrix of {size} bytes need not leave a cache of {device.l2}"
    return None


def request(module: Any, parameters: tuple[str, ...]) -> Any:
    """The scheduled IRModule whose accesses to `parameters` get hints when it is compiled."""
    return type(module)({"main": module["main"].with_attr(ATTRIBUTE, ",".join(parameters))})


def requested(module: Any) -> tuple[str, ...]:
    """The parameters of a scheduled IRModule whose accesses are to get hints."""
    attributes = module["main"].attrs
    return (
        tuple(str(attributes[ATTRIBUTE]).split(","))
        if attributes and ATTRIBUTE in attributes
        else ()
    )


def apply(source: str, parameters: tuple[str, ...]) -> str:
    """CUDA source with hints on the loads and stores of `parameters` in all its kernels.

    Raises:
        BuildError: a parameter that no kernel accesses, or an access of another form than TVM
            writes.
    """
    for name in parameters:

        def hint(kernel: re.Match[str], pointer: str = f"{name}_ptr") -> str:
            return _with_hints(kernel[0], pointer)

        hinted = _KERNEL.sub(hint, source)
        if hinted == source:
            raise BuildError(
                f"no access to {name} was found in the kernel, to give it a cache hint"
            )
        source = hinted
    return SOURCE + source if f"{_OF_STRUCTS}__" in source else source


def _with_hints(kernel: str, pointer: str) -> str:
    """One kernel with hints on the accesses through a pointer; TVM writes them as
    `*(float4*)(x_ptr + i)` and `x_ptr[i]`.
    """
    body = kernel.index("{")
    parts, copied = [kernel[:body]], body
    for start, end, address in _accesses(kernel, pointer, body):
        parts.append(kernel[copied:start])
        prefix = _OF_STRUCTS if address.startswith(tuple(f"({kind})" for kind in _STRUCTS)) else ""
        line_start = kernel.rfind("\n", 0, start) + 1
        stored = (
            re.match(r" = (.*);$", kernel[end : kernel.index("\n", end)])
            if not kernel[line_start:start].strip()
            else None
        )
        if stored:
            parts.append(f"{prefix}__stcs({address}, {stored[1]});")
            copied = end + stored.end()
        else:
            parts.append(f"{prefix}__ldcs({address})")
            copied = end
    return "".join([*parts, kernel[copied:]])


def _accesses(kernel: str, pointer: str, begin: int) -> Iterator[tuple[int, int, str]]:
    """(where it begins, where it ends, the address) of each access through a pointer."""
    for match in re.finditer(rf"\*\((\w+\*)\)\({pointer} \+ |\b{pointer}\b", kernel[begin:]):
        start, end = begin + match.start(), begin + match.end()
        if match[1]:
            close = _closing(kernel, kernel.index(f"({pointer}", start))
            yield start, close + 1, f"({match[1]})({kernel[kernel.index(pointer, start) : close]})"
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
