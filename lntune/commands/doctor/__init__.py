"""Is everything there that lntune needs, and what is known of this machine."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import msgspec

from lntune import __version__, backends, device
from lntune.backends import BACKENDS, cuda
from lntune.commands.doctor import content
from lntune.commands.doctor.finding import SHOWN, Finding, looked
from lntune.errors import LntuneError
from lntune.system import native, paths, sealed, toolchain
from lntune.system.sealed import DamagedError
from lntune.system.toolchain import MISSING
from lntune.words import counted

__all__ = ["Finding", "examine"]


def examine() -> list[Finding]:
    """All findings; whatever goes wrong in looking is a finding too."""
    found = [
        *looked("packages", _versions),
        *looked("C++ compiler", _compiler),
        *looked("cpu", _cpu),
        *looked("threads", _threads),
    ]
    found += [*looked("gpu", _gpu), *looked("CUDA compiler", lambda: _cuda_compiler(_release()))]
    found += [
        *looked("tuning log", _log),
        *looked("kernel cache", _cache),
        *looked("built kernels", _built),
        *looked("schedules", content.examine),
    ]
    return found


def _versions() -> list[Finding]:
    old = sys.version_info < (3, 10)
    found = [
        Finding(
            "python",
            "fail" if old else "ok",
            sys.version.split()[0],
            "Install Python 3.10 or newer.",
        )
    ]
    problems = toolchain.incompatible()
    found.append(Finding("lntune", "ok", __version__))
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
        found.append(Finding(package, "fail" if problem or missing else "ok", version, remedy))
    return found


def _compiler() -> Finding:
    try:
        words = toolchain.command()
        done = toolchain.run([*words, "--version"], timeout=20)
    except LntuneError as e:
        return Finding("C++ compiler", "fail", "none", str(e))
    except (OSError, subprocess.SubprocessError) as e:
        return Finding(
            "C++ compiler", "fail", f"does not run: {e}", "Install g++ or clang, or set CXX."
        )
    said = (done.stdout.strip() or done.stderr.strip() or "it says nothing").splitlines()[0]
    if done.returncode or not done.stdout.strip():
        return Finding(
            "C++ compiler",
            "fail",
            f"does not run: {toolchain.compiler()} --version: {said}",
            "Install g++ or clang, or set CXX.",
        )
    return Finding("C++ compiler", "ok", f"{toolchain.compiler()} ({said})")


def _cpu() -> list[Finding]:
    cpu = device.current()
    sizes = ", ".join(
        f"L{level} {size // 1024} KiB"
        for level, size in ((1, cpu.l1), (2, cpu.l2), (3, cpu.l3))
        if size
    )
    cores = counted(cpu.cores, "core")
    level = Finding(
        "cpu",
        "ok",
        f"{cpu.name}, {cores}, {cpu.isa} ({8 * cpu.vector_bytes}-bit"
        f" vectors){', ' + sizes if sizes else ''}",
    )
    if cpu.isa in ("x86-64", "x86-64-v2"):
        level = msgspec.structs.replace(
            level, status="warn", remedy="No AVX2: kernels use 128-bit vectors."
        )
    return [level, Finding("log folder name", "ok", cpu.slug)]


def _threads() -> list[Finding]:
    if toolchain.installed("torch") == MISSING:
        return [
            Finding("threads", "fail", "no torch, whose threads kernels run on", "Install torch.")
        ]
    try:
        import torch

        from lntune.backends.cpu import runtime

        threads, pool = torch.get_num_threads(), runtime.has_pool()
    except Exception as e:
        return [
            Finding(
                "threads",
                "fail",
                f"{type(e).__name__}: {e}",
                "Kernels cannot be run without PyTorch and the runtime.",
            )
        ]
    state = "on PyTorch's OpenMP pool" if pool else "no OpenMP pool found"
    remedy = "" if pool else "Kernels run on one thread: this PyTorch does not use libgomp."
    return [
        Finding("threads", "ok" if pool else "warn", f"{threads} {state}", remedy),
        *looked("direct calls", _direct, "warn"),
        *looked("training", _training, "warn"),
        *looked("matrix products", _products, "warn"),
    ]


def _direct() -> Finding:
    from lntune.kernels import direct

    try:
        by = (
            "torch's C shim"
            if direct.has_shim()
            else "DLPack (slower by 0.3 us: this torch lacks the C shim)"
        )
    except (OSError, LntuneError) as e:
        return Finding(
            "direct calls", "warn", str(e), "Calls work, each slower by some microseconds."
        )
    return Finding("direct calls", "ok", f"outputs made by {by}")


def _training() -> Finding:
    """What takes the backward of layer norm from autograd to the kernel."""
    from lntune.torch import layer_norm_node

    if why := layer_norm_node.reason_missing():
        return Finding(
            "training",
            "warn",
            why,
            "Layer norm trains, each forward and backward slower by some microseconds.",
        )
    return Finding("training", "ok", "layer norm's backward is a node in C++")


def _products() -> Finding:
    """Which library multiplies an LSTM's float32 matrices on the CPU."""
    from lntune.torch import products

    if not products.mkl_is_slow():
        return Finding("matrix products", "ok", "float32 by PyTorch's own operators")
    if products.onednn_pays():
        return Finding(
            "matrix products",
            "ok",
            "float32 by oneDNN; MKL leaves half of this CPU's vectors unused",
        )
    return Finding(
        "matrix products",
        "warn",
        "float32 by MKL, which leaves half of this CPU's vectors unused",
        "Use a PyTorch with oneDNN, not switched off.",
    )


