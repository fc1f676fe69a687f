"""The cache of GPU kernels: what is stored, found again, rebuilt, and what it needs to be loaded;
and which GPUs are here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from fake_gpu import FakeGpu
from grids import exhaustive

from lntune import schedule
from lntune.backends import cuda, device_of
from lntune.backends.cuda import driver, launcher, stored
from lntune.case import Case
from lntune.commands import doctor
from lntune.errors import BuildError, InputError, ToolchainError, UnknownNameError
from lntune.kernels import cache
from lntune.system import paths, toolchain
from lntune.system.sealed import DamagedWarning

CASE = Case("layer_norm", 96, "float32", 8, "weight")
SM90 = device_of("cuda:sm_90")
needs_compiler = pytest.mark.skipif(
    bool(cuda.available()), reason=f"no CUDA compiler: {cuda.available()}"
)


def plan(case: Case = CASE) -> tuple[Case, schedule.Schedule, Any]:
    """(case, schedule, default knobs)."""
    chosen = schedule.get("shared_row")
    return case, chosen, chosen.default(case.typical, SM90)


def works(kernel: Any) -> bool:
    """True when the kernel of CASE is right."""
    x, w, y = torch.randn(3, 96), torch.randn(96), torch.empty(3, 96)
    kernel(x, w, 1e-5, y)
    return torch.allclose(y, torch.nn.functional.layer_norm(x, (96,), w), atol=1e-5)


def files(folder: Path) -> list[Path]:
    """The GPU kernels in a cache."""
    return sorted(folder.rglob("*.gpu"))


# The cache.


def test_a_kernel_is_built_once(
    fake_gpu: FakeGpu, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was prepared, by this process or another, is only loaded; preparing needs no GPU."""
    device = launcher.device(0)
    fake_gpu.log()
    assert not cache.built(*plan(), device)
    path = cache.prepare(*plan(), device)
    assert fake_gpu.log() == []
    assert files(own_cache) == [path]
    assert cache.built(*plan(), device)
    monkeypatch.setattr(stored, "binary", None)
    assert cache.prepare(*plan(), device) == path
    assert works(cache.kernel(*plan(), device))


