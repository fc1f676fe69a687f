"""The backward of layer norm as a node of PyTorch's autograd graph, in C++: how it is compiled,
loaded and given its kernels (`layer_norm_node.cpp` says why).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch

from lntune import device as device_module
from lntune.case import BUCKETS, Case
from lntune.kernels.direct import count_function, dtype_number
from lntune.ops.layer_norm_backward import arguments
from lntune.system import exchange, native, paths
from lntune.system.later import Later, passes
from lntune.torch import recording
from lntune.torch.reloading import on_kernels_changed

SOURCE = paths.PACKAGE / "torch" / "layer_norm_node.cpp"
RECORD = ctypes.c_void_p()
"""For tables of direct calls: where the address of the function that attaches a node to an output
is, once it is loaded.
"""
# What a kernel's argument is called in the C++, in the order of its enum.
_ORDER = ("dy", "x", "mean", "rstd", "weight", "dx", "dgamma", "dbeta")


def _build() -> native.Build:
    """How the C++ is compiled: against the headers and libraries of this PyTorch."""
    folder = Path(torch.__file__).parent
    includes = (str(folder / "include"), *exchange.includes())
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return native.Build(
        includes,
        ("-std=c++20", abi),
        (f"-L{folder / 'lib'}", "-ltorch_cpu", "-lc10"),
        torch.__version__,
    )


def ensure_library() -> Path:
    """Compile the C++ if it is not there yet (some ten seconds, once per machine and release of
    PyTorch); the answer is its file.

    Raises:
        BuildError: it cannot be compiled or stored.
    """
    return native.compiled(SOURCE, _build())


def ready() -> bool:
    """True where nodes can be had without compiling: they are loaded, or lie in the cache and are
    loaded now.
    """
    if _loaded:
        return True
    try:
        compiled = native.is_there(SOURCE, _build())
    except Exception:  # kernels warn of what is wrong with the cache
        return False
    return compiled and not reason_missing()


def compile_once() -> bool:
    """True where nodes can be had now and could not before: the C++ is compiled at the first call
    in a process, and not tried again but for a fault that may have passed.
    """
    return not _loaded and not reason_missing()


def reason_missing() -> str:
    """Why there are no such nodes in this process, so that autograd.Function serves; empty where
    there are, which are loaded then. What may pass, a full disk, is tried again later.
    """
    if _loaded:
        return ""
    if not _missing or (passes(_missing[0]) and _later.due):
        try:
            with _later.trying():
                _load()
        except Exception as e:
            _missing[:] = [e]
        else:
            return ""
    return str(_missing[0]) or type(_missing[0]).__name__


def _load() -> None:
    exchange.require_table()
    library = native.load(SOURCE, ctypes.CDLL, _build())
    functions = exchange.functions(
        "TVMFFIFunctionCall", "TVMFFIErrorMoveFromRaised", "TVMFFIObjectDecRef"
    )
    library.lntune_layer_norm_node_init(*functions)
    RECORD.value = ctypes.cast(library.lntune_layer_norm_node_record, ctypes.c_void_p).value
    number, numbers = ctypes.c_int64, ctypes.POINTER(ctypes.c_int64)
    library.lntune_layer_norm_node_remember.argtypes = [ctypes.c_void_p, *[number] * 9, numbers]
    library.lntune_layer_norm_node_count.argtypes = [ctypes.c_void_p]
    _loaded.append(library)
    _count_calls(bool(recording.SINKS))


_missing: list[Exception] = []
"""Why nodes could not be had at the last try."""
_later = Later()
_loaded: list[ctypes.CDLL] = []


def remember(
    case: Case,
    kernel: Callable[..., None] | None,
    weight: str | None,
    bias: str | None,
    wanted: tuple[bool, bool, bool],
) -> None:
    """Serve backwards of a case, in its row bucket, by a kernel, by PyTorch's operator where that
    is None. `weight` and `bias` are "same" (in the dtype of x), "float32" or None; `wanted` is for
    dx, dgamma, dbeta.
    """
    # copies its arguments; only kernels can be called from C
    if not _loaded or isinstance(kernel, functools.partial):
        return
    kinds = {None: 0, "same": dtype_number(case.dtype), "float32": dtype_number("float32")}
    if kernel is None and not (case.dtype == "float32" and kinds[weight] < 2 and kinds[bias] < 2):  # noqa: PLR2004
        return  # Python rounds and widens as PyTorch's operator wants it
    order = [_ORDER.index(a.name) for a in arguments(case)] if kernel else []
    rows = [n.bit_length() for n in BUCKETS[case.bucket]]  # a bucket is a range of bit lengths
    mask = sum(want << i for i, want in enumerate(wanted))
    handle: int | None = None
    if kernel is not None:
        handle = kernel.__chandle__()  # type: ignore[attr-defined]
        _kept[handle] = kernel
    described = (case.hidden, kinds["same"], kinds[weight], kinds[bias], mask, *rows)
    tag = recording.tag(case, device_module.current())  # it serves tensors of the CPU only
    _loaded[0].lntune_layer_norm_node_remember(
        handle, *described, tag, len(order), (ctypes.c_int64 * len(order))(*order)
    )


@recording.on_change
def _count_calls(on: bool) -> None:
    for library in _loaded:
        library.lntune_layer_norm_node_count((on and count_function()) or None)


_kept: dict[int, Callable[..., None]] = {}  # kernels that the C++ points to


@on_kernels_changed
def _forget() -> None:
    for library in _loaded:
        library.lntune_layer_norm_node_forget()
