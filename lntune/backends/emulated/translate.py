"""CUDA C++ as TVM writes it -> C++ that g++ compiles: `prelude.h` stands for CUDA's headers, and
shared memory is the emulator's.
"""

from __future__ import annotations

import dataclasses
import re

from lntune.backends.emulated.errors import EmulatorError

TYPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "float": ("f", ("float32",)),
    "double": ("d", ("float64",)),
    "half": ("e", ("float16",)),
    "nv_bfloat16": ("", ("bfloat16",)),
    "signed char": ("b", ("int8",)),
    "char": ("b", ("int8", "uint8", "bool")),
    "unsigned char": ("B", ("uint8", "bool")),
    "bool": ("?", ("bool",)),
    "short": ("h", ("int16",)),
    "unsigned short": ("H", ("uint16", "int16")),
    "int": ("i", ("int32",)),
    "unsigned int": ("I", ("uint32", "int32")),
    "long long": ("q", ("int64",)),
    "unsigned long long": ("Q", ("uint64", "int64")),
}
"""C type of a parameter -> the `struct` code of its scalars, the dtypes of its tensors; of other
types any tensor is taken.
"""
ALIASES = {
    "__half": "half",
    "__nv_bfloat16": "nv_bfloat16",
    "int8_t": "signed char",
    "uint8_t": "unsigned char",
    "uchar": "unsigned char",
    "int16_t": "short",
    "uint16_t": "unsigned short",
    "ushort": "unsigned short",
    "int32_t": "int",
    "uint32_t": "unsigned int",
    "uint": "unsigned int",
    "unsigned": "unsigned int",
    "int64_t": "long long",
    "long": "long long",
    "uint64_t": "unsigned long long",
    "size_t": "unsigned long long",
    "unsigned long": "unsigned long long",
}

KERNEL = re.compile(
    r'(?:extern\s+"C"\s+)?__global__\s+void\s+(?:__launch_bounds__\s*\(\s*(\d+)[^)]*\)\s*)?(\w+)\s*\(([^)]*)\)\s*([;{])'
)
ALIGNMENT = r"(?:(?:alignas|__align__)\s*\(\s*\d+\s*\)\s*)?"
SHARED = re.compile(
    rf"(?P<extern>extern\s+)?{ALIGNMENT}__shared__\s+{ALIGNMENT}(?P<type>(?:volatile\s+|unsigned\s+|signed\s+|long\s+)*\w+)\s+"
    r"(?P<name>\w+)\s*(?P<dims>(?:\[[^\]]*\]\s*)*);"
)
# TVM's own vector of four halves copies member by member; the hardware moves it as one.
QUADRUPLE = re.compile(r"(struct\s+__align__\(8\)\s+(half4_bfloat164)\s*\{)")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel; `type` is what it is or points to, in the spelling of TYPES where
    that knows it.

    TVM appends `_ptr` to the name a tensor had; `name` is without it.
    """

    name: str
    type: str
    pointer: bool


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel's signature; `bound` is the most threads a block may have."""

    name: str
    parameters: tuple[Parameter, ...]
    bound: int


def parameter(text: str) -> Parameter:
    """A parameter from its declaration, such as `const float* __restrict__ x_ptr`."""
    words = re.findall(r"\w+|\*", text)
    kept = [
        word
        for word in words[:-1]
        if word not in ("const", "volatile", "__restrict__", "__restrict", "*")
    ]
    kind = " ".join(kept)
    return Parameter(words[-1].removesuffix("_ptr"), ALIASES.get(kind, kind), "*" in words)


def kernels_of(source: str) -> dict[str, Kernel]:
    """The kernels a source defines, by name."""
    kernels = {}
    for bound, name, parameters, end in KERNEL.findall(source):
        if end == "{":
            listed = tuple(parameter(text) for text in parameters.split(",") if text.strip())
            kernels[name] = Kernel(name, listed, int(bound or 1024))
    if not kernels:
        raise EmulatorError(
            'the source defines no kernel (extern "C" __global__ void name(...) {...})'
        )
    return kernels


def _entry(kernel: Kernel) -> str:
    """A function that calls the kernel with arguments that lie behind an array of pointers, as a
    driver's launch passes them.
    """
    # The type is taken from the kernel itself, so that it is spelled right; reading the array is no
    # access of the kernel's.
    arguments = ", ".join(
        f"*(lnt_parameter<{i}, decltype({kernel.name})> *)a[{i}]"
        for i in range(len(kernel.parameters))
    )
    return (
        f'extern "C" LNT_HIDDEN void lnt_call_{kernel.name}(void **a) {{'
        f" {kernel.name}({arguments}); }}\n"
    )


def translate(source: str) -> str:
    """The C++ of a CUDA source; line numbers stay."""
    arrays: list[tuple[str, str]] = []

    def shared(match: re.Match[str]) -> str:
        kind, name, dims = match["type"], match["name"], match["dims"].strip()
        if match["extern"]:
            return f"{kind} *const {name} = ({kind} *)lnt_dynamic_shared;"
        arrays.append((name, kind + dims))
        return (
            f"{kind} (&{name}){dims} = *({kind} (*){dims})(lnt_shared +"
            f" lnt_offsets[{len(arrays) - 1}]);"
        )

    code = re.sub(r"^[ \t]*#[ \t]*include\b.*$", "", source, flags=re.MULTILINE)
    code = QUADRUPLE.sub(r"\1 LNT_COPIES(\2, lnt_raw8, 1)", code)
    code = SHARED.sub(shared, code)
    # Where each array lies is known at the end, where all types are: each begins behind the one
    # before and a guard.
    places = [
        f"lnt_begin{i} = {f'lnt_after(lnt_end{i - 1})' if i else 0}, lnt_end{i} = lnt_begin{i} +"
        f" sizeof({t})"
        for i, (_, t) in enumerate(arrays)
    ]
    rows = [
        f'{{"{name}", lnt_begin{i}, lnt_end{i} - lnt_begin{i}}}, '
        for i, (name, _) in enumerate(arrays)
    ]
    return "".join(
        (
            '#include "prelude.h"\nextern const unsigned lnt_offsets[];\n#line 1 "kernel.cu"\n',
            code,
            '\n#line 1 "emulator"\n',
            f"enum : unsigned {{ {', '.join(places)} }};\n" if arrays else "",
            (
                "extern const unsigned lnt_offsets[] ="
                f" {{{', '.join(f'lnt_begin{i}' for i in range(len(arrays))) or 0}}};\n"
            ),
            (
                f'extern "C" {{ extern const lnt_array lnt_arrays[] = {{{"".join(rows)}{{nullptr,'
                " 0, 0}}; }\n"
            ),
            *(_entry(kernel) for kernel in kernels_of(source).values()),
        )
    )
