"""Nothing between a call and its kernel takes a model down: whatever goes wrong is said once and
eager mode serves; strict mode raises.
"""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch.nn import functional

import lntune
from lntune import device, schedule
from lntune.backends import cuda
from lntune.backends.cuda import driver, locate
from lntune.case import Case
from lntune.errors import BuildError, LntuneError, LogError
from lntune.kernels import direct
from lntune.kernels.direct import Table
from lntune.log import records
from lntune.log.records import LogWarning, Record, Timing
from lntune.log.select import Choice
from lntune.system import later, native, paths, sources, toolchain
from lntune.system.sealed import DamagedWarning
from lntune.torch import choices, devices, dispatch, first_check, layer_norm_node
from lntune.torch.direct_calls import Direct

X = torch.randn(8, 48)
CASE = Case("layer_norm", 48, "float32", 8, "plain")
ODD: list[Exception] = [
    RuntimeError("could not determine the home directory"),
    UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid continuation byte"),
    ImportError("libtvm.so: cannot open shared object file"),
    OSError(errno.EBUSY, "Device or resource busy"),
    AttributeError("no such thing"),
    MemoryError(),
    BuildError("the disk is on fire"),
]


@pytest.fixture(autouse=True)
def nothing_remembered(log_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test decides anew, on no log, and leaves nothing."""
    monkeypatch.setattr(paths, "log_dirs", lambda: [log_dir])
    lntune.reload()
    yield
    lntune.strict(False)


def call(x: torch.Tensor = X) -> torch.Tensor:
    """A call of the public function."""
    return lntune.layer_norm(x, x.shape[-1:])


def eager(x: torch.Tensor = X) -> bool:
    """True when eager mode serves a call: it is PyTorch's to the bit. Any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return (
            torch.equal(call(x), functional.layer_norm(x, x.shape[-1:]))
            and dispatch.kernel_for(CASE) is None
        )


def raising(error: BaseException) -> Callable[..., Any]:
    """A function that raises it."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


# What goes wrong, and where: each of these lies between a call and its kernel.
PLACES = [
    (first_check, "kernel"),
    (records, "read"),
    (schedule, "for_op"),
    (choices, "select"),
    (paths, "cached"),
    (dispatch, "narrowed"),
]


@pytest.mark.parametrize("error", ODD, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize(("module", "name"), PLACES, ids=lambda p: p if isinstance(p, str) else "")
def test_whatever_goes_wrong(
    module: Any, name: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said once, at the line that called, and served by eager mode, forward and backward; an error
    of ours in strict mode, with its cause.
    """
    monkeypatch.setattr(module, name, raising(error))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert torch.equal(call(), functional.layer_norm(X, (48,)))
        leaf = X.clone().requires_grad_()
        call(leaf).sum().backward()
        assert leaf.grad is not None
        call(torch.randn(8, 56))
    untuned = [w for w in caught if "has no kernel, eager mode serves it" in str(w.message)]
    assert len(untuned) == 1
    assert issubclass(untuned[0].category, lntune.UntunedWarning)
    assert untuned[0].filename == __file__
    assert type(error).__name__ in str(untuned[0].message) or str(error) in str(untuned[0].message)
    lntune.strict()
    monkeypatch.setattr(Choice, "measured", True)  # else strict mode has nothing to do with kernels
    for _ in range(2):
        with pytest.raises(LntuneError) as raised:
            call()
        assert raised.value is error or raised.value.__cause__ is error


def test_an_interrupt_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a kernel is built ends the program, and the next call begins anew."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(first_check, "kernel", raising(KeyboardInterrupt()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    assert dispatch.kernel_for(CASE) is not None


