"""How TVM is kept from compiling the CUDA source it makes, on machines with a GPU and without."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

_NAME = "tvm_callback_cuda_compile"


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """In the block TVM compiles kernels to CUDA source and no further; calls of other threads are
    as ever.

    Without a driver TVM 0.27 does so by itself. Where its CUDA runtime can be loaded (there is a
    driver, and PyTorch has brought libcudart) it hands the source to NVRTC through packages that
    need not be installed, with fast mathematics, and fails where it finds no headers: time lost on
    what nobody uses.
    """
    import tvm_ffi

    before: Any = tvm_ffi.get_global_func(_NAME, allow_missing=True)
    mine = threading.get_ident()

    def as_it_is(code: Any) -> Any:
        return code.encode() if before is None or threading.get_ident() == mine else before(code)

    tvm_ffi.register_global_func(_NAME, as_it_is, override=True)
    try:
        yield
    finally:
        if before is None:
            tvm_ffi.registry.remove_global_func(_NAME)
        else:
            tvm_ffi.register_global_func(_NAME, before, override=True)
