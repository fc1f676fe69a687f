"""GPUs by name, whether one is here or not: what `--target` says becomes a Device."""

from __future__ import annotations

from lntune.architectures import ARCHITECTURES, Architecture, architecture
from lntune.backends.cuda import driver
from lntune.device import Device

_MB = 1 << 20

# Multiprocessors and L2 of the products people own, from NVIDIA's data sheets and architecture
# white papers.
PRODUCTS: dict[str, tuple[str, str, int, int]] = {
    "nvidia/nvidia-t4": ("Tesla T4", "sm_75", 40, 4),
    "nvidia/nvidia-a100": ("NVIDIA A100", "sm_80", 108, 40),
    "nvidia/geforce-rtx-3090": ("NVIDIA GeForce RTX 3090", "sm_86", 82, 6),
    "nvidia/nvidia-l4": ("NVIDIA L4", "sm_89", 58, 48),
    "nvidia/geforce-rtx-4090": ("NVIDIA GeForce RTX 4090", "sm_89", 128, 72),
    "nvidia/nvidia-h100": ("NVIDIA H100", "sm_90", 132, 50),
    "nvidia/nvidia-h200": ("NVIDIA H200", "sm_90", 132, 60),
    "nvidia/nvidia-b200": ("NVIDIA B200", "sm_100", 148, 126),
    "nvidia/geforce-rtx-5090": ("NVIDIA GeForce RTX 5090", "sm_120", 170, 96),
}
"""Target -> (name, architecture, multiprocessors, L2 in MiB)."""


def _gpu(name: str, of: Architecture, multiprocessors: int, l2: int) -> Device:
    shared = of.shared_block
    return Device("gpu", name, of.name, multiprocessors, l2=l2 * _MB, shared_memory=shared)


def names() -> list[str]:
    """The targets that are the same on every machine."""
    return ["cuda", *(f"cuda:{arch}" for arch in ARCHITECTURES), *PRODUCTS]


def find(target: str) -> Device | None:
    """The GPU of a target: "cuda" or "cuda:1" (one that is here), an architecture such as
    "cuda:sm_90", or a product such as "nvidia/nvidia-h100"; None for any other text.

    An architecture stands for its first product in PRODUCTS.

    Raises:
        ToolchainError: it is a GPU that is here, and there is none that can be used.
        InputError: it is a GPU that is here, and there are fewer.
    """
    if target in PRODUCTS:
        name, arch, multiprocessors, l2 = PRODUCTS[target]
        return _gpu(name, architecture(arch), multiprocessors, l2)
    arch = target.removeprefix("cuda:")
    if target == "cuda" or (target.startswith("cuda:") and arch.isdecimal()):
        return driver.device(0 if target == "cuda" else int(arch))
    if not target.startswith("cuda:") or arch not in ARCHITECTURES:
        return None
    _, _, multiprocessors, l2 = next(p for p in PRODUCTS.values() if p[1] == arch)
    return _gpu(arch, architecture(arch), multiprocessors, l2)
