"""From a scheduled CPU kernel to machine code by TVM's LLVM, in this process or as a library."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lntune.backends.backend import TVM
from lntune.backends.cpu import lowering, runtime
from lntune.device import Device
from lntune.errors import BuildError, gist
from lntune.system import toolchain
from lntune.transforms.cpu import streaming

ROOM = 1 << 20
"""Bytes that have to be free where an object file is to be written: more than any kernel takes."""


def target(device: Device) -> dict[str, Any]:
    """The TVM target of a CPU, as the dictionary that tvm.target.Target takes."""
    target: dict[str, Any] = {"kind": "llvm", "num-cores": device.cores}
    if device.isa.startswith("x86-64"):
        # Without -prefer-256-bit LLVM would split 64-byte vectors on the very level that has them.
        features = ["-prefer-256-bit", *(f"+{f}" for f in device.features)]
        target |= {"mcpu": device.isa, "mattr": features}
    elif device.isa in ("aarch64", "arm64"):
        triple = "aarch64-linux-gnu" if device.isa == "aarch64" else "arm64-apple-macosx"
        target |= {"mtriple": triple, "mattr": ["+neon"]}
    return target


def _compile(module: Any, device: Device, checked: bool = True) -> Any:
    """TVM's executable of a scheduled IRModule, whose arguments are `checked` or not."""
    import tvm

    try:
        with TVM:
            goal = tvm.target.Target(target(device))
            lowered = lowering.lower(module, goal, checked)
            executable = generate(lowered, goal)
    except Exception as e:
        raise BuildError(f"TVM failed to compile: {type(e).__name__}: {gist(e)}") from e
    if (parameter := streaming.requested(module)) is None:
        return executable
    with TVM:
        streamed = streaming.apply(executable.mod, parameter, device.vector_bytes)
        return tvm.runtime.Executable(streamed)


def generate(lowered: Any, goal: Any) -> Any:
    """TVM's executable of what `lowering.lower` made for a tvm.target.Target."""
    import tvm

    return tvm.runtime.Executable(tvm.get_global_func("target.build.llvm")(lowered, goal))


def function_of(executable: Any) -> Callable[..., None]:
    """The kernel of an executable: a tvm_ffi.Function."""
    with TVM, runtime.own_symbols():
        function = executable["main"]
    runtime._keep.append(executable)
    return function  # type: ignore[no-any-return]


def in_memory(module: Any, device: Device, checked: bool = True) -> Callable[..., None]:
    """A kernel compiled into this process without touching the disk: a tvm_ffi.Function, whose
    arguments are `checked` or not.

    Raises:
        BuildError: TVM cannot compile it.
    """
    return function_of(_compile(module, device, checked))


def _link(output: str, objects: list[str], options: Sequence[str] = ()) -> None:
    """What TVM calls to make a shared library of object files."""
    toolchain.run_compiler([*toolchain.shared(), *options, *objects], Path(output))


def to_library(module: Any, device: Device, path: Path) -> None:
    """A kernel as a shared library at `path`.

    Raises:
        BuildError: TVM cannot compile it, or it cannot be linked.
        OSError: there is no room for it.
    """
    executable = _compile(module, device)
    try:
        _ensure_room()
        with TVM:
            executable.export_library(os.fspath(path), fcompile=_link)
    except OSError:
        raise
    except Exception as e:
        raise BuildError(f"linking a kernel with {toolchain.compiler()} failed: {e}") from e


def _ensure_room() -> None:
    """Complain where the folder of temporary files has no room for an object file: LLVM, which
    writes it there, ends the process when it cannot.

    Raises:
        OSError: it is full, or files may not become so large.
    """
    with tempfile.TemporaryFile() as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, ROOM)
        else:
            file.write(bytes(ROOM))
            file.flush()


def show(module: Any, device: Device, form: str) -> str:
    """LLVM IR ("source") or assembly ("asm") of a kernel."""
    executable = _compile(module, device)
    return str(executable.mod.inspect_source({"source": "ll", "asm": "asm"}[form]))
