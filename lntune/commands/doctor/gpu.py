"""The GPUs of this machine, NVIDIA's driver, and the CUDA compiler that makes their kernels."""

from __future__ import annotations

import re

from lntune.backends import cuda
from lntune.commands.doctor.finding import Finding, looked
from lntune.system import toolchain
from lntune.system.toolchain import MISSING
from lntune.words import counted


def examine() -> list[Finding]:
    """Whether kernels can be launched on the GPUs that are here, and made for them."""
    return [
        *looked("gpu", _gpu),
        *looked("CUDA compiler", lambda: _cuda_compiler(_release())),
    ]


def _release() -> str:
    """The CUDA release that the driver is for; empty where there is no GPU that can be used, and so
    no need of a compiler.
    """
    from lntune.backends.cuda import driver

    if toolchain.installed("torch") == MISSING:
        return ""
    opened = driver.opened()
    return "" if opened.missing else opened.release


def _gpu() -> Finding:
    """The GPUs that are here, and whether kernels can be launched on them."""
    if toolchain.installed("torch") == MISSING:
        return Finding("gpu", "warn", "not known without torch", "Install torch.")
    from lntune.backends.cuda import driver

    try:
        import torch

        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    except Exception as e:
        return Finding("gpu", "warn", f"not known: {type(e).__name__}: {e}", "Install torch again.")
    opened = driver.opened()
    if opened.missing:
        state, remedy = (
            ("warn", "Eager mode serves them until that is mended.") if seen else ("ok", "")
        )
        return Finding("gpu", state, f"{seen or 'none'} ({opened.missing.rstrip('.')})", remedy)
    lines = [
        gpu.rstrip(".")
        if isinstance(gpu, str)  # why it cannot be used
        else f"{gpu.name} (cuda:{i}, {gpu.isa}, {counted(gpu.cores, 'multiprocessor')})"
        for i, gpu in enumerate(opened.devices)
    ]
    detail, remedy = f"{'; '.join(lines)}; driver for CUDA {opened.release}", ""
    if any(isinstance(gpu, str) for gpu in opened.devices):
        remedy = "Eager mode serves what kernels cannot be built for."
    if not seen:
        detail, remedy = (
            f"{detail}; PyTorch {torch.__version__} uses none",
            "Install a PyTorch that is built for CUDA.",
        )
    return Finding("gpu", "warn" if remedy else "ok", detail, remedy)


def _cuda_compiler(release: str = "") -> Finding:
    """The compiler, and whether the driver, of a CUDA release, can load what it makes; without a
    GPU it is not needed.
    """
    if why := cuda.available():
        return Finding("CUDA compiler", "warn" if release else "ok", "none", why if release else "")
    name = cuda.identity()
    numbers = re.search(r"\d+", name)
    if release and numbers and int(numbers[0]) > int(release.partition(".")[0]):
        major = release.partition(".")[0]
        remedy = (
            f"Update the driver, or pip install nvidia-cuda-nvrtc-cu{major}"
            f" nvidia-cuda-runtime-cu{major} nvidia-cuda-cccl-cu{major}."
        )
        return Finding(
            "CUDA compiler",
            "warn",
            f"{name}, whose code a driver for CUDA {release} does not load",
            remedy,
        )
    return Finding("CUDA compiler", "ok", name)
