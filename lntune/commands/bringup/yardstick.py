"""The bandwidth of a plain copy, which bounds that of any kernel that only moves data."""

from __future__ import annotations

import os

from lntune import timing
from lntune.backends.cuda import timing as device_timing

SECONDS = 0.5
_LARGEST = 1 << 30
"""Bytes of the tensor that is copied, at most; twice that is moved."""
_SHARE = 16
"""At most this fraction of the free memory is copied."""


def copy(place: str) -> float:
    """Bytes a second of `y.copy_(x)`, read and written, on data far beyond the caches; the median.
    `place` is PyTorch's name of the device.
    """
    import torch

    if place.startswith("cuda"):
        return device_timing.copy_bandwidth(place, SECONDS)
    size = min(
        _LARGEST, max(1 << 20, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _SHARE)
    )
    x = torch.ones(size, dtype=torch.uint8)  # ones: zeros may be pages that are not there yet
    y = torch.ones_like(x)
    return (
        2
        * size
        / timing.measure({"copy": lambda: y.copy_(x)}, SECONDS, rounds=3).timings["copy"].median_us
        * 1e6
    )
