"""Devices: told apart where it matters, and turned into targets their code runs on."""

from __future__ import annotations

import math
import os
import platform
import string
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lntune import device
from lntune.backends.cpu import llvm
from lntune.device import Device

V1 = "fpu vme cx8 sse sse2 syscall nx lm"
V2 = f"{V1} cx16 lahf_lm pni popcnt sse4_1 sse4_2 ssse3"
V3 = f"{V2} abm avx avx2 bmi1 bmi2 f16c fma movbe xsave"
V4 = f"{V3} avx512f avx512bw avx512cd avx512dq avx512vl"
BASE = Device(
    "cpu", "Intel(R) Xeon(R) Processor", "x86-64-v4", 8, ("avx512bf16",), 32768, 2097152, 0
)
NAMED = msgspec.structs.replace(BASE, model="GenuineIntel family 6 model 143 stepping 8")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`machine(architecture, **cpuinfo)` is the device current() finds on such a machine."""

    def make(architecture: str, **cpuinfo: str) -> Device:
        monkeypatch.setattr(platform, "machine", lambda: architecture)
        monkeypatch.setattr(platform, "processor", lambda: "")
        monkeypatch.setattr(
            device,
            "_cpuinfo",
            lambda: {
                key if key == "vendor_id" else key.replace("_", " "): value
                for key, value in cpuinfo.items()
            },
        )
        monkeypatch.setattr(device, "_sysctl", lambda _: "")
        device.current.cache_clear()
        return device.current()

    yield make
    device.current.cache_clear()


@pytest.mark.parametrize(
    ("flags", "isa", "vector"),
    [
        (V1, "x86-64", 16),
        (V2, "x86-64-v2", 16),
        (V3, "x86-64-v3", 32),
        (V4, "x86-64-v4", 64),
        ("", "x86-64", 16),
    ],
)
def test_x86_level_from_the_flags(machine: Any, flags: str, isa: str, vector: int) -> None:
    """The instruction set is the highest level whose flags are all there; it sets the vector width
    and LLVM's CPU.
    """
    cpu = machine("x86_64", flags=flags, model_name="Some   CPU @ 2.00GHz")
    assert (cpu.kind, cpu.name, cpu.isa, cpu.vector_bytes) == (
        "cpu",
        "Some CPU @ 2.00GHz",
        isa,
        vector,
    )
    assert llvm.target(cpu)["mcpu"] == isa


@pytest.mark.parametrize("missing", sorted(set(V4.split()) - set(V1.split())))
def test_one_missing_flag_lowers_the_level(machine: Any, missing: str) -> None:
    """A virtual machine that hides any one feature gets code for a level without that feature."""
    cpu = machine("x86_64", flags=" ".join(f for f in V4.split() if f != missing))
    levels = {"x86-64": V1, "x86-64-v2": V2, "x86-64-v3": V3, "x86-64-v4": V4}
    assert missing not in levels[cpu.isa].split()
    assert cpu.isa == max(level for level, flags in levels.items() if missing not in flags.split())


@pytest.mark.parametrize(
    ("flags", "features"),
    [
        (V4, ()),
        (f"{V4} avx512_bf16", ("avx512bf16",)),
        (f"{V4} avx512_fp16 avx512_bf16 amx_tile", ("avx512bf16", "avx512fp16")),
        (f"{V3} avx512_bf16", ()),
    ],
)
def test_extras_come_on_top_of_v4(machine: Any, flags: str, features: tuple[str, ...]) -> None:
    """bfloat16 and float16 instructions are named to LLVM where the CPU has them beside all of v4,
    in a fixed order.
    """
    cpu = machine("AMD64", flags=flags)
    assert cpu.features == features
    mattr = llvm.target(cpu)["mattr"]
    assert isinstance(mattr, list)
    assert [a for a in mattr if a.startswith("+")] == [f"+{f}" for f in features]
    assert "-prefer-256-bit" in mattr


def test_arm_on_linux(machine: Any) -> None:
    """An Arm machine has no model name in /proc/cpuinfo: two different cores still differ, and the
    target is its own.
    """
    one = machine("aarch64", CPU_implementer="0x41", CPU_part="0xd0c", Features="fp asimd")
    other = machine("aarch64", CPU_implementer="0x41", CPU_part="0xd4f", Features="fp asimd")
    assert (one.isa, one.vector_bytes, one.features) == ("aarch64", 16, ())
    assert one.slug != other.slug
    assert one.differences(other)[0] == f"name: {other.name!r} there, {one.name!r} here"
    assert llvm.target(one) == {
        "kind": "llvm",
        "num-cores": one.cores,
        "mtriple": "aarch64-linux-gnu",
        "mattr": ["+neon"],
    }


def test_the_model_distinguishes_generations_of_one_name(machine: Any) -> None:
    """Family, model and stepping on x86, designer, part and variant on Arm, are in the fingerprint
    and in the folder's name; what a machine does not tell is left out.
    """
    zen4 = machine(
        "x86_64",
        flags=V4,
        model_name="AMD EPYC",
        vendor_id="AuthenticAMD",
        cpu_family="25",
        model="17",
        stepping="1",
    )
    zen5 = machine(
        "x86_64",
        flags=V4,
        model_name="AMD EPYC",
        vendor_id="AuthenticAMD",
        cpu_family="26",
        model="2",
        stepping="1",
    )
    assert zen4.model == "AuthenticAMD family 25 model 17 stepping 1"
    assert (zen4.slug, zen5.slug) == tuple(
        f"amd-epyc-{m}-x86-64-v4-{zen4.cores}c" for m in ("f25m17s1", "f26m2s1")
    )
    assert zen4.differences(zen5) == [f"model: {zen5.model!r} there, {zen4.model!r} here"]
    assert zen4.folders == (zen4.slug, f"amd-epyc-x86-64-v4-{zen4.cores}c")
    arm = machine(
        "aarch64", CPU_implementer="0x41", CPU_part="0xd0c", CPU_variant="0x3", CPU_revision="1"
    )
    assert arm.model == "implementer 0x41 part 0xd0c variant 0x3"
    assert arm.slug == f"arm-0x41-0xd0c-i0x41p0xd0cv0x3-aarch64-{arm.cores}c"
    assert (
        machine(
            "x86_64",
            flags=V4,
            vendor_id="GenuineIntel",
            cpu_family="6",
            model="143",
            stepping="unknown",
        ).model
        == "GenuineIntel family 6 model 143"
    )
    nothing = machine("riscv64", isa="rv64gc")
    assert (nothing.model, nothing.folders) == ("", (nothing.slug,))


def test_the_model_on_an_intel_mac(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without /proc/cpuinfo sysctl tells it."""
    machine("x86_64")
    answers = {
        "machdep.cpu.vendor": "GenuineIntel",
        "machdep.cpu.family": "6",
        "machdep.cpu.model": "158",
        "machdep.cpu.stepping": "10",
    }
    monkeypatch.setattr(device, "_sysctl", lambda name: answers.get(name, ""))
    device.current.cache_clear()
    assert device.current().model == "GenuineIntel family 6 model 158 stepping 10"


