"""Layer norm by kernels that lntune has tuned and built for CPUs, as a repository of the `kernels`
package has them: `lntune export --hf` copies this file there, beside the kernels.

It stands alone: Python's library, PyTorch and tvm_ffi. A call for which there is a kernel of its
hidden size, dtype and number of rows, whose code this CPU can run, goes to it, forward and
backward; every other call is PyTorch's.
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_FOLDER = Path(__file__).parent
_DTYPES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
_SYMBOLS = {
    b"__TVMBackendParallelLaunch": ("lntune_parallel_launch", "TVMBackendParallelLaunch"),
    b"__TVMBackendAllocWorkspace": ("lntune_workspace_alloc", "TVMBackendAllocWorkspace"),
    b"__TVMBackendFreeWorkspace": ("lntune_workspace_free", "TVMBackendFreeWorkspace"),
}
"""What a kernel looks up when it is loaded -> our function, TVM's own."""
_lock = threading.RLock()
_loaded: dict[str, Any] = {}
_kept: list[Any] = []


def _table() -> dict[tuple[str, int, str, int, str], str]:
    """The files of kernels whose code this CPU can run, by operator, hidden size, dtype, row bucket
    and variant; of several the one that uses most instructions.
    """
    flags: set[str] = set()
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("flags"):
                flags = set(line.partition(":")[2].split())
                break
    except OSError:
        pass
    known: dict[tuple[str, int, str, int, str], str] = {}
    for one in _FACTS["kernels"]:
        if set(one["needs"]) <= flags:
            key = (one["op"], one["hidden"], one["dtype"], one["bucket"], one["variant"])
            known.setdefault(key, one["file"])
    return known


_FACTS: dict[str, Any] = json.loads((_FOLDER / "kernels.json").read_text(encoding="utf-8"))
_FILES = _table()


def _pointer(function: Any) -> ctypes.c_void_p:
    return ctypes.cast(function, ctypes.c_void_p)


def _runtime() -> tuple[Any, Any]:
    """tvm_ffi's library and ours, which runs kernels on PyTorch's threads."""
    if "" not in _loaded:
        import tvm_ffi.libinfo

        ffi = ctypes.CDLL(tvm_ffi.libinfo.find_libtvm_ffi())
        own = ctypes.CDLL(str(_FOLDER / _FACTS["runtime"]))
        cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        threads = _pointer(cpu["_ZN2at15get_num_threadsEv"])
        error = _pointer(ffi.TVMFFIErrorSetRaisedFromCStr)
        own.lntune_runtime_init(threads, error, ctypes.c_void_p(cpu._handle))
        _loaded[""] = ffi, own
    ffi, own = _loaded[""]
    return ffi, own


def _load(file: str) -> Any:
    """The function of a kernel's file."""
    import tvm_ffi

    ffi, own = _runtime()
    for name, (ours, _) in _SYMBOLS.items():
        ffi.TVMFFIEnvModRegisterContextSymbol(name, _pointer(getattr(own, ours)))
    try:
        module = tvm_ffi.load_module(str((_FOLDER / file).resolve()))
        function = module["main"]
    finally:
        tvm = sys.modules.get("tvm")  # its own modules get back what they expect
        if tvm is not None and tvm.__file__:
            theirs = ctypes.CDLL(str(Path(tvm.__file__).parent / "lib" / "libtvm_runtime.so"))
            for name, (_, symbol) in _SYMBOLS.items():
                ffi.TVMFFIEnvModRegisterContextSymbol(name, _pointer(getattr(theirs, symbol)))
    _kept.append(module)  # the function does not keep its library mapped
    return function


def _kernel(op: str, x: Tensor, hidden: int, variant: str) -> Any:
    """The kernel for rows like these; None where there is none."""
    rows = x.numel() // hidden
    bucket = next(i for i, (_, last) in enumerate(_FACTS["buckets"]) if rows <= last)
    file = _FILES.get((op, hidden, _DTYPES[x.dtype], bucket, variant))
    if file is None:
        return None
    if file not in _loaded:
        with _lock:
            if file not in _loaded:
                _loaded[file] = _load(file)
    return _loaded[file]


