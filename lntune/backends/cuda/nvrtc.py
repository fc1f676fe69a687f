"""NVRTC, CUDA's compiler as a library: what is left where PyTorch came by pip and no toolkit is
installed.

It is called through its C interface, so that the `nvidia-cuda-nvrtc` package is enough and no
bindings are needed.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from lntune.architectures import Architecture
from lntune.backends.cuda import locate
from lntune.backends.cuda.compiled import Compiled, failure
from lntune.errors import BuildError, ToolchainError

FLAGS = ("--std=c++17", "--ptxas-options=-v", "--diag-suppress=177")
"""Its optimization is on by default."""
_HEADERS = ("cuda_fp16.h", "cuda_bf16.h", "cuda/std/cstdint")
"""What generated kernels include: from nvidia-cuda-runtime, and from nvidia-cuda-cccl."""
_PROGRAM, _SIZE = ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t)
_WORDS = ctypes.POINTER(ctypes.c_char_p)
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "nvrtcVersion": (ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int)),
    "nvrtcCreateProgram": (
        ctypes.POINTER(_PROGRAM),
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_int,
        _WORDS,
        _WORDS,
    ),
    "nvrtcCompileProgram": (_PROGRAM, ctypes.c_int, _WORDS),
    "nvrtcDestroyProgram": (ctypes.POINTER(_PROGRAM),),
    **{f"nvrtcGet{what}Size": (_PROGRAM, _SIZE) for what in ("ProgramLog", "CUBIN", "PTX")},
    **{f"nvrtcGet{what}": (_PROGRAM, ctypes.c_char_p) for what in ("ProgramLog", "CUBIN", "PTX")},
    "nvrtcGetErrorString": (ctypes.c_int,),
}
"""The parameters of what is called, as nvrtc.h has them."""


@functools.cache
def _library(path: Path) -> ctypes.CDLL:
    """The loaded library."""
    try:
        library = ctypes.CDLL(str(path))
        for name, parameters in SIGNATURES.items():
            getattr(library, name).argtypes = parameters
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    except (OSError, AttributeError) as e:
        raise ToolchainError(
            f"cannot load NVRTC from {path}: {e}. Run pip install --force-reinstall 'lntune[cuda]',"
            " or set LNTUNE_NVCC."
        ) from e


class Nvrtc(msgspec.Struct, frozen=True):
    """NVRTC by its library and the header folders that belong to it."""

    path: Path
    includes: tuple[Path, ...]

    @property
    def release(self) -> str:
        """The CUDA release it is of, such as "13.0"."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(_library(self.path).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        return f"{major.value}.{minor.value}"

    @property
    def identity(self) -> str:
        """What its output depends on, besides source and flags."""
        return " ".join(["nvrtc", self.release, self.path.name, *FLAGS])

    def cubin(self, source: str, arch: Architecture) -> Compiled:
        """Machine code, PTX and log of one architecture."""
        library, program = _library(self.path), ctypes.c_void_p()
        options = [
            f"--gpu-architecture={arch.name}",
            *FLAGS,
            *(f"--include-path={i}" for i in self.includes),
        ]
        words = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        self._check(
            library.nvrtcCreateProgram(
                ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None
            )
        )
        try:
            status = library.nvrtcCompileProgram(program, len(options), words)
            log = self._get(program, "ProgramLog").decode(errors="replace")
            if status:
                raise failure(f"NVRTC {self.release}", arch.name, log or self._meaning(status))
            return Compiled(
                self._get(program, "CUBIN"),
                log,
                self._get(program, "PTX").rstrip(b"\0").decode(errors="replace"),
            )
        finally:
            library.nvrtcDestroyProgram(ctypes.byref(program))

    def _get(self, program: ctypes.c_void_p, what: str) -> bytes:
        """One of the outputs of a compilation."""
        library, size = _library(self.path), ctypes.c_size_t()
        self._check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(library, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw.rstrip(b"\0") if what == "ProgramLog" else buffer.raw

    def _meaning(self, status: int) -> str:
        """A status in words."""
        return bytes(_library(self.path).nvrtcGetErrorString(status)).decode(errors="replace")

    def _check(self, status: int) -> None:
        """BuildError unless the call went well."""
        if status:
            raise BuildError(
                f"NVRTC at {self.path} failed: {self._meaning(status)}. Set LNTUNE_NVCC to use nvcc"
                " instead."
            )


def _candidates() -> Iterator[tuple[Path, tuple[Path, ...]]]:
    """Folders with the library, each with the header folders of the same release: mixing releases
    compiles and miscomputes.
    """
    for wheel in locate.wheels():
        if wheel.name.startswith("cu1"):
            yield wheel / "lib", (wheel / "include", wheel / "include" / "cccl")
        elif wheel.name == "cuda_nvrtc":
            yield (
                wheel / "lib",
                (
                    wheel.parent / "cuda_runtime" / "include",
                    wheel.parent / "cuda_cccl" / "include",
                ),
            )
    for toolkit in locate.toolkits():
        yield toolkit / "lib64", (toolkit / "include", toolkit / "include" / "cccl")


def find(missing: list[str]) -> Nvrtc | None:
    """The first NVRTC with its headers; what keeps another from being used is added to
    `missing`.
    """
    for folder, includes in _candidates():
        libraries = sorted(folder.glob("libnvrtc.so*"))
        absent = [h for h in _HEADERS if not any((i / h).is_file() for i in includes)]
        if libraries and not absent:
            return Nvrtc(libraries[0], tuple(i for i in includes if i.is_dir()))
        if libraries:
            missing.append(
                f"{libraries[0]} lacks the headers {', '.join(absent)} (pip install 'lntune[cuda]')"
            )
    return None
