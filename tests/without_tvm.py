"""Processes that have torch and tvm_ffi, and neither TVM nor a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lntune.system import paths

NO_TVM = """
import importlib.machinery, importlib.metadata, sys

# As if apache-tvm's modules had never been installed ...
find_spec = importlib.machinery.PathFinder.find_spec
def without_modules(cls, name, path=None, target=None):
    return None if name.partition(".")[0] == "tvm" else find_spec(name, path, target)

importlib.machinery.PathFinder.find_spec = classmethod(without_modules)
"""
NO_METADATA = """
# ... nor what tells its version.
discover = importlib.metadata.Distribution.discover
def without_tvm(cls, **asked):
    return (d for d in discover(**asked) if (d.metadata["Name"] or "").lower() != "apache-tvm")

importlib.metadata.Distribution.discover = classmethod(without_tvm)
"""
HIDDEN = NO_TVM + NO_METADATA


def child(code: str, folder: Path, *options: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Python code in a process that has torch and tvm_ffi, and neither TVM nor a compiler; `more`
    is its environment beside this process's.
    """
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(HIDDEN)
    path = os.pathsep.join(
        [str(folder), str(paths.PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "PATH": str(folder / "bin"),
        "LNTUNE_NVCC": "",
        "CUDA_HOME": "",
        "CUDA_PATH": "",
        **more,
    }
    environment.pop("CXX", None)
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=120,
    )