def test_what_a_kernel_depends_on_is_in_its_name(
    fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Architecture, architectures beside it, multiprocessors where sums have a row for each, and
    all that CPUs' do; not the compiler, which those who look for it may not have.
    """
    one = cache.path_of(*plan(), SM90)
    others = [
        cache.path_of(*plan(), device_of("cuda:sm_80")),
        cache.path_of(*plan(), SM90, ("sm_80",)),
        cache.path_of(*plan(), msgspec.structs.replace(SM90, cores=4)),
        cache.path_of(*plan(Case("layer_norm", 96, "float32", 8, "bias")), SM90),
        cache.path_of(*plan(Case("layer_norm", 96, "float16", 8, "weight")), SM90),
        cache.path_of(*plan(Case("layer_norm", 96, "float32", 512, "weight")), SM90),
    ]
    assert len({one, *others}) == 1 + len(others)
    # The name of a GPU is not among it: an H200 runs an H100's kernels.
    assert cache.path_of(*plan(), msgspec.structs.replace(SM90, name="Another")) == one
    monkeypatch.setattr(cuda, "stamp", lambda: "another compiler")
    assert cache.path_of(*plan(), SM90) == one


def without_tvm(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on there is no apache-tvm, and building fails the test."""
    real = toolchain.installed
    monkeypatch.setattr(
        toolchain,
        "installed",
        lambda name: toolchain.MISSING if name == "apache-tvm" else real(name),
    )
    monkeypatch.setattr(stored, "binary", None)


@pytest.mark.parametrize("compiler", ["", "fake", "another"])
@pytest.mark.parametrize("tvm", [True, False])
def test_what_was_built_elsewhere_serves(
    compiler: str, tvm: bool, fake_gpu: FakeGpu, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where TVM or a CUDA compiler is missing, a kernel is found and loaded whatever compiler made
    it.
    """
    if tvm and compiler == "another":
        pytest.skip("there it is built anew, see below")
    device = launcher.device(0)
    path = cache.prepare(*plan(), device)
    monkeypatch.setattr(cuda, "stamp", lambda: compiler)
    monkeypatch.setattr(cuda, "identity", lambda: compiler)
    if not tvm:
        without_tvm(monkeypatch)
    monkeypatch.setattr(stored, "binary", None)
    assert works(cache.kernel(*plan(), device))
    assert cache.built(*plan(), device)
    assert cache.prepare(*plan(), device) == path


def test_another_compiler_builds_anew(
    fake_gpu: FakeGpu, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all is there that it takes, a kernel of another CUDA compiler is built again, once; one
    of the same compiler in another place is not; and where building fails what is there serves.
    """
    device, real = launcher.device(0), stored.binary
    path = cache.prepare(*plan(), device)
    builds: list[int] = []

    def binary(*arguments: Any) -> Any:
        builds.append(1)
        return real(*arguments)

    monkeypatch.setattr(stored, "binary", binary)
    monkeypatch.setattr(cuda, "stamp", lambda: "the same, elsewhere")
    assert cache.built(*plan(), device)
    assert works(cache.kernel(*plan(), device))
    monkeypatch.setattr(cuda, "stamp", lambda: "another")
    monkeypatch.setattr(cuda, "identity", lambda: "another compiler")
    assert not cache.built(*plan(), device)
    assert builds == []
    for _ in range(2):
        assert works(cache.kernel(*plan(), device))
    assert builds == [1]
    assert stored.read(path).compiler == "another compiler"

    def failing(*_: Any) -> Any:
        builds.append(1)
        raise BuildError("no space left")

    monkeypatch.setattr(stored, "binary", failing)
    monkeypatch.setattr(cuda, "stamp", lambda: "a third")
    monkeypatch.setattr(cuda, "identity", lambda: "a third compiler")
    assert works(cache.kernel(*plan(), device))
    assert builds == [1, 1]


@pytest.mark.parametrize(
    "content", [b"", b"not a kernel", bytes(200), None], ids=["empty", "text", "zeros", "half"]
)
def test_damaged_files_are_built_again(
    fake_gpu: FakeGpu, own_cache: Path, content: bytes | None
) -> None:
    """A file that is damaged in any way is put aside, which is said, and replaced by a whole one;
    reading it says what it is.
    """
    device = launcher.device(0)
    path = cache.prepare(*plan(), device)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(BuildError, match=r"cannot load the kernel .*\.gpu is damaged"):
        stored.read(path)
    with pytest.warns(DamagedWarning, match=r"kept as .*\.gpu\.damaged"):
        assert works(cache.kernel(*plan(), device))
    assert path.read_bytes() == whole


def test_one_flipped_bit_is_damage(fake_gpu: FakeGpu, own_cache: Path) -> None:
    """Device code that was changed anywhere is not given to the driver."""
    path = cache.prepare(*plan(), SM90)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BuildError, match="damaged"):
        stored.read(path)
    with pytest.raises(BuildError, match="cannot load the kernel"):
        stored.read(own_cache / "missing.gpu")


def test_what_the_driver_refuses_is_not_built_again(
    fake_gpu: FakeGpu, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole file that the driver cannot load is told as that, and kept; and where no GPU can be
    used nothing is built for it.
    """
    device = launcher.device(0)
    path = cache.prepare(*plan(), device)
    monkeypatch.setattr(stored, "binary", None)
    fake_gpu.fail("cuLibraryLoadData", 222)
    with pytest.raises(
        BuildError, match=r"CUDA_ERROR_UNSUPPORTED_PTX_VERSION.*older than the compiler"
    ):
        cache.kernel(*plan(), device)
    assert path.is_file()
    fake_gpu.setup(count=0)
    path.unlink()
    with pytest.raises(ToolchainError, match="no GPU can be used here"):
        cache.kernel(*plan(), device)


LOAD = """
import sys, torch
from lntune import schedule
from lntune.kernels import cache
from lntune.case import Case
from lntune.backends.cuda import launcher
device = launcher.device(0)
case, found = Case("layer_norm", 96, "float32", 8, "weight"), schedule.get("shared_row")
kernel = cache.kernel(case, found, found.default(case.typical, device), device)
x, w, y = torch.randn(3, 96), torch.randn(96), torch.empty(3, 96)
kernel(x, w, 1e-5, y)
torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (96,), w))
print("tvm" in sys.modules)
"""


def test_loading_needs_nothing_of_tvm(fake_gpu: FakeGpu) -> None:
    """A fresh process loads a cached kernel and runs it without importing TVM."""
    cache.prepare(*plan(), launcher.device(0))
    path = os.pathsep.join([os.environ["PYTHONPATH"], str(paths.PACKAGE.parent)])
    done = subprocess.run(
        [sys.executable, "-c", LOAD],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_a_file_holds_several_architectures(fake_gpu: FakeGpu, own_cache: Path) -> None:
    """Device code for each, in the order of the architectures, PTX of the last; and every GPU among
    them runs its own.
    """
    path = cache.prepare(*plan(), SM90, ("sm_120", "sm_80"))
    binary = stored.read(path)
    assert list(binary.images) == ["sm_80", "sm_90", "sm_120"]
    assert binary.ptx
    assert works(launcher.load(binary))


def test_an_unknown_architecture_is_refused_before_anything_is_built(fake_gpu: FakeGpu) -> None:
    """The near miss is named."""
    with pytest.raises(UnknownNameError, match="sm_91"):
        cache.prepare(*plan(), SM90, ("sm_91",))


@needs_compiler
def test_device_code_is_embedded() -> None:
    """Built for a GPU that is not here, a kernel is machine code of each architecture and PTX, and
    says what it takes.
    """
    case = Case("layer_norm", 1000, "float16", 512, "weight+stats")
    binary = stored.read(cache.prepare(*plan(case), SM90, ("sm_80",)))
    assert all(image.startswith(b"\x7fELF") for image in binary.images.values())
    assert ".target sm_90" in binary.ptx
    assert [(a.name, a.role, a.dtype, a.shape) for a in binary.arguments] == [
        ("x", "in", "float16", ("rows", "1000")),
        ("weight", "in", "float16", ("1000",)),
        ("eps", "scalar", "float32", ()),
        ("y", "out", "float16", ("rows", "1000")),
        ("mean", "out", "float32", ("rows",)),
        ("rstd", "out", "float32", ("rows",)),
    ]
    assert [binary.alignment(a) for a in binary.arguments] == [16, 16, 1, 16, 4, 4]
    assert "nvcc" in binary.compiler or "nvrtc" in binary.compiler


@needs_compiler
@pytest.mark.parametrize("op", ["layer_norm", exhaustive("lnlstm_step_backward")])
def test_bfloat16_on_turing(op: str) -> None:
    """Where the hardware has no bfloat16, kernels of it are built all the same, also together with
    those for newer GPUs.
    """
    device, chosen = device_of("cuda:sm_75"), next(iter(schedule.for_op(op, "gpu").values()))
    case = Case(op, 64, "bfloat16", 8)
    binary = stored.read(
        cache.prepare(case, chosen, chosen.default(case, device), device, ("sm_90",))
    )
    assert [image[:4] for image in binary.images.values()] == [b"\x7fELF"] * 2


# Which GPUs are here.


def test_a_gpu_that_is_here(fake_gpu: FakeGpu) -> None:
    """By name and number it is a device with the driver's facts, found again by its fingerprint."""
    device = device_of("cuda")
    assert device == device_of("cuda:0") == launcher.device(0)
    assert (
        device.kind,
        device.name,
        device.isa,
        device.cores,
        device.shared_memory,
        device.l2,
    ) == (
        "gpu",
        "Imagined GPU",
        "sm_90",
        132,
        227 * 1024,
        50 << 20,
    )
    assert launcher.count() == 1
    assert launcher.missing() == ""
    assert launcher.ordinal_of(device) == 0
    assert launcher.ordinal_of(SM90) is None
    with pytest.raises(InputError, match="device: got cuda:1, expected cuda:0 to cuda:0"):
        device_of("cuda:1")


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((7, 5), "sm_75"),
        ((8, 0), "sm_80"),
        ((8, 7), "sm_86"),
        ((8, 9), "sm_89"),
        ((10, 3), "sm_100"),
        ((12, 1), "sm_120"),
    ],
)
def test_the_nearest_architecture(
    fake_gpu: FakeGpu, capability: tuple[int, int], arch: str
) -> None:
    """A GPU that is not in the table is built for as the nearest below it of its family."""
    fake_gpu.setup(capabilities=(capability,))
    assert launcher.device(0).isa == arch