@pytest.mark.parametrize(
    ("l1", "l2", "fields"),
    [(32768, 2097152, []), (49152, 2097152, ["l1"]), (0, 1048576, ["l2"]), (0, 0, [])],
)
def test_a_record_without_a_model_is_compared_by_caches(
    l1: int, l2: int, fields: list[str]
) -> None:
    """What was written before records named the model serves where the caches of a core are the
    same, as far as both are known.
    """
    old = msgspec.structs.replace(BASE, l1=l1, l2=l2, l3=7)
    for a, b in ((NAMED, old), (old, NAMED)):
        assert [d.partition(":")[0] for d in a.differences(b)] == fields


def test_a_gpu_is_known_by_its_name() -> None:
    """Caches of GPUs are not compared: data sheets and drivers count them differently."""
    gpu = Device("gpu", "NVIDIA H200", "sm_90", 132, l2=50 << 20, shared_memory=232448)
    assert gpu.differences(msgspec.structs.replace(gpu, shared_memory=1, l2=60 << 20)) == []


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000",
                "sys/fs/cgroup/a/cpu.max": "150000 100000",
            },
            1.5,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, math.inf),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/x\n0::/\n",
                **{
                    f"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_{n}_us": v
                    for n, v in (("quota", "400000"), ("period", "100000"))
                },
            },
            4.0,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/\n",
                **{
                    f"sys/fs/cgroup/cpu/cpu.cfs_{n}_us": v
                    for n, v in (("quota", "-1"), ("period", "100000"))
                },
            },
            math.inf,
        ),
        ({"proc/self/cgroup": "2:memory:/m\n", "sys/fs/cgroup/cpu.max": "10000 100000"}, math.inf),
        ({}, math.inf),
    ],
)
def test_a_control_groups_limit(tmp_path: Path, files: dict[str, str], quota: float) -> None:
    """The CPU time a container may use is the least that its group and those above it allow, in
    either version of control groups.
    """
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert device._quota(tmp_path) == quota


def test_cores_within_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that may use one and a half cores of many has two; one without a limit has all it
    may run on.
    """
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    for quota, cores in ((1.5, 2), (0.1, 1), (math.inf, 64), (100.0, 64)):
        monkeypatch.setattr(device, "_quota", lambda _, quota=quota: quota)
        assert device.usable_cores() == cores


def test_arm_on_macos(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS the name comes from sysctl, and the triple is Apple's."""
    machine("arm64")
    monkeypatch.setattr(
        device, "_sysctl", lambda name: "Apple M2" if name == "machdep.cpu.brand_string" else ""
    )
    device.current.cache_clear()
    cpu = device.current()
    assert (cpu.name, cpu.isa) == ("Apple M2", "arm64")
    assert llvm.target(cpu)["mtriple"] == "arm64-apple-macosx"


