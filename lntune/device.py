"""What the kernels run on: the fingerprint a record carries, and the facts schedules ask for."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec

from lntune import bounds

# The x86-64 microarchitecture levels, by the flags Linux shows. The CPU's marketing name is not
# used: a virtual machine often hides features that the named CPU has, and code built for the name
# then dies of an illegal instruction. For the same reason a level counts only when those below it
# are complete. ("abm" is lzcnt, which without the flag silently runs as bsr.)
_X86_LEVELS: tuple[tuple[str, frozenset[str]], ...] = (
    ("x86-64-v4", frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})),
    (
        "x86-64-v3",
        frozenset({"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"}),
    ),
    ("x86-64-v2", frozenset({"cx16", "lahf_lm", "pni", "popcnt", "sse4_1", "sse4_2", "ssse3"})),
)
_VECTOR_BYTES = {
    "x86-64-v4": 64,
    "x86-64-v3": 32,
    "x86-64-v2": 16,
    "x86-64": 16,
    "aarch64": 16,
    "arm64": 16,
}
# Single features beyond a level that LLVM makes good use of here: (flag in /proc/cpuinfo, LLVM
# attribute).
_EXTRAS = (("avx512_bf16", "avx512bf16"), ("avx512_fp16", "avx512fp16"))


Kind: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^(cpu|gpu)\Z")]
"""Whose schedules a device takes."""


class Device(msgspec.Struct, frozen=True):
    """A CPU or GPU as a target and as a fingerprint.

    `kind` is "cpu" or "gpu" and says whose schedules it takes; `name`, `model` and `cores` tell two
    machines apart in the log; `isa` and `features` decide what code may be built; `l1`, `l2`, `l3`
    are cache sizes in bytes (0: not known), a CPU's `l1` and `l2` those of a core. `model` is what
    a CPU says of its silicon, since many generations share a name in virtual machines:
    "AuthenticAMD family 25 model 17 stepping 1" on x86, "implementer 0x41 part 0xd0c variant 0x3"
    on Arm; empty where nothing is known, and for a GPU, whose name is its own.

    Of a GPU, `isa` is the architecture ("sm_90"), `cores` are the `multiprocessors`, `l2` is the
    cache of all and `shared_memory` what a block may have of a multiprocessor's, in bytes.
    `backend` is the folder of lntune/backends/ that runs it, where that is not its kind's own.
    """

    kind: Kind
    name: bounds.Name
    isa: bounds.Name
    cores: bounds.Cores
    features: Annotated[tuple[bounds.Name, ...], bounds.FEW] = ()
    l1: bounds.Count = 0
    l2: bounds.Count = 0
    l3: bounds.Count = 0
    model: bounds.Name = ""
    shared_memory: bounds.Count = 0
    backend: bounds.Name = ""

    @property
    def multiprocessors(self) -> int:
        """A GPU's cores, as its makers call them."""
        return self.cores

    @property
    def vector_bytes(self) -> int:
        """Width of a vector register in bytes."""
        return _VECTOR_BYTES.get(self.isa, 16)

    @property
    def vector_registers(self) -> int:
        """Vector registers of a core that code may name."""
        return 32 if self.isa in ("x86-64-v4", "aarch64", "arm64") else 16

    @property
    def slug(self) -> str:
        """Folder name of this device's logs: "amd-epyc-f25m17s1-x86-64-v4-2c"."""
        words = re.sub(r"\((?:r|tm|c)\)|\bcpu\b|@.*", " ", self.name.lower())
        model = "".join(
            name[0] + number
            for name, number in re.findall(r"([a-z]+) (0x[0-9a-f]+|[0-9]+)\b", self.model)
        )
        return re.sub(r"[^a-z0-9]+", "-", f"{words} {model} {self.isa} {self.cores}c").strip("-")

    @property
    def folders(self) -> tuple[str, ...]:
        """Folder names under which logs of this device may lie: its own, and that of records
        written before they named the model.
        """
        return tuple(dict.fromkeys((self.slug, msgspec.structs.replace(self, model="").slug)))

    def differences(self, other: Device) -> list[str]:
        """What keeps a record of `other` from serving this device, field by field; empty when it
        may.

        Two CPUs of which one does not say its model (an old record) are distinguished by the caches
        of a core, where both know them: these differ from generation to generation. What may
        differ: the last cache, of which virtual machines get any share, and for GPUs all caches,
        which their name decides.
        """
        fields = ["kind", "backend", "name", "isa", "cores", "features"]
        if self.model and other.model:
            fields.append("model")
        elif self.kind == "cpu":
            fields += [f for f in ("l1", "l2") if getattr(self, f) and getattr(other, f)]
        return [
            f"{f}: {getattr(other, f)!r} there, {getattr(self, f)!r} here"
            for f in fields
            if getattr(self, f) != getattr(other, f)
        ]


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _sysctl(name: str) -> str:
    """One macOS sysctl value, or the empty string."""
    try:
        return subprocess.run(
            ["sysctl", "-n", name],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=5,
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _cache_bytes() -> tuple[int, int, int]:
    """(l1 data, l2, l3) of the first core in bytes, 0 where the system does not say."""
    sizes = {1: 0, 2: 0, 3: 0}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            kind, level = (index / "type").read_text().strip(), int((index / "level").read_text())
            size = (index / "size").read_text().strip()
        except (OSError, ValueError):
            continue
        if kind != "Instruction" and size.endswith("K"):
            sizes[level] = int(size[:-1]) * 1024
    return sizes[1], sizes[2], sizes[3]


def usable_cores() -> int:
    """Cores this process may use: those it may run on, and no more than the CPU time that its
    control group may have.
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, math.ceil(min(cores, _quota(Path("/")))))


def _quota(root: Path) -> float:
    """CPU time per second that control groups leave to this process, the least of its own group and
    those above it; infinite without a limit. A container has no other way to know its
    limit: it sees all cores of its host.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return math.inf
    limits = [math.inf]
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = [
            root / "sys/fs/cgroup" / name
            for name in (["cpu", "cpu,cpuacct"] if controllers else ["", "unified"])
        ]
        for mount in mounts:
            group = mount / path.strip("/")
            for folder in (group, *(p for p in group.parents if p.is_relative_to(mount))):
                limits.append(_limit(folder))
    return min(limits)


def _limit(group: Path) -> float:
    """CPU time per second that one control group may use, of version 2 or 1; infinite where it has
    no limit.
    """
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = " ".join((group / name).read_text() for name in names).split()
            if quota not in ("max", "-1"):
                return int(quota) / int(period)
    return math.inf


def _x86_level(flags: frozenset[str]) -> str:
    """The highest x86-64 level that is complete, itself and all below it."""
    isa = "x86-64"
    for level, needs in reversed(_X86_LEVELS):
        if not needs <= flags:
            break
        isa = level
    return isa


def needed_flags(device: Device) -> list[str]:
    """What Linux has to show among the flags of an x86-64 CPU that runs code for a device."""
    levels = [level for level, _ in _X86_LEVELS]
    own = _X86_LEVELS[levels.index(device.isa) :] if device.isa in levels else ()
    extras = {flag for flag, llvm in _EXTRAS if llvm in device.features}
    return sorted(extras.union(*(needs for _, needs in own)))


def _arm_name(info: dict[str, str]) -> str:
    """A name for an Arm CPU, of which Linux has only the numbers of designer and core; better than
    one name for all of them.
    """
    implementer, part = info.get("CPU implementer"), info.get("CPU part")
    return f"arm {implementer} {part}" if implementer and part else ""


def _numbers(pairs: dict[str, str]) -> str:
    """The facts that have a number, as text: "family 25 model 17"."""
    return " ".join(
        f"{name} {number.lower()}"
        for name, number in pairs.items()
        if re.fullmatch(r"0x[0-9a-fA-F]+|[0-9]+", number)
    )


def _model(info: dict[str, str]) -> str:
    """What /proc/cpuinfo, or on a Mac with an Intel CPU sysctl, says of the silicon; see
    Device.model.
    """
    if "CPU implementer" in info:
        return _numbers(
            {name: info.get(f"CPU {name}", "") for name in ("implementer", "part", "variant")}
        )
    names = {"family": "cpu family", "model": "model", "stepping": "stepping"}
    numbers = _numbers(
        {
            name: info.get(entry, "") if info else _sysctl(f"machdep.cpu.{name}")
            for name, entry in names.items()
        }
    )
    return (
        f"{info.get('vendor_id', '') if info else _sysctl('machdep.cpu.vendor')} {numbers}".strip()
        if numbers
        else ""
    )


@functools.cache
def vendor() -> str:
    """Who made this machine's x86 CPU, as it says of itself ("GenuineIntel", "AuthenticAMD"); empty
    where that is not known.
    """
    return _cpuinfo().get("vendor_id", "")


@functools.cache
def current() -> Device:
    """The CPU of this machine."""
    info = _cpuinfo()
    machine = platform.machine().lower()
    flags = frozenset(info.get("flags", "").split())
    if machine in ("x86_64", "amd64"):
        isa = _x86_level(flags)
        features = (
            tuple(llvm for flag, llvm in _EXTRAS if flag in flags) if isa == "x86-64-v4" else ()
        )
    else:
        isa, features = machine, ()
    name = (
        info.get("model name")
        or _arm_name(info)
        or _sysctl("machdep.cpu.brand_string")
        or platform.processor()
        or machine
    )
    l1, l2, l3 = _cache_bytes()
    return Device(
        "cpu", " ".join(name.split()), isa, usable_cores(), features, l1, l2, l3, _model(info)
    )
