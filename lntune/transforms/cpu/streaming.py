"""Streaming (non-temporal) stores of CPU kernels, which go around the cache: TVM cannot ask for
them, so they are set in the LLVM IR of a compiled kernel.

A store to memory that is not in the cache first reads the line it is going to overwrite: a third of
the traffic of a kernel that reads one tensor and writes another, for nothing. Non-temporal stores
do not (Intel's optimization manual, 9.6; the STREAM benchmark's authors ask for them too). They
want aligned addresses, and tensors may start anywhere, so each is written twice and the address
decides. What they write is not ordered with other stores until a fence, which the launcher sets
after each task (`runtime.c`).
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from lntune.errors import BuildError

ATTRIBUTE = "lntune_stream"
"""Attribute of a scheduled PrimFunc: the name of the parameter whose full vectors are streamed."""

_LEAST = 16  # bytes of the smallest vector that is worth it
_BITS = {
    "i8": 8,
    "i16": 16,
    "half": 16,
    "bfloat": 16,
    "i32": 32,
    "float": 32,
    "i64": 64,
    "double": 64,
}
_LABEL = re.compile(r"^([\w.$-]+):")
_ROOT = re.compile(r"^\s+(%[\w.$-]+) = load ptr, ptr ")
_OFFSET = re.compile(r"^\s+(%[\w.$-]+) = getelementptr [^%]*ptr (%[\w.$-]+),")
_STORE = re.compile(r"^\s+store <(\d+) x (\w+)> [^,]+, ptr (%[\w.$-]+), align \d+")


def requested(module: Any) -> str | None:
    """The parameter that a scheduled IRModule wants streamed."""
    attributes = module["main"].attrs
    return str(attributes[ATTRIBUTE]) if attributes and ATTRIBUTE in attributes else None


def request(module: Any, parameter: str) -> Any:
    """The scheduled IRModule with `parameter` to be streamed when it is compiled."""
    import tvm

    return tvm.IRModule({"main": module["main"].with_attr(ATTRIBUTE, parameter)})


def apply(compiled: Any, parameter: str, vector_bytes: int) -> Any:
    """The compiled LLVM module with the full vectors it stores to `parameter` streamed.

    Raises:
        BuildError: there is no such store, or LLVM does not take the edited IR.
    """
    from tvm_ffi import get_global_func

    text = edit(str(compiled.inspect_source("ll")), parameter, vector_bytes)
    with tempfile.TemporaryDirectory(prefix="lntune-") as folder:
        path = Path(folder) / "kernel.ll"
        path.write_text(text, encoding="utf-8")
        try:
            return get_global_func("ffi.Module.load_from_file.ll")(str(path), "ll")
        except Exception as e:
            raise BuildError(f"LLVM refused the kernel with streamed stores: {e}") from e


def edit(text: str, parameter: str, vector_bytes: int) -> str:
    """The IR with the vectors of at least 16 bytes that are stored to `parameter` streamed where
    their address allows it.

    Raises:
        BuildError: no such store was found.
    """
    lines, count = [], 0
    metadata = 1 + max((int(n) for n in re.findall(r"^!(\d+) = ", text, re.MULTILINE)), default=-1)
    function: list[str] = []
    for line in text.splitlines():
        if line.startswith("define "):
            function = [line]
        elif function:
            function.append(line)
            if line == "}":
                changed, count = _function(function, parameter, vector_bytes, metadata, count)
                lines += changed
                function = []
        else:
            lines.append(line)
    if not count:
        raise BuildError(f"no vector stored to {parameter} was found to be streamed.")
    return "\n".join([*lines, f"!{metadata} = !{{i32 1}}", ""])


def _function(
    lines: list[str], parameter: str, vector_bytes: int, metadata: int, count: int
) -> tuple[list[str], int]:
    """One function with its stores edited, and how many were edited in all."""
    pointers = _pointers(lines, parameter)
    out: list[str] = []
    # block that a line is in; block -> the last part of it after it was cut up
    label, last = None, {}
    for line in lines:
        if start := _LABEL.match(line):
            label = start[1]
        store = _STORE.match(line)
        if (
            store
            and label
            and store[3] in pointers
            and store[2] in _BITS
            and int(store[1]) * _BITS[store[2]] >= 8 * _LEAST
        ):
            align = min(int(store[1]) * _BITS[store[2]] // 8, vector_bytes)
            align = 1 << (align.bit_length() - 1)
            name = f"lntune.stream{count}"
            streamed = re.sub(
                r", align \d+", f", align {align}, !nontemporal !{metadata}", line, count=1
            )
            out += [
                f"  %{name}.address = ptrtoint ptr {store[3]} to i64",
                f"  %{name}.offset = and i64 %{name}.address, {align - 1}",
                f"  %{name}.aligned = icmp eq i64 %{name}.offset, 0",
                f"  br i1 %{name}.aligned, label %{name}.past, label %{name}.through",
                f"{name}.past:",
                streamed,
                f"  br label %{name}.end",
                f"{name}.through:",
                line,
                f"  br label %{name}.end",
                f"{name}.end:",
            ]
            last[label] = f"{name}.end"
            count += 1
        else:
            out.append(line)
    if last:  # the values of a phi come from where a block ends now
        came = re.compile(r"%([\w.$-]+) \]")
        out = [
            came.sub(lambda m: f"%{last.get(m[1], m[1])} ]", line) if " = phi " in line else line
            for line in out
        ]
    return out, count


def _pointers(lines: list[str], parameter: str) -> set[str]:
    """The values that point into the parameter: its own name, as an argument or loaded, and what is
    counted from it.
    """
    own = re.compile(rf"^%{re.escape(parameter)}(\.\d+)?$")
    pointers = {m for m in re.findall(r"ptr [^,%]*(%[\w.$-]+)[,)]", lines[0]) if own.match(m)}
    pointers |= {root[1] for line in lines if (root := _ROOT.match(line)) and own.match(root[1])}
    counted = {offset[1]: offset[2] for line in lines if (offset := _OFFSET.match(line))}
    # blocks come in any order
    while more := {pointer for pointer, base in counted.items() if base in pointers} - pointers:
        pointers |= more
    return pointers
