"""`lntune build`: kernels put into the cache before they are needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from fake_gpu import SITE, FakeGpu
from grids import exhaustive
from torch.nn import functional
from typer.testing import CliRunner
from without_tvm import NO_METADATA, NO_TVM, child

import lntune
from lntune import device
from lntune.backends.cuda import launcher, stored
from lntune.case import Case
from lntune.cli import app
from lntune.commands import build as prebuild
from lntune.errors import BuildError
from lntune.kernels import cache, compiler
from lntune.log.select import Choice
from lntune.system import native, sealed, toolchain
from lntune.torch import dispatch

CASE = Case("layer_norm", 40, "float32", 8)


@pytest.fixture(autouse=True)
def nothing_built(own_cache: Path) -> Iterator[None]:
    """No kernel is there, and none is remembered."""
    dispatch.reload()
    yield
    dispatch.reload()


def run(*arguments: str) -> Any:
    """`lntune build` of CASE."""
    return CliRunner().invoke(
        app, ["build", "layer_norm", "--hidden", "40", "--dtype", "float32", *arguments]
    )


def test_what_serves_cases_is_listed_once() -> None:
    """Rows of one bucket share a kernel, training has another than inference, and a variant that is
    asked for stands alone.
    """
    many = [msgspec.structs.replace(CASE, rows=rows) for rows in (2, 8, 15, 16)]
    listed = prebuild.kernels(many)
    assert [(c.rows, c.variant) for c in listed] == [
        (rows, v) for rows in (8, 32) for v in ("weight+bias", "weight+bias+stats")
    ]
    assert [
        c.variant for c in prebuild.kernels([msgspec.structs.replace(CASE, variant="plain")])
    ] == ["plain"]


def test_a_machine_without_compilers_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was built serves calls, forward and for training, contiguous and strided, where nothing
    can be built any more.
    """
    assert run("--rows", "8").exit_code == run("--rows", "8", "--strided").exit_code == 0
    monkeypatch.setattr(compiler, "to_file", lambda *_: pytest.fail("built"))
    monkeypatch.setattr(toolchain, "run_compiler", lambda *_: pytest.fail("compiled"))
    dispatch.reload()
    x, w = torch.randn(5, 40), torch.ones(40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*is not tuned.*")
        for given in (x, torch.cat([x, x], 1)[:, :40]):
            torch.testing.assert_close(
                lntune.layer_norm(given, (40,), w, w), functional.layer_norm(given, (40,), w, w)
            )
            leaf = given.detach().requires_grad_()
            assert lntune.layer_norm(leaf, (40,), w, w).grad_fn is not None


SERVED = """
import importlib.metadata, shutil, warnings
import torch, lntune
from torch.nn import functional
from lntune.backends import cuda
from lntune.backends.cpu import runtime
from lntune.system import toolchain
from lntune.torch import dispatch, layer_norm as module
for missing in (
    lambda: __import__("tvm"), lambda: importlib.metadata.version("apache-tvm"), toolchain.command
):
    try:
        missing()
    except (ImportError, lntune.LntuneError):
        pass
    else:
        raise SystemExit("TVM or a compiler is there")
assert toolchain.installed("apache-tvm") == "not installed"
warnings.filterwarnings("error", ".*no kernel.*")
x, w = torch.randn(5, 40), torch.ones(40)
for given in (x, torch.cat([x, x], 1)[:, :40]):
    eager = functional.layer_norm(given, (40,), w, w)
    torch.testing.assert_close(lntune.layer_norm(given, (40,), w, w), eager)
    leaf = given.detach().requires_grad_()
    torch.testing.assert_close(lntune.layer_norm(leaf, (40,), w, w).detach(), eager)
print(module._direct.ready, runtime.has_pool())
"""


def test_where_there_is_neither_tvm_nor_a_compiler(own_cache: Path, tmp_path: Path) -> None:
    """A process that has torch and tvm_ffi alone runs what was built beforehand, our own C among
    it, and changes nothing in the cache.
    """
    assert run("--rows", "8").exit_code == run("--rows", "8", "--strided").exit_code == 0

    def files() -> dict[Path, int]:
        return {f: f.stat().st_mtime_ns for f in own_cache.rglob("*") if f.is_file()}

    before = files()
    done = child(SERVED, tmp_path / "site")
    assert (done.returncode, done.stdout) == (0, "True True\n"), done.stderr
    assert files() == before
    done = child(
        "from lntune.cli import main; import sys; sys.argv[1:] = ['doctor']; main()",
        tmp_path / "site",
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == 0 and "kernel cache" in done.stdout, done.stderr
    assert "pip install 'lntune[tune]'" in " ".join(done.stdout.split())


ELSEWHERE = """
import torch
from lntune import schedule
from lntune.backends import cuda
from lntune.backends.cuda import launcher
from lntune.case import Case
from lntune.errors import ToolchainError
from lntune.kernels import cache
from lntune.torch import dispatch

stamp = {stamp!r}


def identity():
    if not stamp:
        raise ToolchainError("there is no CUDA compiler")
    return "nvcc of another release"


cuda.stamp, cuda.identity = lambda: stamp, identity
try:
    import tvm
except ImportError:
    pass
else:
    raise SystemExit("TVM is there")
case, device = Case("layer_norm", 40, "float32", 8, "weight+bias"), launcher.device(0)
choice = dispatch.choose(case, device)
plan, setting = schedule.resolve(choice.schedule, case.op, choice.knobs)
kernel = cache.kernel(case, plan, setting, device)
x, w, y = torch.randn(3, 40), torch.randn(40), torch.empty(3, 40)
kernel(x, w, w, 1e-5, y)
torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (40,), w, w))
print("served")
"""


@pytest.mark.parametrize(
    ("metadata", "stamp"),
    [
        (False, "Nvcc /elsewhere/nvcc 1 2"),
        *map(exhaustive, ((False, ""), (True, ""), (True, "Nvcc /elsewhere/nvcc 1 2"))),
    ],
)
def test_a_gpus_kernel_travels(
    fake_gpu: FakeGpu, own_cache: Path, tmp_path: Path, stamp: str, metadata: bool
) -> None:
    """A kernel for a GPU that was built elsewhere is found and serves where the CUDA compiler is
    another one, or none, and TVM cannot be imported; nothing of what built it is in its name.
    """
    built = prebuild.build_case(
        msgspec.structs.replace(CASE.typical, variant="weight+bias"), launcher.device(0)
    )
    assert built.status == "built", built.message
    x, w, y = torch.randn(3, 40), torch.randn(40), torch.empty(3, 40)
    launcher.load(stored.read(Path(built.path)))(x, w, w, 1e-5, y)  # the emulator has compiled it
    before = {f: f.stat().st_mtime_ns for f in own_cache.rglob("*.gpu")}
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(NO_TVM + ("" if metadata else NO_METADATA) + SITE)
    path = os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE.format(stamp=stamp)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "served\n"), done.stderr
    assert {f: f.stat().st_mtime_ns for f in own_cache.rglob("*.gpu")} == before


BARE = """
import sys
for name in ("numpy", "typer", "rich", "click"):
    sys.modules[name] = None  # as if it were not installed
import lntune, torch
torch.manual_seed(0)
lstm = lntune.LayerNormLSTM(8, 16)
assert lstm(torch.randn(3, 2, 8))[0].shape == (3, 2, 16)
from lntune.__main__ import main
main()
"""


def test_where_there_is_no_command_line_either() -> None:
    """Calls from PyTorch need neither NumPy nor what the command line is made of; a command says in
    a line what it lacks.
    """
    done = subprocess.run(
        [sys.executable, "-c", BARE], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert (
        "lntune: the command line needs the package typer, which is not installed here"
        in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_another_tvm_builds_anew(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another release of TVM is installed that fits, kernels are built again with it; where
    it cannot build, they serve as they are.
    """
    built = [Path(one["path"]) for one in json.loads(run("--rows", "8", "--json").stdout)]
    real = toolchain.installed
    monkeypatch.setattr(
        toolchain, "installed", lambda name: "0.27.9" if name == "apache-tvm" else real(name)
    )
    assert [one["status"] for one in json.loads(run("--rows", "8", "--json").stdout)] == [
        "built",
        "built",
    ]
    assert [sealed.facts(path)["apache-tvm"] for path in built] == ["0.27.9"] * 2
    monkeypatch.setattr(compiler, "to_file", lambda *_: pytest.fail("built"))
    monkeypatch.setattr(
        toolchain, "installed", lambda name: "0.28.0" if name == "apache-tvm" else real(name)
    )
    assert [one["status"] for one in json.loads(run("--rows", "8", "--json").stdout)] == [
        "there",
        "there",
    ]


def test_what_is_there_is_not_built_again() -> None:
    """The second time every kernel is found, and the file is the one that dispatch loads."""
    first, second = (json.loads(run("--rows", "8", "--json").stdout) for _ in range(2))
    assert [one["status"] for one in first] == ["built", "built"]
    assert [one["status"] for one in second] == ["there", "there"]
    assert [one["path"] for one in first] == [one["path"] for one in second]
    assert all(Path(one["path"]).stat().st_size == one["bytes"] > 0 for one in second)


def test_a_file_for_several_architectures(fake_gpu: FakeGpu) -> None:
    """It is the kernel of the device's own architecture with more code in it, made again where some
    is not in it yet, with what it held; the device loads it.
    """
    gpu, asked = launcher.device(0), {"sm_90"}
    for archs, status in (
        ((), "built"),
        (("sm_80",), "built"),
        (("sm_80",), "there"),
        ((), "there"),
        (("sm_120",), "built"),
        (("sm_80",), "there"),
    ):
        built = prebuild.build_case(CASE.typical, gpu, archs)
        asked |= set(archs)
        assert built.status == status
        assert set(stored.read(Path(built.path)).images) == asked
    Path(built.path).write_bytes(b"damaged")
    with pytest.warns(sealed.DamagedWarning):
        assert prebuild.build_case(CASE.typical, gpu, ("sm_80",)).status == "built"
    assert set(stored.read(Path(built.path)).images) == {"sm_90", "sm_80"}
    x, w, y = torch.randn(3, 40), torch.randn(40), torch.empty(3, 40)
    launcher.load(stored.read(Path(built.path)))(x, w, w, 1e-5, y)
    torch.testing.assert_close(y, functional.layer_norm(x, (40,), w, w))
    kernel = cache.kernel(CASE, *_plan(built), gpu)
    assert len(list(Path(built.path).parent.glob("*.gpu"))) == 1
    kernel(x, w, w, 1e-5, y.zero_())
    torch.testing.assert_close(y, functional.layer_norm(x, (40,), w, w))


def _plan(built: prebuild.Built) -> tuple[Any, Any]:
    from lntune import knobs, schedule

    plan = schedule.get(built.schedule)
    return plan, knobs.from_dict(plan.knobs, built.knobs)


def test_several_devices_at_once(fake_gpu: FakeGpu) -> None:
    """Each target gets kernels of its own, whether it is here or not."""
    done = run("--rows", "8", "--target", "cpu,cuda:sm_80,nvidia/nvidia-h100", "--json")
    assert done.exit_code == 0, done.output
    assert [one["arch"] for one in json.loads(done.stdout)] == [device.current().isa] * 2 + [
        "sm_80"
    ] * 2 + ["sm_90"] * 2
    assert "6 kernels, about a second each" in done.stderr


def test_what_eager_mode_serves_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is built for a case in which eager mode measured faster."""
    monkeypatch.setattr(dispatch, "choose", lambda *_: Choice("eager"))
    done = run("--rows", "8")
    assert (
        done.exit_code,
        "0 kernels built, 0 were there, 2 left to eager mode" in done.output,
    ) == (0, True)


def test_what_cannot_be_built_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are built, the reason is told, and the exit code is 1."""
    real = compiler.to_file

    def failing(case: Case, *rest: Any) -> None:
        if "stats" in case.variant:
            raise BuildError("the disk is full")
        real(case, *rest)

    monkeypatch.setattr(compiler, "to_file", failing)
    done = run("--rows", "8")
    assert done.exit_code == 1
    assert "1 kernel built, 0 were there" in done.output
    assert (
        "layer_norm 8x40 float32 weight+bias+stats for" in done.output
        and "failed: the disk is full" in done.output
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--archs", "sm_80"), "--archs: got sm_80 beside --target cpu, expected a GPU's target"),
        (("--archs", "sm_81", "--target", "cuda:sm_90"), "sm_81"),
        (("--target", ""), "--target: got ''"),
        (("--target", "cuda:sm_1"), "cuda:sm_1"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], message: str) -> None:
    """They are one line that names the argument, and exit code 2."""
    done = run(*arguments)
    assert (done.exit_code, message in done.output) == (2, True), done.output


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("could not determine the home directory"),
        OSError(28, "No space left"),
        ImportError("libtvm.so"),
    ],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize(
    ("module", "name"),
    [
        (dispatch, "choose"),
        (cache, "prepare"),
        (compiler, "to_file"),
        (compiler, "_tvm"),
        (native, "compiled"),
        (native, "path_of"),
    ],
)
def test_whatever_goes_wrong_is_reported(
    module: Any, name: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault is the finding of each case that it strikes, or one line and exit code 2 where
    nothing can be built at all; no traceback.
    """

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(module, name, fail)
    done = run("--rows", "8", "--json")
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert "Traceback" not in done.output
    if module is native:
        assert (done.exit_code, str(error) in done.stderr) == (2, True)
    else:
        assert done.exit_code == 1
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        assert [(one["status"], reason in one["message"]) for one in json.loads(done.stdout)] == [
            ("failed", True)
        ] * 2
