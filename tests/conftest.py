"""What every test gets: folders of its own for kernels, logs and schedules, and a reason where a
GPU is missing.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from fake_gpu import fake_gpu

__all__ = ["fake_gpu"]

# A thread without work sleeps. Several processes test at a time, and one whose threads spin while
# they wait takes the cores from the others. OpenMP reads this when PyTorch is loaded, which the
# tests' files do later, and the processes that tests start inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# What others can write to is not loaded, whatever umask the tests are started with.
os.umask(os.umask(0) | 0o022)

# Who starts the tests behind nohup, or in the background of a script, has signals ignored that
# tests send, in children too.
for ignored, default in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, default)


LONGEST = """
    bringup gpu_kernels runtime tune tune_gpu on_gpu_torch worker mutants kernel_options
    versions torch_compile tutorial readme lnlstm kernels killed_commands cli lnlstm_sequence
    gpu_aligned_rows second_steps gpu_gates strides lstm_tracing gpu_layer_norm_backward wheel
    device_code prebuild opinfo cpu_lowering gpu_pass early_start first_check on_gpu_kernels
    gpu_layer_norm layer_norm_backward gpu_pass_jobs metaschedule on_gpu_processes torch_grad
    backends build bench gpu_exchange lstm_transforms
"""
"""Files that take longest, begun first: a long one begun last keeps one process busy while the
others have nothing left to do.
"""
QUICK = """
    merge prune strange_logs t4
    bars bench_log_speed bench_plots bench_summary beside beside_eager caches capture case certainty
    check cold columns compare compare_measure compare_report compare_sides cuda_headers decide
    device disturbance doctor errors failures finals gpu_pass_run grids hostile interrupts kills
    knobs known_eager layers line_lengths locks log_dir lowering newcomers output page paths
    patience plots records report report_queries schedule scratch search_budget surroundings survey
    timing toolchain training_decision trust words
"""
"""Files whose tests build no kernel, nor start processes that do: the tier of the first two
minutes. Every test of the others is `slow`.
"""


_number = itertools.count()


def pytest_addoption(parser: pytest.Parser) -> None:
    """--exhaustive runs what a grid leaves out of ordinary runs, see grids.py."""
    parser.addoption("--exhaustive", action="store_true", help="all of every grid of parameters")


def pytest_configure(config: pytest.Config) -> None:
    """Files are dealt out in the order in which they are collected, not those with most tests first
    (pytest -n, --dist loadfile).
    """
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The kernel cache of the whole run: a kernel is built once and shared by the tests and by the
    processes that run them (pytest -n), and the user's cache stays untouched.

    The log folder is set too, so that a fixture of a wider scope than one test cannot write into
    the checkout's, and shipped logs are not read: whether they serve depends on the machine.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LNTUNE_CACHE_DIR", str(folder))
        patch.setenv("LNTUNE_LOG_DIR", str(tmp_path_factory.mktemp("logs")))
        patch.setenv("LNTUNE_SHIPPED_LOGS", "0")
        patch.delenv("LNTUNE_SCHEDULES", raising=False)
        yield folder


@pytest.fixture(autouse=True)
def log_dir(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's own folder of tuning logs (not there until something is written)."""
    # not in tmp_path, which is a folder made for each of thousands of tests that want none
    folder = tmp_path_factory.getbasetemp() / f"tuning_logs-{next(_number)}"
    monkeypatch.setenv("LNTUNE_LOG_DIR", str(folder))
    return folder


@pytest.fixture(autouse=True)
def no_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that is not slow builds no kernel: not for the CPU, nor for a GPU, nor for the
    emulator.
    """
    if not request.node.get_closest_marker("slow"):
        message = (
            f"{request.path.name} builds a kernel: mark the test slow, or take the file from QUICK"
            " in tests/conftest.py"
        )
        for builder in (
            "backends.cpu.llvm._compile",
            "backends.cuda.stored.binary",
            "backends.emulated.emulator.compile",
        ):
            monkeypatch.setattr(f"lntune.{builder}", lambda *_, **__: pytest.fail(message))


@pytest.fixture
def own_cache(cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for kernels; what is compiled of ours is taken from the run's."""
    folder = tmp_path / "cache"
    folder.mkdir()
    for name in ("runtime", "emulator"):
        (cache_dir / name).mkdir(exist_ok=True)
        (folder / name).symlink_to(cache_dir / name)
    monkeypatch.setenv("LNTUNE_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: hundreds of tiny matrix products wait for each other's threads on a
    machine that is in use.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def script(request: pytest.FixtureRequest) -> ModuleType:
    """The script of bench/ that a file test_bench_{name}.py tests; it is no part of the package."""
    name = request.path.stem.removeprefix("test_bench_")
    spec = importlib.util.spec_from_file_location(
        f"bench_{name}", Path(__file__).parents[1] / "bench" / f"{name}.py"
    )
    assert spec is not None and spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_collection_finish() -> None:
    """What importing PyTorch and the tests has left stays for good; each look for garbage among its
    million objects takes a tenth of a second.
    """
    gc.collect()
    gc.freeze()


def is_left_out(item: pytest.Item) -> bool:
    """Whether a test is for `--exhaustive` alone. On a GPU all of a grid is run."""
    on_gpu = item.get_closest_marker("gpu") is not None
    return item.get_closest_marker("exhaustive") is not None and not on_gpu


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is exhaustive, unless it is asked for. Begin with the longest files; mark what
    builds kernels. Skip what needs a GPU where there is none; torch is imported only if some test
    asks for one.
    """
    if not config.getoption("--exhaustive"):
        left_out = [item for item in items if is_left_out(item)]
        items[:] = [item for item in items if not is_left_out(item)]
        config.hook.pytest_deselected(items=left_out)
    place = {f"test_{name}": number for number, name in enumerate(LONGEST.split())}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    for item in items:
        if item.path.stem.removeprefix("test_") not in QUICK.split():
            item.add_marker(pytest.mark.slow)
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(
                pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False")
            )
