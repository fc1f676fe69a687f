"""GPUs by name, whether one is here or not: what `--target` says becomes a Device."""

from __future__ import annotations

from typing import NamedTuple

from lntune.architectures import ARCHITECTURES, architecture
from lntune.backends.cuda import driver
from lntune.device import Device

_MB = 1 << 20


class Product(NamedTuple):
    """A GPU that people own: multiprocessors, L2 in MiB, memory bandwidth in GB/s and boost clock
    in MHz of its data sheet.
    """

    name: str
    arch: str
    multiprocessors: int
    l2: int
    gbps: float
    mhz: float


# From NVIDIA's data sheets and architecture white papers; of several memories the larger one.
PRODUCTS: dict[str, Product] = {
    "nvidia/nvidia-t4": Product("Tesla T4", "sm_75", 40, 4, 320, 1590),
    "nvidia/nvidia-a100": Product("NVIDIA A100", "sm_80", 108, 40, 2039, 1410),
    "nvidia/geforce-rtx-3090": Product("NVIDIA GeForce RTX 3090", "sm_86", 82, 6, 936, 1695),
    "nvidia/nvidia-l4": Product("NVIDIA L4", "sm_89", 58, 48, 300, 2040),
    "nvidia/geforce-rtx-4090": Product("NVIDIA GeForce RTX 4090", "sm_89", 128, 72, 1008, 2520),
    "nvidia/nvidia-h100": Product("NVIDIA H100", "sm_90", 132, 50, 3350, 1980),
    "nvidia/nvidia-h200": Product("NVIDIA H200", "sm_90", 132, 60, 4800, 1980),
    "nvidia/nvidia-b200": Product("NVIDIA B200", "sm_100", 148, 126, 8000, 1965),
    "nvidia/geforce-rtx-5090": Product("NVIDIA GeForce RTX 5090", "sm_120", 170, 96, 1792, 2407),
}
"""Target -> product."""


def product_of(device: Device) -> Product:
    """What is known of a GPU's product: by its name ("NVIDIA H100 80GB HBM3"), else the first of
    its architecture.
    """
    named = [p for p in PRODUCTS.values() if p.name in device.name]
    of_arch = [p for p in PRODUCTS.values() if p.arch == device.isa]
    return (named or of_arch)[0]


def _gpu(name: str, of: Product) -> Device:
    shared = architecture(of.arch).shared_block
    return Device("gpu", name, of.arch, of.multiprocessors, l2=of.l2 * _MB, shared_memory=shared)


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
        product = PRODUCTS[target]
        return _gpu(product.name, product)
    arch = target.removeprefix("cuda:")
    if target == "cuda" or (target.startswith("cuda:") and arch.isdecimal()):
        return driver.device(0 if target == "cuda" else int(arch))
    if not target.startswith("cuda:") or arch not in ARCHITECTURES:
        return None
    return _gpu(arch, next(p for p in PRODUCTS.values() if p.arch == arch))