@pytest.mark.parametrize(
    ("capability", "why"),
    [
        ((7, 0), "7.5 and newer"),
        ((13, 0), "Update lntune"),
        ((11, 0), "no architecture kernels are built for"),
    ],
)
def test_a_gpu_kernels_cannot_be_built_for(
    fake_gpu: FakeGpu, capability: tuple[int, int], why: str
) -> None:
    """One too old or of an unknown family is counted, and told with the reason; another beside it
    is used.
    """
    fake_gpu.setup(capabilities=(capability,))
    assert launcher.count() == 1
    assert why in launcher.missing()
    with pytest.raises(
        ToolchainError,
        match=(
            rf"Imagined GPU \(cuda:0\) is of compute capability {capability[0]}\.{capability[1]};"
            rf" .*{why}"
        ),
    ):
        launcher.device(0)
    fake_gpu.setup(2, capabilities=(capability, (9, 0)))
    assert launcher.missing() == ""
    assert launcher.device(1).isa == "sm_90"
    assert launcher.ordinal_of(launcher.device(1)) == 1


def absent(fake_gpu: FakeGpu, why: str) -> None:
    """Nothing can be used, and everybody says why."""
    assert launcher.count() == 0
    assert why in launcher.missing()
    with pytest.raises(ToolchainError, match=why):
        launcher.device(0)
    with pytest.raises(
        ToolchainError, match=rf"layer_norm 8x96 float32 weight \(shared_row\): .*{why}"
    ):
        cache.kernel(*plan(), SM90)