def _release() -> str:
    """The CUDA release that the driver is for; empty where there is no GPU that can be used, and so
    no need of a compiler.
    """
    from lntune.backends.cuda import driver

    if toolchain.installed("torch") == MISSING:
        return ""
    here = driver.opened()
    return "" if here.missing else here.release


def _gpu() -> Finding:
    """The GPUs that are here, and whether kernels can be launched on them."""
    if toolchain.installed("torch") == MISSING:
        return Finding("gpu", "warn", "not known without torch", "Install torch.")
    from lntune.backends.cuda import driver

    try:
        import torch

        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    except Exception as e:
        return Finding("gpu", "warn", f"not known: {type(e).__name__}: {e}", "Install torch again.")
    here = driver.opened()
    if here.missing:
        state, remedy = (
            ("warn", "Eager mode serves them until that is mended.") if seen else ("ok", "")
        )
        return Finding("gpu", state, f"{seen or 'none'} ({here.missing.rstrip('.')})", remedy)
    told = []
    for i, found in enumerate(here.devices):
        if isinstance(found, str):
            told.append(found.rstrip("."))
        else:
            told.append(
                f"{found.name} (cuda:{i}, {found.isa}, {counted(found.cores, 'multiprocessor')})"
            )
    detail, remedy = f"{'; '.join(told)}; driver for CUDA {here.release}", ""
    if any(isinstance(found, str) for found in here.devices):
        remedy = "Eager mode serves what kernels cannot be built for."
    if not seen:
        detail, remedy = (
            f"{detail}; PyTorch {torch.__version__} uses none",
            "Install a PyTorch that is built for CUDA.",
        )
    return Finding("gpu", "warn" if remedy else "ok", detail, remedy)


def _cuda_compiler(release: str = "") -> Finding:
    """The compiler, and whether the driver, of a CUDA release, can load what it makes; without a
    GPU it is not needed.
    """
    if why := cuda.available():
        return Finding("CUDA compiler", "warn" if release else "ok", "none", why if release else "")
    name = cuda.identity()
    numbers = re.search(r"\d+", name)
    if release and numbers and int(numbers[0]) > int(release.partition(".")[0]):
        major = release.partition(".")[0]
        remedy = (
            f"Update the driver, or pip install nvidia-cuda-nvrtc-cu{major}"
            f" nvidia-cuda-runtime-cu{major} nvidia-cuda-cccl-cu{major}."
        )
        return Finding(
            "CUDA compiler",
            "warn",
            f"{name}, whose code a driver for CUDA {release} does not load",
            remedy,
        )
    return Finding("CUDA compiler", "ok", name)


def _writable(folder: Path) -> str:
    """Why files cannot be made in the folder, or the empty string."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as e:
        return e.strerror or str(e)


def _log() -> Finding:
    """Where new measurements are written."""
    return _folder("tuning log", paths.log_dir(), "LNTUNE_LOG_DIR")


def _folder(topic: str, folder: Path, variable: str) -> Finding:
    where = f"{folder}{f' ({variable})' if os.environ.get(variable) else ''}"
    if problem := _writable(folder):
        return Finding(
            topic, "fail", f"{where}: {problem}", f"Set {variable} to a writable folder."
        )
    return Finding(topic, "ok", where)


def _cache() -> Finding:
    """Where built kernels are kept."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", paths.CacheWarning)
        paths._warn_once.cache_clear()
        folder = paths.cached("kernels").parent
    if said:  # the temporary folder, and why
        return Finding(
            "kernel cache",
            "warn",
            str(said[0].message).partition(". ")[0],
            "Set LNTUNE_CACHE_DIR to a folder that lasts.",
        )
    return _folder("kernel cache", folder, "LNTUNE_CACHE_DIR")


def _built() -> Finding:
    """What was built so far, whether it is whole, and what that check costs at each load."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", paths.CacheWarning)
        folder = paths.cached("kernels").parent
    stored = (f"kernels/*/*.{native.FORMAT}.{backends.get(name).suffix}" for name in BACKENDS)
    files = [f for one in (*stored, f"runtime/*.{native.FORMAT}.so") for f in folder.glob(one)]
    damaged, times, size = [], [0.0], 0
    for file in files:
        begun = time.perf_counter()
        try:
            size += len(sealed.read(file).content)
        except (DamagedError, OSError):
            damaged.append(file.name)
        times.append(time.perf_counter() - begun)
    detail = (
        f"{counted(len(files), 'file')}, {size / 2**20:.1f} MiB, checked in"
        f" {1e3 * statistics.median(times):.2f} ms each"
    )
    if damaged:
        remedy = "They are put aside and built again when they are needed."
        return Finding(
            "built kernels",
            "warn",
            f"{detail}; {len(damaged)} damaged: {', '.join(damaged[:SHOWN])}",
            remedy,
        )
    return Finding("built kernels", "ok", detail)
