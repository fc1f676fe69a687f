"""`lntune.load`: calls served from a bundle."""

from __future__ import annotations

import os

from lntune import device as device_module
from lntune.bundle import loaded
from lntune.bundle.loaded import Bundle, BundleWarning
from lntune.system import callers
from lntune.torch.reloading import LOCK, reload

__all__ = ["Bundle", "BundleWarning", "load", "unload"]


def load(folder: str | os.PathLike[str], sha256: str = "") -> Bundle:
    """Serve calls from a bundle that `lntune export` wrote, from now on and before any tuning log.

    Each file is held against its SHA-256 sum now, and each kernel once more when it is loaded. What
    the bundle has for another device is left alone, with a warning where nothing of it fits this
    one. `LNTUNE_BUNDLE` in the environment does the same from the start.

    Args:
        folder: the bundle.
        sha256: the sum that `lntune export` printed, where it is known: another bundle is refused.

    Raises:
        InputError: there is no bundle.
        lntune.bundle.manifest.BundleError: something of it was altered, or others can write to it.
    """
    with LOCK:
        bundle = loaded.add(folder, sha256)
        reload()
    here = device_module.current()
    misfits = bundle.misfits(here)
    if len(misfits) == len(bundle.manifest.targets):
        reasons = "; ".join(f"{target.device.slug}: {', '.join(why)}" for target, why in misfits)
        callers.warn(
            f"nothing in the bundle {bundle.folder} fits this machine's CPU ({reasons})",
            BundleWarning,
        )
    return bundle


def unload(bundle: Bundle | None = None) -> None:
    """Serve calls no longer from a bundle of `load`; from none of them without one."""
    with LOCK:
        loaded.drop(bundle)
        reload()