def test_an_old_driver(fake_gpu: FakeGpu) -> None:
    """Drivers before CUDA 12 are refused with both releases."""
    fake_gpu.setup(version=11080)
    absent(fake_gpu, "driver is for CUDA 11.8, expected 12.0 or newer")
    fake_gpu.setup(version=12000)
    assert launcher.count() == 1


def test_no_gpu(fake_gpu: FakeGpu) -> None:
    """A driver without a GPU says so in its own words."""
    fake_gpu.setup(count=0)
    absent(fake_gpu, "the NVIDIA driver does not start: CUDA_ERROR_NO_DEVICE")
    fake_gpu.setup()
    fake_gpu.fail("cuInit", 3)
    driver._opened.clear()
    absent(fake_gpu, "CUDA_ERROR_NOT_INITIALIZED")


def test_no_driver(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    """Without the driver's library, or with another in its place, the loader's words or what is
    missing in it.
    """
    launcher.use(tmp_path / "libcuda.so.1", driver.CPU)
    absent(fake_gpu, "no NVIDIA driver")
    launcher.use("libm.so.6", driver.CPU)
    absent(fake_gpu, "is no NVIDIA driver: it has no cuGetErrorName")


def test_the_doctor_knows_the_gpu(fake_gpu: FakeGpu) -> None:
    """It tells each GPU, the driver, and that this PyTorch does not use them; and why one cannot be
    used.
    """
    fake_gpu.setup(2, capabilities=((9, 0), (7, 0)))
    (gpu,) = [f for f in doctor.examine() if f.topic == "gpu"]
    assert (
        "Imagined GPU (cuda:0, sm_90, 132 multiprocessors); Imagined GPU (cuda:1) is of compute"
        " capability 7.0" in gpu.detail
    )
    assert "driver for CUDA 13.0" in gpu.detail
    assert gpu.status == "warn"
    assert gpu.remedy
    fake_gpu.setup(version=11040)
    (gpu,) = [f for f in doctor.examine() if f.topic == "gpu"]
    assert "CUDA 11.4" in gpu.detail


def test_the_doctor_knows_the_compiler(fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU it warns of no CUDA compiler, or one too new for the driver, and says what to
    install; without there is nothing to warn of.
    """
    monkeypatch.setattr(
        cuda, "available", lambda: "no CUDA compiler found; pip install 'lntune[cuda]'"
    )
    (finding,) = [f for f in doctor.examine() if f.topic == "CUDA compiler"]
    assert (finding.status, finding.detail) == ("warn", "none")
    assert "lntune[cuda]" in finding.remedy
    monkeypatch.setattr(cuda, "available", lambda: "")
    for name, status in (
        ("nvcc 13.0.88 -O3", "ok"),
        ("nvrtc 13.5 -O3", "ok"),
        ("nvcc 12.9.1", "ok"),
        ("nvcc 14.0.1", "warn"),
    ):
        monkeypatch.setattr(cuda, "identity", lambda name=name: name)
        (finding,) = [f for f in doctor.examine() if f.topic == "CUDA compiler"]
        assert (finding.status, "nvidia-cuda-nvrtc-cu13" in finding.remedy) == (
            status,
            status == "warn",
        )
    monkeypatch.setattr(cuda, "available", lambda: "no CUDA compiler found")
    fake_gpu.setup(count=0)
    (finding,) = [f for f in doctor.examine() if f.topic == "CUDA compiler"]
    assert (finding.status, finding.remedy) == ("ok", "")
