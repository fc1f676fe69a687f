"""Where CUDA's programs, libraries and headers are: in a toolkit, among pip's nvidia packages, or
inside Triton's.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from lntune.system import paths

STANDARD = Path("/usr/local/cuda")
"""Where NVIDIA's own installer puts a toolkit, which is often not on PATH."""


def named_toolkits() -> list[Path]:
    """The toolkit folders the environment names: CUDA_HOME, then CUDA_PATH."""
    return [
        paths.expanded(value)
        for name in ("CUDA_HOME", "CUDA_PATH")
        if (value := os.environ.get(name))
    ]


def toolkits() -> list[Path]:
    """All toolkit folders, those the environment names first."""
    return [*named_toolkits(), STANDARD]


def _package(name: str) -> list[Path]:
    """The folders of an installed package, which is not imported."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return []
    return [Path(p) for p in spec.submodule_search_locations or ()] if spec else []


def wheels() -> list[Path]:
    """The folders of pip's nvidia packages, newest layout first: `cu13`, then one per component
    such as `cuda_nvrtc`.
    """
    folders = [
        p
        for folder in _package("nvidia")
        if folder.is_dir()
        for p in folder.iterdir()
        if p.is_dir()
    ]
    return sorted(folders, key=lambda p: (not p.name.startswith("cu1"), p.name))


def program(name: str) -> str | None:
    """Path of one of CUDA's programs: the environment's toolkits, PATH, the usual place, pip's
    packages, Triton's copy.
    """
    first = [t / "bin" for t in named_toolkits()]
    last = [
        STANDARD / "bin",
        *(w / "bin" for w in wheels()),
        *(t / "backends" / "nvidia" / "bin" for t in _package("triton")),
    ]
    for folder in (*first, None, *last):
        if path := shutil.which(name, path=None if folder is None else str(folder)):
            return path
    return None
