"""Where modules that a user's schedules may import have gone, said where an import of the old name
fails.
"""

from __future__ import annotations

import re

_GPU = "lntune.transforms.gpu"
_MOVED = {
    "lntune.loops": "vectors, row_sums, prefetch and alignment of lntune.transforms.cpu",
    "lntune.sums": "lntune.transforms.cpu.accumulate",
    "lntune.streaming": "lntune.transforms.cpu.streaming",
    "lntune.strides": "lntune.transforms.strides",
    "lntune.gpu": f"{_GPU} (its turns, ragged and functions are grid_stride, guards and cuda_math)",
    "lntune.cuda": f"lntune.architectures and cache_hints and thread_private of {_GPU}",
}
"""Old name -> what it is now."""
_FAILED = re.compile(r"No module named '([\w.]+)'|cannot import name '(\w+)' from '([\w.]+)'")


def remedy(error: BaseException) -> str:
    """What to import instead, as a sentence, where an import failed because a module of lntune's
    has another name now; empty for any other error.
    """
    match = _FAILED.match(str(error)) if isinstance(error, ImportError) else None
    if match is None:
        return ""
    module, name, package = match.groups()
    old = module or f"{package}.{name}"
    return f"{old} is now {_MOVED[old]}." if old in _MOVED else ""
