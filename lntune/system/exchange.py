"""What C code of ours needs to call tvm_ffi and to read torch's tensors: folders of headers,
addresses of functions, torch's DLPack exchange table.
"""

from __future__ import annotations

import ctypes
import functools
import sys

from lntune.errors import LntuneError


def includes() -> list[str]:
    """Folders of the headers of tvm_ffi and DLPack, which come with tvm_ffi."""
    import tvm_ffi.libinfo

    return [tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path()]


@functools.cache
def ffi() -> ctypes.CDLL:
    """tvm_ffi's own library."""
    import tvm_ffi.libinfo

    return ctypes.CDLL(tvm_ffi.libinfo.find_libtvm_ffi())


def functions(*names: str) -> list[ctypes.c_void_p]:
    """Addresses of functions of tvm_ffi's."""
    return [ctypes.cast(getattr(ffi(), name), ctypes.c_void_p) for name in names]


def table() -> ctypes.c_void_p | None:
    """torch's DLPack exchange table; None where this PyTorch has none (before 2.10)."""
    import torch

    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return ctypes.c_void_p(pointer_of(capsule, b"dlpack_exchange_api"))


def require_table() -> ctypes.c_void_p:
    """torch's DLPack exchange table, for C that reads Python's tensors.

    Raises:
        LntuneError: this PyTorch has none, or Python runs without the GIL.
    """
    if (address := table()) is None:
        raise LntuneError(
            "this PyTorch has no DLPack exchange table; direct calls need torch 2.10 or newer."
        )
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        raise LntuneError("direct calls rely on the GIL, and this Python runs without.")
    return address
