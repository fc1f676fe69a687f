"""What a machine is, in the words of its own programs."""

from __future__ import annotations

import sys

from lntune.backends.cuda import locate
from lntune.commands.gpu_pass.run import Step, Work

_NAMES = (
    "torch triton apache-tvm apache-tvm-ffi liger-kernel pytest hypothesis numpy msgspec typer rich"
)
PACKAGES = f"""
import importlib.metadata as metadata, platform, sys
print(sys.version, platform.platform())
for name in {_NAMES.split()!r}:
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, None)
import torch
print("torch.cuda", torch.version.cuda, torch.cuda.is_available())
print(*map(torch.cuda.get_device_properties, range(torch.cuda.device_count())), sep="\\n")
"""
DOCTOR = """
import msgspec
from lntune.commands.doctor import content, folders, gpu, packages
from lntune.commands.doctor.finding import looked

found = [*packages.examine(), *gpu.examine(), *folders.examine()]
found += looked("schedules", content.examine)
print(msgspec.json.format(msgspec.json.encode(found), indent=1).decode())
"""
"""Without what the doctor says of the CPU, for which it compiles."""


def step() -> Step:
    """nvidia-smi and versions; programs that are not there are left out."""
    programs = {
        "nvidia-smi": (("nvidia-smi",), ()),
        "clocks": (("nvidia-smi",), ("-q", "-d", "CLOCK,PERFORMANCE,POWER,ECC,MEMORY")),
        "nvcc": (("nvcc",), ("--version",)),
        "ncu": (("ncu",), ("--version",)),
        "compute-sanitizer": (("compute-sanitizer",), ("--version",)),
    }
    works = [
        Work(key, 10, words=(path, *options))
        for key, ((name,), options) in programs.items()
        if (path := locate.program(name))
    ]
    works.append(Work("packages", 30, words=(sys.executable, "-c", PACKAGES)))
    return Step("facts", 30, tuple(works))


def doctor() -> Step:
    """What `lntune doctor` finds, as JSON."""
    return Step("doctor", 30, (Work("doctor", 60, words=(sys.executable, "-c", DOCTOR)),))
