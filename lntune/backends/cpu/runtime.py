"""How built CPU kernels are loaded: with `tvm_ffi` and a few C functions of lntune's own, without
TVM's compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lntune.errors import BuildError
from lntune.system import exchange, native, paths, sealed
from lntune.system.forks import INNER, held_at_fork

SOURCE = paths.PACKAGE / "backends" / "cpu" / "runtime.c"

# symbol a TVM module looks up when it is loaded -> (our function, TVM's own)
_SYMBOLS = {
    b"__TVMBackendParallelLaunch": ("lntune_parallel_launch", "TVMBackendParallelLaunch"),
    b"__TVMBackendAllocWorkspace": ("lntune_workspace_alloc", "TVMBackendAllocWorkspace"),
    b"__TVMBackendFreeWorkspace": ("lntune_workspace_free", "TVMBackendFreeWorkspace"),
}
_lock = held_at_fork(threading.RLock(), INNER)
# A process forks only between two loads, never in the middle of another thread's, whose lock would
# stay shut in the child.


def source_hash() -> str:
    """Hash of the runtime's C source."""
    return native.source_hash(SOURCE)


def ensure_library() -> Path:
    """The compiled runtime, compiled now if it is not there yet (once per machine)."""
    return native.compiled(SOURCE)


class _Library(ctypes.CDLL):
    """Our compiled runtime."""

    has_pool = False


@functools.cache
def _own() -> _Library:
    """The compiled runtime, loaded and connected to PyTorch's pool.

    Raises:
        BuildError: it cannot be compiled, stored or loaded.
    """
    import torch  # noqa: F401  (brings the OpenMP runtime into the process)

    library = native.load(SOURCE, _Library)
    error = ctypes.cast(exchange.ffi().TVMFFIErrorSetRaisedFromCStr, ctypes.c_void_p)
    torch_cpu = _torch_library()
    handle = ctypes.c_void_p(torch_cpu._handle if torch_cpu else None)
    library.has_pool = bool(library.lntune_runtime_init(_torch_threads(torch_cpu), error, handle))
    return library


def _torch_library() -> ctypes.CDLL | None:
    """PyTorch's library of CPU operators; None where it is built in another way."""
    import torch

    folder = Path(torch.__file__).parent / "lib"
    suffix = "dylib" if sys.platform == "darwin" else "so"
    try:
        return ctypes.CDLL(str(folder / f"libtorch_cpu.{suffix}"))
    except OSError:
        return None


def _torch_threads(library: ctypes.CDLL | None) -> ctypes.c_void_p:
    """Address of at::get_num_threads, null where PyTorch's library is built in another way."""
    if library is None:
        return ctypes.c_void_p(None)
    try:
        return ctypes.cast(library["_ZN2at15get_num_threadsEv"], ctypes.c_void_p)
    except AttributeError:
        return ctypes.c_void_p(None)


def has_pool() -> bool:
    """True when PyTorch's OpenMP pool was found; without it kernels run on one thread."""
    return _own().has_pool


def _register(name: bytes, library: ctypes.CDLL, function: str) -> None:
    pointer = ctypes.cast(getattr(library, function), ctypes.c_void_p)
    if exchange.ffi().TVMFFIEnvModRegisterContextSymbol(name, pointer):
        raise BuildError(f"tvm_ffi refused to register {name.decode()}.")


@contextlib.contextmanager
def own_symbols() -> Iterator[None]:
    """Modules loaded in this block use our launcher and scratch memory; others keep TVM's."""
    with _lock:
        for name, (ours, _) in _SYMBOLS.items():
            _register(name, _own(), ours)
        try:
            yield
        finally:
            # TVM's runtime is in the process: give its own modules back what they expect
            if "tvm" in sys.modules:
                tvm_runtime = _tvm_runtime()
                for name, (_, theirs) in _SYMBOLS.items():
                    _register(name, tvm_runtime, theirs)


@functools.cache
def _tvm_runtime() -> ctypes.CDLL:
    folder = Path(sys.modules["tvm"].__file__ or "").parent / "lib"
    suffix = "dylib" if sys.platform == "darwin" else "so"
    return ctypes.CDLL(str(folder / f"libtvm_runtime.{suffix}"))


_keep: list[Any] = []


def load(path: Path) -> Callable[..., None]:
    """The kernel in a shared library, whose digest is checked before, as a function that takes
    torch tensors over DLPack.

    Arguments are checked by the kernel for number, dtype, shape and contiguity, at about 0.1 us
    each.

    Raises:
        DamagedError: the file is not what was stored.
        OSError: the system refuses to load it, or it is no kernel.
        BuildError: the runtime cannot be compiled or loaded.
    """
    import tvm_ffi

    def mapped() -> Any:
        try:
            module = tvm_ffi.load_module(str(path.resolve()))
            return module, module["main"]
        except Exception as e:
            raise OSError(f"{path} is no kernel that can be loaded here: {e}") from e

    with own_symbols():
        module, function = sealed.loaded(path, mapped)
    _keep.append(module)  # the function does not keep its library mapped
    return function  # type: ignore[no-any-return]