@pytest.mark.parametrize("error", ODD, ids=lambda e: type(e).__name__)
def test_without_direct_calls(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a table of direct calls cannot be made, or does not take a kernel, the general path
    serves, on the kernel.
    """
    monkeypatch.setattr(direct, "_library", raising(error))
    fresh = Direct("tnoof", ("x", "normalized_shape", "weight", "bias", "eps"))
    kernel = dispatch.kernel_for(CASE)
    assert kernel is not None
    fresh.remember(CASE, kernel, (X, (48,), None, None, 1e-5))
    assert not fresh.ready
    monkeypatch.undo()
    monkeypatch.setattr(Table, "remember", raising(error))
    other = Direct("tnoof", ("x", "normalized_shape", "weight", "bias", "eps"))
    other.remember(CASE, kernel, (X, (48,), None, None, 1e-5))
    assert not other.ready


def test_an_error_of_the_users_filters_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who makes lntune's warnings errors gets them."""
    monkeypatch.setattr(first_check, "kernel", raising(DamagedWarning("a file was damaged")))
    with warnings.catch_warnings(), pytest.raises(DamagedWarning):
        warnings.simplefilter("ignore")
        call()


# What passes.


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        """As time.monotonic."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that decides when something is tried again."""
    fake = Clock()
    monkeypatch.setattr(later, "time", fake)
    return fake


@pytest.mark.parametrize("number", [errno.EBUSY, errno.ESTALE, errno.ENOSPC, errno.EACCES])
def test_what_may_pass_is_tried_again(
    number: int, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of the file system sends calls to eager mode until it is over, not for the life of
    the process; the tries become rarer, and the warning says that there will be any.
    """
    asked: list[float] = []
    error = OSError(number, os.strerror(number))

    def fails(*_: Any) -> Any:
        asked.append(clock.now)
        try:
            raise error
        except OSError as e:
            raise BuildError(f"cannot store it: {e}") from e

    with monkeypatch.context() as patch:
        patch.setattr(first_check, "kernel", fails)
        with pytest.warns(
            lntune.UntunedWarning, match="cannot store it: .* It is tried again later"
        ):
            call()
        for _ in range(4000):
            clock.now += 1
            assert eager()
    gaps = [b - a for a, b in itertools.pairwise(asked)]
    assert len(gaps) > 3
    assert gaps == sorted(gaps)
    assert 2 * gaps[-2] < gaps[-1] < 4000
    clock.now += 4000
    assert call().allclose(functional.layer_norm(X, (48,)), atol=1e-5)
    assert dispatch.kernel_for(CASE) is not None


def test_what_does_not_pass_is_not_tried_again(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No compiler, a schedule that fails: what was asked once is not asked again, until
    lntune.reload.
    """
    asked: list[int] = []

    def fails(*_: Any) -> Any:
        asked.append(1)
        raise BuildError("TVM failed to compile")

    with monkeypatch.context() as patch:
        patch.setattr(first_check, "kernel", fails)
        with pytest.warns(lntune.UntunedWarning, match="TVM failed to compile$"):
            call()
        clock.now += 1e6
        assert eager()
        assert asked == [1]
    lntune.reload()
    assert dispatch.kernel_for(CASE) is not None


def test_trying_again_costs_little(clock: Clock) -> None:
    """What takes long to try waits longer."""
    again = later.Later()
    with pytest.raises(OSError, match="busy"), again.trying():
        clock.now += 30
        raise OSError("busy")
    clock.now += 599
    assert not again.due
    clock.now += 2
    assert again.due


def in_the_way(error: OSError) -> Callable[..., Any]:
    """A function that fails as ours do where the file system does."""

    def fail(*_: Any, **__: Any) -> Any:
        try:
            raise error
        except OSError as e:
            raise BuildError(f"cannot store it: {e}") from e

    return fail


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_node_that_cannot_be_stored_now(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full while the backward's C++ is compiled costs the node until there is room
    again, not for the life of the process.
    """
    asked: list[float] = []
    assert not layer_norm_node.reason_missing()
    loaded = layer_norm_node._loaded.copy()
    monkeypatch.setattr(layer_norm_node, "_loaded", [])
    monkeypatch.setattr(layer_norm_node, "_missing", [])
    monkeypatch.setattr(layer_norm_node, "_later", later.Later())
    monkeypatch.setattr(
        layer_norm_node, "_load", lambda: asked.append(clock.now) or in_the_way(FULL)()
    )
    for _ in range(100):
        assert "No space left" in layer_norm_node.reason_missing()
        assert not layer_norm_node.compile_once()
        clock.now += 1
    assert 3 <= len(asked) <= 6
    monkeypatch.setattr(layer_norm_node, "_load", lambda: layer_norm_node._loaded.extend(loaded))
    clock.now += 1e4
    assert layer_norm_node.compile_once(), "it is there now, and was not before"
    assert not layer_norm_node.compile_once()
    assert layer_norm_node.ready()


def test_a_node_that_cannot_be_compiled(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not pass, no compiler, is asked once."""
    asked: list[float] = []
    monkeypatch.setattr(layer_norm_node, "_loaded", [])
    monkeypatch.setattr(layer_norm_node, "_missing", [])
    monkeypatch.setattr(
        layer_norm_node,
        "_load",
        lambda: asked.append(clock.now) or raising(BuildError("no compiler"))(),
    )
    for _ in range(3):
        assert layer_norm_node.reason_missing() == "no compiler"
        clock.now += 1e5
    assert len(asked) == 1
    monkeypatch.setattr(native, "path_of", raising(RuntimeError("no home")))
    assert not layer_norm_node.ready()


def test_a_driver_that_cannot_be_asked_now(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of files while what asks the driver is compiled leaves a GPU to PyTorch until it is
    over; said once.
    """
    monkeypatch.setattr(driver, "_opened", {})
    monkeypatch.setattr(driver, "_chosen", ("libm.so.6", driver.CPU))
    monkeypatch.setattr(devices, "_devices", {})
    monkeypatch.setattr(devices, "_retries", {})
    place, here = torch.device("cuda:0"), device.Device("gpu", "Some", "sm_90", 8)
    asked: list[float] = []
    monkeypatch.setattr(driver, "library", lambda: asked.append(clock.now) or in_the_way(FULL)())
    with pytest.warns(
        RuntimeWarning, match="do not run on cuda:0.*No space left.*tried again later"
    ) as caught:
        for _ in range(100):
            assert devices.of(place) is None
            clock.now += 1
    assert len(caught) == 1
    assert 3 <= len(asked) <= 6
    monkeypatch.setattr(
        driver.Driver,
        "__init__",
        lambda self, path, kind: vars(self).update(
            missing="", fault=None, count=1, devices=(here,)
        ),
    )
    clock.now += 1e4
    assert devices.of(place) == here


def test_a_driver_that_is_not_there(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """That does not pass, and is asked once."""
    monkeypatch.setattr(driver, "_opened", {})
    monkeypatch.setattr(driver, "_chosen", ("/no/such/driver.so", driver.CUDA))
    monkeypatch.setattr(devices, "_devices", {})
    monkeypatch.setattr(devices, "_retries", {})
    with pytest.warns(RuntimeWarning, match="no NVIDIA driver") as caught:
        for _ in range(3):
            assert devices.of(torch.device("cuda:0")) is None
            clock.now += 1e5
    assert len(caught) == 1 and "again" not in str(caught[0].message)


def test_a_log_of_another_device_that_cannot_be_read(log_dir: Path) -> None:
    """It is named, and this device's record serves."""
    plan = next(iter(schedule.for_op("layer_norm", "cpu").values()))
    here, timings = device.current(), {"tuned": Timing((1.0,), 1.0), "eager": Timing((2.0,), 2.0)}
    knobs = msgspec.to_builtins(plan.default(CASE, here))
    record = Record(
        role="final", case=CASE, device=here, threads=1, schedule=plan.name, code=plan.code,
        knobs=knobs, status="ok", timings=timings, busy=False,
        time="2026-01-01T00:00:00.000+00:00",
    )  # fmt: skip
    records.append(log_dir, record)
    (log_dir / "another" / "layer_norm.jsonl").mkdir(parents=True)
    with pytest.warns(LogWarning, match=r"another.layer_norm\.jsonl.*left out") as caught:
        assert dispatch.kernel_for(CASE) is not None
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert dispatch.choose(CASE).tier == "exact"
    records.log_path(log_dir, here, "layer_norm").unlink()
    records.log_path(log_dir, here, "layer_norm").mkdir()
    lntune.reload()
    with pytest.raises(LogError):
        dispatch.choose(CASE)


# Where there is no home.

HOMELESS = """
import os, sys, warnings
import torch, lntune
from torch.nn import functional
def right(hidden):
    x = torch.randn(8, hidden)
    torch.testing.assert_close(lntune.layer_norm(x, (hidden,)), functional.layer_norm(x, (hidden,)))
warnings.simplefilter("ignore")
right(48)  # built here: what is imported when first needed may lie where the other user cannot read
from lntune.log import records
from lntune.system import paths
from lntune.torch import devices, dispatch, layer_norm_node
from lntune.case import Case
from lntune.backends.cuda import driver, locate
for name in ("HOME", "LNTUNE_CACHE_DIR", "LNTUNE_LOG_DIR", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
    os.environ.pop(name, None)
os.setgroups([]); os.setgid(12345); os.setuid(12345)
paths.is_checkout = lambda: False
for environment in ({}, {"LNTUNE_CACHE_DIR": "~/x"}, {"HOME": "/"}, {"HOME": "/root"}):
    os.environ.update(environment)
    lntune.reload()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        right(72); right(80)
    messages = [str(w.message) for w in caught]
    assert dispatch.kernel_for(Case("layer_norm", 72, "float32", 8, "plain")) is not None, messages
    kept = len([m for m in messages if "kernels are kept in" in m])
    missing = len([m for m in messages if "no kernel" in m])
    print(kept, missing, paths.log_dir())
    os.environ.pop("LNTUNE_CACHE_DIR", None)
"""


@pytest.mark.skipif(
    not hasattr(os, "getuid") or os.getuid() != 0,
    reason="needs root, to become a user without an account",
)
def test_a_user_without_home_and_account() -> None:
    """Kernels are built and kept in a private temporary folder, which is said once a reason; so are
    new measurements.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o1777)
        path = os.pathsep.join(
            [str(paths.PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        environment = {
            **os.environ,
            "PYTHONPATH": path,
            "TMPDIR": folder,
            "LNTUNE_CACHE_DIR": f"{folder}/first",
        }
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(HOMELESS)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        logs = f"{folder}/lntune-12345/tuning_logs"
        assert done.stdout.splitlines() == [
            f"1 0 {logs}",
            f"1 0 {logs}",
            f"1 0 {logs}",
            f"1 0 {logs}",
        ]
        private = Path(folder) / "lntune-12345"
        assert (private.stat().st_uid, private.stat().st_mode & 0o777) == (12345, 0o700)
        assert len(list(private.rglob("*.so"))) >= 2


def test_a_compiler_that_speaks_latin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that fails with bytes that are no UTF-8 is quoted in the warning, and eager mode
    serves.
    """
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nprintf 'erreur: sp\\351cial\\n' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("LNTUNE_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.warns(lntune.UntunedWarning, match="no kernel, eager mode serves it: .*"):
        assert torch.equal(call(), functional.layer_norm(X, (48,)))


def test_a_tvm_that_cannot_be_imported(own_cache: Path, tmp_path: Path) -> None:
    """Half an installation of TVM is named with the remedy, and eager mode serves."""
    (tmp_path / "tvm").mkdir()
    (tmp_path / "tvm" / "__init__.py").write_text(
        "raise ImportError('libtvm.so: cannot open shared object file')\n"
    )
    code = """
    import warnings, torch, lntune
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x = torch.randn(8, 52)
        assert torch.equal(lntune.layer_norm(x, (52,)), torch.nn.functional.layer_norm(x, (52,)))
    print([str(w.message) for w in caught if "no kernel" in str(w.message)])
    """
    path = os.pathsep.join(
        [str(tmp_path), str(paths.PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "TVM cannot be imported: ImportError: libtvm.so" in done.stdout
    assert "Install apache-tvm again" in done.stdout


def test_our_c_that_cannot_be_stored(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename that is refused is an error with the remedy, whose cause is the system's."""
    monkeypatch.setattr(Path, "replace", raising(OSError(errno.EBUSY, "Device or resource busy")))
    monkeypatch.setattr(toolchain, "run_compiler", lambda _, output: output.write_bytes(b"made"))
    (own_cache / "runtime").unlink()
    with pytest.raises(BuildError, match=r"Device or resource busy.*LNTUNE_CACHE_DIR") as raised:
        native.compiled(direct.SOURCE)
    assert isinstance(raised.value.__cause__, OSError)


def test_a_schedule_in_another_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's schedule file is read as Python reads it: one that says it is in Latin-1 loads."""
    (tmp_path / "cpu").mkdir()
    text = "# -*- coding: latin-1 -*-\n# caf\u00e9\nSCHEDULES = ()\n"
    (tmp_path / "cpu" / "mine.py").write_bytes(text.encode("latin-1"))
    assert schedule.load_file(tmp_path / "cpu" / "mine.py", "cpu") == []
    assert "caf\u00e9" in sources.text_of(tmp_path / "cpu" / "mine.py")


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH", "LNTUNE_NVCC"])
def test_a_toolkit_in_a_home_that_is_not_there(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not found, as one that is not there; nothing breaks."""
    monkeypatch.setattr(
        Path, "expanduser", raising(RuntimeError("Could not determine home directory."))
    )
    monkeypatch.setenv(variable, "~/cuda")
    assert Path("~/cuda") in locate.toolkits() or variable == "LNTUNE_NVCC"
    assert isinstance(cuda.stamp(), str)
    assert isinstance(cuda.available(), str)


@pytest.mark.parametrize(
    "error",
    [ImportError("libtvm_ffi.so"), RuntimeError("no home"), BuildError("no compiler")],
    ids=lambda e: type(e).__name__,
)
def test_a_driver_that_cannot_be_asked(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU then, and the reason is kept."""
    monkeypatch.setattr(driver, "library", raising(error))
    instance = driver.Driver("libm.so.6", driver.CPU)
    assert instance.count == 0
    assert str(error) in instance.missing


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of POSIX")
def test_a_full_folder_of_temporary_files(tmp_path: Path) -> None:
    """LLVM would end the process where it cannot write an object file: it is said, and eager mode
    serves.
    """
    code = """if True:
        import resource, warnings, torch, lntune
        warnings.simplefilter("always")
        x = torch.randn(8, 192)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        y = lntune.layer_norm(x, (192,))
        assert torch.equal(y, torch.nn.functional.layer_norm(x, (192,)))
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LNTUNE_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "has no kernel, eager mode serves it" in done.stderr
