"""The C++ compiler and the versions of what generates code."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

from lntune.errors import BuildError, ToolchainError

# Newer tvm-ffi releases import and compile beside TVM 0.27 and then crash inside MetaSchedule and IRModule pickling.
COMPATIBLE = {"apache-tvm": "0.27.", "apache-tvm-ffi": "0.1.14"}
"""Package -> the version prefix lntune is tested with."""


@functools.cache
def compiler() -> str:
    """Path of a C++ compiler: `CXX`, else the first of c++, g++, clang++ on PATH.

    Raises:
        ToolchainError: there is none. Kernels built before still load.
    """
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["c++", "g++", "clang++"]:
        if path := shutil.which(name):
            return path
    looked = f"CXX={asked}" if asked else "c++, g++ or clang++"
    raise ToolchainError(f"no C++ compiler found ({looked} on PATH); building a kernel needs one. Install g++ or clang, or set CXX.")


def run_compiler(arguments: list[str], output: Path) -> None:
    """Run the compiler; BuildError with its own words when it fails."""
    command = [compiler(), *arguments, "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")


@functools.cache
def installed(package: str) -> str:
    """Version of an installed package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@functools.cache
def versions() -> dict[str, str]:
    """What a record and a built kernel depend on, by package."""
    from lntune import __version__

    packages = {"tvm": "apache-tvm", "tvm_ffi": "apache-tvm-ffi", "torch": "torch"}
    return {"lntune": __version__, **{k: installed(p) for k, p in packages.items()}, "python": platform.python_version()}


def incompatible() -> list[str]:
    """What is wrong with the installed TVM packages, one sentence each."""
    problems = []
    for package, prefix in COMPATIBLE.items():
        version = installed(package)
        if version == "not installed":
            problems.append(f"{package} is not installed; install {package}=={prefix}*")
        elif not version.startswith(prefix):
            problems.append(f"{package} {version} is not {prefix}*, the only release known not to crash here; install {package}=={prefix}*")
    return problems
