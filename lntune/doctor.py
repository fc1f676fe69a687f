"""Is everything there that lntune needs, and what is known of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

from lntune import device, paths, records, schedule, toolchain
from lntune.errors import LntuneError


class Finding(msgspec.Struct, frozen=True):
    """One thing looked at. `status` is "ok", "warn" (works, with less) or "fail" (something will not work)."""

    topic: str
    status: str
    detail: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Everything worth knowing, the failures among it."""
    return [*_versions(), _compiler(), *_cpu(), *_threads(), *_gpu(), *_folders(), *_content()]


def _versions() -> list[Finding]:
    found = [Finding("python", "ok" if sys.version_info >= (3, 10) else "fail", sys.version.split()[0], "Python 3.10 or newer")]
    found += [Finding(name, "ok", version) for name, version in toolchain.versions().items() if name not in ("python",)]
    found += [Finding("compatibility", "fail", problem) for problem in toolchain.incompatible()]
    return found


def _compiler() -> Finding:
    try:
        path = toolchain.compiler()
        version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
        return Finding("C++ compiler", "ok", f"{path} ({version})")
    except LntuneError as e:
        return Finding("C++ compiler", "fail", "none", str(e))
    except (OSError, subprocess.SubprocessError, IndexError) as e:
        return Finding("C++ compiler", "fail", f"does not run: {e}", "Install g++ or clang, or set CXX.")


def _cpu() -> list[Finding]:
    cpu = device.current()
    sizes = ", ".join(f"L{level} {size // 1024} KiB" for level, size in ((1, cpu.l1), (2, cpu.l2), (3, cpu.l3)) if size)
    level = Finding("cpu", "ok", f"{cpu.name}, {cpu.cores} cores, {cpu.isa} ({8 * cpu.vector_bytes}-bit vectors){', ' + sizes if sizes else ''}")
    if cpu.isa in ("x86-64", "x86-64-v2"):
        level = msgspec.structs.replace(level, status="warn", remedy="No AVX2: kernels use 128-bit vectors.")
    return [level, Finding("log folder name", "ok", cpu.slug)]


def _threads() -> list[Finding]:
    try:
        import torch

        from lntune import runtime

        threads, pool = torch.get_num_threads(), runtime.has_pool()
    except (ImportError, OSError, LntuneError) as e:
        return [Finding("threads", "fail", str(e), "Kernels cannot be run without PyTorch and the runtime.")]
    state = "on PyTorch's OpenMP pool" if pool else "no OpenMP pool found"
    remedy = "" if pool else "Kernels run on one thread: this PyTorch does not use libgomp."
    return [Finding("threads", "ok" if pool else "warn", f"{threads} {state}", remedy)]


def _gpu() -> list[Finding]:
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return [Finding("gpu", "ok", f"{names} (no schedules for GPUs yet: eager mode serves them)")]
    nvcc = shutil.which("nvcc")
    return [Finding("gpu", "ok", "none" + (f"; CUDA compiler at {nvcc}" if nvcc else ""))]


def _writable(folder: Path) -> str:
    """Why files cannot be made in the folder, or the empty string."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as e:
        return e.strerror or str(e)


def _folders() -> list[Finding]:
    found = []
    for topic, folder, variable in (("tuning log", paths.log_dir(), "LNTUNE_LOG_DIR"), ("kernel cache", paths.cache_dir(), "LNTUNE_CACHE_DIR")):
        problem = _writable(folder)
        where = f"{folder}{' (' + variable + ')' if os.environ.get(variable) else ''}"
        found.append(Finding(topic, "fail" if problem else "ok", where + (f": {problem}" if problem else ""), f"Set {variable} to a writable folder." if problem else ""))
    return found


def _content() -> list[Finding]:
    found = []
    try:
        names = sorted(schedule.all_schedules())
        found.append(Finding("schedules", "ok" if names else "fail", ", ".join(names) or f"none in {[str(d) for d in paths.schedule_dirs()]}"))
    except LntuneError as e:
        found.append(Finding("schedules", "fail", str(e)))
    mine = records.finals(records.read(paths.log_dirs(), device=device.current()))
    if not mine:
        return [*found, Finding("tuned cases", "warn", "none on this device", "Run: lntune tune layer_norm")]
    hidden = sorted({key[1] for key in mine})
    return [*found, Finding("tuned cases", "ok", f"{len(mine)} on this device, hidden {', '.join(map(str, hidden))}")]
