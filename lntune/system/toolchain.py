"""The C++ compiler of this machine, and the versions of the packages that generate code."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lntune.errors import BuildError, ToolchainError
from lntune.system import scratch

# Newer tvm-ffi releases import and compile beside TVM 0.27 and then crash inside MetaSchedule and
# IRModule pickling.
COMPATIBLE = {"apache-tvm": "0.27.", "apache-tvm-ffi": "0.1.14"}
"""Package -> the version prefix lntune is tested with."""
TUNE = "pip install 'lntune[tune]'"
"""Installs what builds kernels and tunes them; what serves them is there without."""
MISSING = "not installed"
"""What `installed` says of a package that is not there."""


def command() -> tuple[str, ...]:
    """How a C++ compiler is called: the words of `CXX`, split as a shell does ("ccache g++", "c++
    -m64"), else the first of c++, g++, clang++ on PATH.

    Raises:
        ToolchainError: there is none. Kernels built before still load.
    """
    cxx = os.environ.get("CXX", "").strip()
    candidates = [["c++"], ["g++"], ["clang++"]]
    if cxx:
        try:
            # A path with spaces in it is one word when there is such a program.
            candidates = [[cxx] if shutil.which(cxx) else shlex.split(cxx)]
        except ValueError as e:  # a quote that is not closed
            raise ToolchainError(
                f"CXX: got {cxx}, expected the command of a C++ compiler ({e})."
                " Correct it or unset it."
            ) from e
    for program, *options in filter(None, candidates):
        if path := shutil.which(program):
            return path, *options
    names = f"CXX={cxx}" if cxx else "c++, g++ or clang++"
    raise ToolchainError(
        f"no C++ compiler found ({names} on PATH); building a kernel needs one."
        " Install g++ or clang, or set CXX."
        + (f" It takes TVM as well: {TUNE}." if installed("apache-tvm") == MISSING else "")
    )


def compiler() -> str:
    """`command` as one text, for messages.

    Raises:
        ToolchainError: there is no compiler.
    """
    return shlex.join(command())


def shared() -> list[str]:
    """The compiler's options for a shared library: one that asks for no library it does not use,
    and that is the same bytes whenever and wherever the same is compiled.
    """
    if sys.platform == "darwin":
        return ["-shared", "-fPIC", "-undefined", "dynamic_lookup"]
    return ["-shared", "-fPIC", "-s", "-Wl,--as-needed", "-Wl,--build-id=none"]


def run(
    words: Sequence[str], timeout: float | None = None, output: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """A program run to its end, its outputs caught; what they have that is no UTF-8 (messages in
    Latin-1) becomes a question mark. When it is killed, as an interrupt does, or this process is,
    all it has started ends, and what it leaves in its temporary folder is removed; where this
    process is killed, the `output` that it is making too.

    Raises:
        OSError, subprocess.TimeoutExpired: it cannot be run, or takes longer than so many seconds.
    """
    folder = scratch.Scratch()
    # A worker's compilers are of its process group, and end with it.
    own_group = scratch.SYSTEM not in os.environ
    if own_group and output is not None:
        folder.takes(output)
    pipe = subprocess.PIPE
    try:
        with subprocess.Popen(
            words,
            stdout=pipe,
            stderr=pipe,
            encoding="utf-8",
            errors="replace",
            env=folder.environment,
            start_new_session=own_group,
        ) as process:
            if own_group:
                folder.serves(process.pid)
            try:
                stdout, stderr = process.communicate(timeout=timeout)
            except BaseException:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL) if own_group else process.kill()
                raise
        return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)
    finally:
        folder.remove()


def run_compiler(arguments: Sequence[str], output: Path) -> None:
    """Run the C++ compiler.

    Raises:
        ToolchainError: there is none, or it cannot be run.
        BuildError: it fails; its own words are in the message.
    """
    words = [*command(), *arguments, "-o", str(output)]
    try:
        compilation = run(words, output=output)
    except OSError as e:
        raise ToolchainError(
            f"cannot run the C++ compiler {words[0]}: {e.strerror or e}. Set CXX to one that works."
        ) from e
    if compilation.returncode:
        output_text = (compilation.stderr or compilation.stdout).strip()
        reason = _told(output_text) or f"exit code {compilation.returncode}"
        raise BuildError(f"{shlex.join(words)} failed:\n{reason}")


_EMPTY = re.compile(
    r"compilation terminated\.|please submit a (full )?bug report|see <.*> for instructions"
    r"|\S*: error: (ld returned \d+ exit status|linker command failed)|\d+ errors? generated",
    re.IGNORECASE,
)
"""How lines begin that compilers end with and that say nothing."""
_TELLING = re.compile(r"\berror\b|\bcannot\b|\bundefined\b|\bterminated\b", re.IGNORECASE)


def _told(text: str) -> str:
    """What a compiler said, with the line that counts as the last one, since what is quoted of an
    error is its ends: the first that names a fault.
    """
    lines = [line.rstrip() for line in text.splitlines() if not _EMPTY.match(line.strip())]
    telling = next((line for line in lines if _TELLING.search(line)), "")
    if telling and lines[-1] != telling:
        lines.append(telling)
    if "file size limit" in telling.lower() or "signal 25" in telling:
        lines[-1] += " (ulimit -f raises the limit)"
    return "\n".join(lines).strip() or text


@functools.cache
def installed(package: str) -> str:
    """Version of an installed package, or MISSING."""
    try:
        # None where the package's metadata is there and damaged
        return importlib.metadata.version(package) or MISSING
    except importlib.metadata.PackageNotFoundError:
        return MISSING


@functools.cache
def versions() -> dict[str, str]:
    """What a record and a built kernel depend on, by package."""
    from lntune import __version__

    packages = {"tvm": "apache-tvm", "tvm_ffi": "apache-tvm-ffi", "torch": "torch"}
    return {
        "lntune": __version__,
        **{k: installed(p) for k, p in packages.items()},
        "python": platform.python_version(),
    }


def incompatible() -> list[str]:
    """What is wrong with the installed TVM packages, one sentence each."""
    problems = []
    for package, prefix in COMPATIBLE.items():
        version = installed(package)
        if version == MISSING:
            problems.append(
                f"{package} is not installed, which builds kernels; {TUNE}"
                if package == "apache-tvm"
                else f"{package} is not installed; install {package}=={prefix}*"
            )
        elif not version.startswith(prefix):
            problems.append(
                f"{package} {version} is not {prefix}*, the only release known not to crash here;"
                f" install {package}=={prefix}*"
            )
    return problems
