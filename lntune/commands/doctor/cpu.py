"""This machine's CPU, and with what PyTorch runs kernels on it: threads, calls, autograd."""

from __future__ import annotations

import msgspec

from lntune import device
from lntune.commands.doctor.finding import Finding, looked
from lntune.errors import LntuneError
from lntune.system import toolchain
from lntune.system.toolchain import MISSING
from lntune.words import counted


def examine() -> list[Finding]:
    """What the CPU is, and what would make its kernels slower than they could be."""
    return [*looked("cpu", _cpu), *looked("threads", _threads)]


def _cpu() -> list[Finding]:
    cpu = device.current()
    sizes = ", ".join(
        f"L{level} {size // 1024} KiB"
        for level, size in ((1, cpu.l1), (2, cpu.l2), (3, cpu.l3))
        if size
    )
    cores = counted(cpu.cores, "core")
    level = Finding(
        "cpu",
        "ok",
        f"{cpu.name}, {cores}, {cpu.isa} ({8 * cpu.vector_bytes}-bit"
        f" vectors){', ' + sizes if sizes else ''}",
    )
    if cpu.isa in ("x86-64", "x86-64-v2"):
        level = msgspec.structs.replace(
            level, status="warn", remedy="No AVX2: kernels use 128-bit vectors."
        )
    return [level, Finding("log folder name", "ok", cpu.slug)]


def _threads() -> list[Finding]:
    if toolchain.installed("torch") == MISSING:
        return [
            Finding("threads", "fail", "no torch, whose threads kernels run on", "Install torch.")
        ]
    try:
        import torch

        from lntune.backends.cpu import runtime

        threads, pool = torch.get_num_threads(), runtime.has_pool()
    except Exception as e:
        return [
            Finding(
                "threads",
                "fail",
                f"{type(e).__name__}: {e}",
                "Kernels cannot be run without PyTorch and the runtime.",
            )
        ]
    state = "on PyTorch's OpenMP pool" if pool else "no OpenMP pool found"
    remedy = "" if pool else "Kernels run on one thread: this PyTorch does not use libgomp."
    return [
        Finding("threads", "ok" if pool else "warn", f"{threads} {state}", remedy),
        *looked("direct calls", _direct, "warn"),
        *looked("training", _training, "warn"),
        *looked("matrix products", _products, "warn"),
    ]


def _direct() -> Finding:
    from lntune.kernels import direct

    try:
        by = (
            "torch's C shim"
            if direct.has_shim()
            else "DLPack (slower by 0.3 us: this torch lacks the C shim)"
        )
    except (OSError, LntuneError) as e:
        return Finding(
            "direct calls", "warn", str(e), "Calls work, each slower by some microseconds."
        )
    return Finding("direct calls", "ok", f"outputs made by {by}")


def _training() -> Finding:
    """What takes the backward of layer norm from autograd to the kernel."""
    from lntune.torch import layer_norm_node

    if why := layer_norm_node.reason_missing():
        return Finding(
            "training",
            "warn",
            why,
            "Layer norm trains, each forward and backward slower by some microseconds.",
        )
    return Finding("training", "ok", "layer norm's backward is a node in C++")


def _products() -> Finding:
    """Which library multiplies an LSTM's float32 matrices on the CPU."""
    from lntune.torch import products

    if not products.mkl_is_slow():
        return Finding("matrix products", "ok", "float32 by PyTorch's own operators")
    if products.onednn_pays():
        return Finding(
            "matrix products",
            "ok",
            "float32 by oneDNN; MKL leaves half of this CPU's vectors unused",
        )
    return Finding(
        "matrix products",
        "warn",
        "float32 by MKL, which leaves half of this CPU's vectors unused",
        "Use a PyTorch with oneDNN, not switched off.",
    )