def _usual(*tensors: Tensor | None) -> bool:
    """True for plain tensors of the CPU that nobody watches or transforms."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch.is_autocast_enabled("cpu") or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if torch.autograd.forward_ad._current_level >= 0:
        return False
    first = tensors[0]
    assert first is not None
    return all(
        t is None
        or (
            type(t) in (Tensor, torch.nn.Parameter)
            and t.device.type == "cpu"
            and t.layout is torch.strided
            and t.dtype is first.dtype
        )
        for t in tensors
    )


class _LayerNorm(torch.autograd.Function):
    """Both passes by kernels; a backward of which gradients are recorded is PyTorch's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, hidden: int, eps: float
    ) -> Tensor:
        flat, vectors = (
            x.contiguous().view(-1, hidden),
            [v for v in (weight, bias) if v is not None],
        )
        y = torch.empty_like(flat)
        mean, rstd = (x.new_empty(len(flat), dtype=torch.float32) for _ in range(2))
        kernel = _kernel("layer_norm", x, hidden, _variant(weight, bias, "stats"))
        kernel(flat, *(v.contiguous() for v in vectors), eps, y, mean, rstd)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.hidden = hidden
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        (dy,), hidden, wanted = grads, ctx.hidden, ctx.needs_input_grad[:3]
        present = [v is not None for v in (x, weight, bias)]
        mask = [a and b for a, b in zip(wanted, present, strict=True)]
        names = ["weight"] if present[1] and mask[0] else []
        names += [n for n, want in zip(("dx", "dgamma", "dbeta"), mask, strict=True) if want]
        kernel = None
        if mask[0] and not torch.is_grad_enabled() and _usual(dy, x, weight, bias):
            kernel = _kernel("layer_norm_backward", x, hidden, "+".join(names))
        flat = x.contiguous().view(-1, hidden)
        if kernel is None:
            shape = (*x.shape[:-1], 1)
            statistics = (
                s.view(shape).to(x.dtype) if s.dtype is not x.dtype else s.view(shape)
                for s in (mean, rstd)
            )
            native = torch.ops.aten.native_layer_norm_backward
            out = native(dy.contiguous(), x, [hidden], *statistics, weight, bias, mask)
            return (*(g if m else None for g, m in zip(out, mask, strict=True)), None, None)
        made = [torch.empty_like(t) for t, m in zip((flat, weight, bias), mask, strict=True) if m]
        extra = [weight.contiguous()] if present[1] else []
        kernel(dy.contiguous().view(-1, hidden), flat, mean, rstd, *extra, *made)
        each = iter(made)
        dx, dgamma, dbeta = (next(each) if m else None for m in mask)
        assert dx is not None
        return dx.view(x.shape), dgamma, dbeta, None, None


def _variant(weight: Tensor | None, bias: Tensor | None, *more: str) -> str:
    names = [n for n, v in (("weight", weight), ("bias", bias)) if v is not None]
    return "+".join([*names, *more]) or "plain"


def layer_norm(
    input: Tensor,
    normalized_shape: list[int] | tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer normalization; arguments as those of torch.nn.functional.layer_norm."""
    given = input, list(normalized_shape), weight, bias, eps
    shape = tuple(normalized_shape)
    if len(shape) != 1 or input.dtype not in _DTYPES or eps < 0 or not _usual(input, weight, bias):
        return functional.layer_norm(*given)
    (hidden,) = shape
    fits = all(v is None or v.shape == shape for v in (weight, bias))
    if not input.numel() or not input.ndim or input.shape[-1] != hidden or not fits:
        return functional.layer_norm(*given)
    recorded = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (input, weight, bias)
    )
    if recorded:
        if _kernel("layer_norm", input, hidden, _variant(weight, bias, "stats")) is None:
            return functional.layer_norm(*given)
        function: Any = _LayerNorm.apply
        recorded_y: Tensor = function(input, weight, bias, hidden, eps)
        return recorded_y
    kernel = _kernel("layer_norm", input, hidden, _variant(weight, bias))
    if kernel is None:
        return functional.layer_norm(*given)
    flat = input.detach().contiguous().view(-1, hidden)
    y = torch.empty_like(flat)
    kernel(flat, *(v.detach().contiguous() for v in (weight, bias) if v is not None), eps, y)
    return y.view(input.shape)