def test_an_unheard_of_machine(machine: Any) -> None:
    """An architecture nobody thought of is a device all the same, with LLVM's own choices for its
    target.
    """
    cpu = machine("riscv64")
    assert (cpu.name, cpu.isa, cpu.vector_bytes) == ("riscv64", "riscv64", 16)
    assert llvm.target(cpu) == {"kind": "llvm", "num-cores": cpu.cores}


@pytest.mark.parametrize(
    "failure", [FileNotFoundError("sysctl"), subprocess.TimeoutExpired("sysctl", 5)]
)
def test_sysctl_may_fail(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    """A sysctl that is not there, or hangs, is no answer and no error."""

    def fail(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(subprocess, "run", fail)
    assert device._sysctl("machdep.cpu.brand_string") == ""


def test_this_machine() -> None:
    """The device of the machine the tests run on has a name, as many cores as the process may use,
    and one fingerprint.
    """
    device.current.cache_clear()
    here = device.current()
    assert here.name
    assert here.cores == device.usable_cores() >= 1
    device.current.cache_clear()
    assert device.current() == here


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or device.usable_cores() < 2,
    reason="needs two cores and Linux",
)
def test_cores_are_those_the_process_may_use() -> None:
    """A process bound to one core has one core, however many the machine has."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert device.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize("isa", ["x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4", "aarch64"])
def test_tvm_takes_the_target(isa: str) -> None:
    """TVM accepts the target of every instruction set and knows its number of cores."""
    tvm = pytest.importorskip("tvm")
    target = tvm.target.Target(llvm.target(msgspec.structs.replace(BASE, isa=isa, features=())))
    assert target.kind.name == "llvm"
    assert int(target.attrs["num-cores"]) == 8


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("Intel(R) Xeon(R) Processor", "intel-xeon-processor-x86-64-v4-8c"),
        ("Intel(R) Core(TM) i7-8700K CPU @ 3.70GHz", "intel-core-i7-8700k-x86-64-v4-8c"),
        ("AMD EPYC 9654 96-Core Processor", "amd-epyc-9654-96-core-processor-x86-64-v4-8c"),
        ("", "x86-64-v4-8c"),
    ],
)
def test_slugs_stay_as_they_are(name: str, slug: str) -> None:
    """The folder names of logs in use must not change: trade marks and clock rates are left out,
    words joined by dashes. Records of before they named the model keep the name of their folder.
    """
    assert msgspec.structs.replace(NAMED, name=name).slug == slug.replace(
        "x86-64-v4", "f6m143s8-x86-64-v4"
    )
    assert msgspec.structs.replace(BASE, name=name).slug == slug


@given(name=st.text(max_size=80), cores=st.integers(1, 1024))
def test_a_slug_is_a_folder_name(name: str, cores: int) -> None:
    """Whatever a machine calls its CPU, the slug is a lower-case word safe on any file system, and
    says the cores.
    """
    slug = Device("cpu", name, "x86-64-v3", cores).slug
    assert set(slug) <= set(string.ascii_lowercase + string.digits + "-")
    assert not slug.startswith("-")
    assert slug.endswith(f"x86-64-v3-{cores}c")
    assert slug == Device("cpu", name, "x86-64-v3", cores).slug


@pytest.mark.parametrize(
    ("field", "value"),
    [("kind", "gpu"), ("name", "Another"), ("isa", "x86-64-v3"), ("cores", 4), ("features", ())],
)
def test_a_difference_is_named(field: str, value: Any) -> None:
    """A device that differs in what decides speed or code may not use the other's records, and the
    reason names the field.
    """
    other = msgspec.structs.replace(BASE, **{field: value})
    assert BASE.differences(other) == [f"{field}: {value!r} there, {getattr(BASE, field)!r} here"]


def test_the_same_device() -> None:
    """A device serves itself, also when the system tells its cache sizes differently (containers
    often hide them).
    """
    assert BASE.differences(BASE) == []
    assert BASE.differences(msgspec.structs.replace(BASE, l1=0, l2=0, l3=1)) == []


def test_several_differences() -> None:
    """All differences are told, not just the first."""
    other = msgspec.structs.replace(BASE, cores=2, isa="x86-64-v2")
    assert [d.partition(":")[0] for d in BASE.differences(other)] == ["isa", "cores"]


def test_a_device_survives_the_log() -> None:
    """A device written as JSON and read back is equal, so that its records are recognized."""
    assert msgspec.json.decode(msgspec.json.encode(BASE), type=Device) == BASE
