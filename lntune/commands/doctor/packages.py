"""The packages that lntune runs with, and the C++ compiler that it builds with."""

from __future__ import annotations

import os
import subprocess
import sys

from lntune import __version__
from lntune.commands.doctor.finding import Finding, looked
from lntune.errors import LntuneError
from lntune.system import toolchain
from lntune.system.toolchain import MISSING


def examine() -> list[Finding]:
    """Whether the packages are here in versions that fit, and the compiler runs. Neither TVM nor a
    compiler is needed where kernels are only called: they may come from elsewhere.
    """
    return [*looked("packages", _versions), *looked("C++ compiler", _compiler)]


def _versions() -> list[Finding]:
    old = sys.version_info < (3, 10)
    findings = [
        Finding(
            "python",
            "fail" if old else "ok",
            sys.version.split()[0],
            "Install Python 3.10 or newer.",
        )
    ]
    problems = toolchain.incompatible()
    findings.append(Finding("lntune", "ok", __version__))
    for package in (*toolchain.COMPATIBLE, "torch"):
        version = toolchain.installed(package)
        problem = next((p for p in problems if p.startswith(f"{package} ")), "")
        missing = version == MISSING
        remedy = (
            f"{problem[0].upper()}{problem[1:]}."
            if problem
            else "Install torch."
            if missing
            else ""
        )
        bad = "warn" if missing and package == "apache-tvm" else "fail"
        findings.append(Finding(package, bad if problem or missing else "ok", version, remedy))
    return findings


def _compiler() -> Finding:
    try:
        words = toolchain.command()
        process = toolchain.run([*words, "--version"], timeout=20)
    except LntuneError as e:
        serving = toolchain.installed("apache-tvm") == MISSING and not os.environ.get("CXX")
        return Finding("C++ compiler", "warn" if serving else "fail", "none", str(e))
    except (OSError, subprocess.SubprocessError) as e:
        return Finding(
            "C++ compiler", "fail", f"does not run: {e}", "Install g++ or clang, or set CXX."
        )
    answer = (process.stdout.strip() or process.stderr.strip() or "it says nothing").splitlines()[0]
    if process.returncode or not process.stdout.strip():
        return Finding(
            "C++ compiler",
            "fail",
            f"does not run: {toolchain.compiler()} --version: {answer}",
            "Install g++ or clang, or set CXX.",
        )
    return Finding("C++ compiler", "ok", f"{toolchain.compiler()} ({answer})")
