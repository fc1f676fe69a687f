"""From CUDA C++ source to device code, with nvcc or NVRTC; results are cached on disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from lntune.architectures import ARCHITECTURES, architecture
from lntune.backends.cuda import locate, nvcc, nvrtc
from lntune.backends.cuda.compiled import Compiled
from lntune.backends.cuda.nvcc import Nvcc
from lntune.backends.cuda.nvrtc import Nvrtc
from lntune.errors import ToolchainError
from lntune.system import native, paths, sealed
from lntune.system.sealed import DamagedError

__all__ = ["ARCHITECTURES", "Compiled", "available", "find", "identity", "stamp", "to_cubin"]

_FORMAT = 2
"""Of the files in the cache; part of their names. Since 2 they carry a digest."""

Stored = TypeVar("Stored", Compiled, bytes)


def find() -> Nvcc | Nvrtc:
    """The compiler to use: nvcc (LNTUNE_NVCC, CUDA_HOME, CUDA_PATH, PATH), else NVRTC from pip's
    packages or a toolkit.

    LNTUNE_NVCC=nvrtc asks for the library where both are there.

    Raises:
        ToolchainError: there is neither; it names the remedies.
    """
    if os.environ.get("LNTUNE_NVCC") != "nvrtc" and (program := nvcc.find()):
        return program
    missing: list[str] = []
    if library := nvrtc.find(missing):
        return library
    why = f" ({'; '.join(missing)})" if missing else ""
    raise ToolchainError(
        "no CUDA compiler found: neither nvcc (LNTUNE_NVCC, CUDA_HOME, CUDA_PATH, PATH,"
        f" {locate.STANDARD}) nor NVRTC with its headers{why}. Install the CUDA toolkit and set"
        " LNTUNE_NVCC or CUDA_HOME, or pip install 'lntune[cuda]' (nvidia-cuda-nvrtc"
        " nvidia-cuda-runtime nvidia-cuda-cccl)."
    )


def available() -> str:
    """Why nothing can be compiled here; empty when it can."""
    try:
        return "" if find().identity else "the CUDA compiler does not say what it is"
    except ToolchainError as e:
        return str(e)


def identity() -> str:
    """The compiler, with its release and flags.

    Raises:
        ToolchainError: there is none.
    """
    return find().identity


def stamp() -> str:
    """What tells one compiler from another without running it: its kind, path, size, time of change
    and flags; empty where there is none.
    """
    try:
        tool = find()
        file = Path(tool.path).stat()
    except (ToolchainError, OSError):
        return ""
    module = nvrtc if isinstance(tool, Nvrtc) else nvcc
    settings = (
        [f"{name}={os.environ.get(name, '')}" for name in nvcc.ENVIRONMENT]
        if isinstance(tool, Nvcc)
        else []
    )
    return " ".join(
        [
            type(tool).__name__,
            str(tool.path),
            str(file.st_size),
            str(file.st_mtime_ns),
            *module.FLAGS,
            *settings,
        ]
    )


def to_cubin(source: str, arch: str) -> Compiled:
    """Machine code of a CUDA C++ source for one architecture such as "sm_90", with the log of ptxas
    -v and the PTX.

    Raises:
        UnknownNameError: the architecture is not in ARCHITECTURES.
        ToolchainError: there is no CUDA compiler.
        BuildError: the source does not compile, or the result cannot be stored.
    """
    target, tool = architecture(arch), find()
    return _cached(
        ["cubin", tool.identity, arch, source], Compiled, lambda: tool.cubin(source, target)
    )


def _cached(key: list[object], kind: type[Stored], make: Callable[[], Stored]) -> Stored:
    """The stored result of this key, made and stored now if it is missing or damaged."""
    path = _path(key)
    with contextlib.suppress(DamagedError, OSError, msgspec.MsgspecError):
        return msgspec.msgpack.decode(sealed.read(path).content, type=kind)
    result = make()
    with native.atomic(path) as temporary:
        temporary.write_bytes(msgspec.msgpack.encode(result))
        sealed.seal(temporary, {})
    return result


def _path(key: list[object]) -> Path:
    """Where the result of a key is cached."""
    name = hashlib.sha256(msgspec.json.encode([_FORMAT, *key])).hexdigest()[:32]
    return paths.cached("cuda", f"{name}.msgpack")
