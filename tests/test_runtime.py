"""The process around a kernel: threads, pools, forks, other TVM modules, the cache folder and what
goes wrong with it.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from grids import exhaustive

import lntune
from lntune.backends.cpu import runtime
from lntune.errors import BuildError
from lntune.system import native, paths, toolchain
from lntune.system.sealed import DamagedError

pytestmark = pytest.mark.filterwarnings("ignore::lntune.UntunedWarning")

PRELUDE = """
import os, sys, warnings
import torch, lntune
from torch.nn import functional
x = torch.randn(512, 256)
def right(x=x):
    y = lntune.layer_norm(x, (x.shape[-1],))
    torch.testing.assert_close(y, functional.layer_norm(x, (x.shape[-1],)), atol=1e-5, rtol=1e-5)
"""


def process(
    code: str, *options: str, timeout: float = 60, **env: str
) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own, after PRELUDE, with the cache and logs of this test
    unless `env` says otherwise.
    """
    path = os.pathsep.join([str(paths.PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    command = [
        sys.executable,
        *(options or ("-W", "ignore")),
        "-c",
        PRELUDE + textwrap.dedent(code),
    ]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": path, **env},
    )


def warm(shape: tuple[int, ...] = (512, 256)) -> torch.Tensor:
    """A kernel in the cache, and its result."""
    return lntune.layer_norm(torch.ones(shape), shape[-1:])


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, set back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# The launcher, called as a kernel calls it.

TASK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


def launch(count: int = 0) -> list[tuple[int, int]]:
    """(task, tasks) of every task that ran."""
    ran: list[tuple[int, int]] = []

    def task(index: int, env: int, _data: int) -> int:
        ran.append((index, ctypes.cast(env + 8, ctypes.POINTER(ctypes.c_int32))[0]))
        return 0

    assert runtime._own().lntune_parallel_launch(TASK(task), None, count) == 0
    return sorted(ran)


def test_the_pool_is_pytorchs(threads: Callable[[int], None]) -> None:
    """PyTorch's OpenMP pool was found, and as many tasks run as torch.set_num_threads says, each
    once.
    """
    assert runtime.has_pool()
    for number in (1, 2, 3, 1):
        threads(number)
        assert launch() == [(i, number) for i in range(number)]


def test_the_pool_is_found_where_it_is_nobody_elses() -> None:
    """Where OpenMP is not among everyone's symbols, as in PyTorch's wheels for Arm, it is found as
    what PyTorch's library needs.
    """
    runtime.has_pool()  # compiled
    code = """
        import ctypes, importlib.util, os
        from pathlib import Path
        from lntune.backends.cpu import runtime
        from lntune.system import native

        ours = native.load(runtime.SOURCE, ctypes.CDLL)
        assert not hasattr(ctypes.CDLL(None), "GOMP_parallel")
        print(ours.lntune_runtime_init(None, None, None))
        folder = Path(importlib.util.find_spec("torch").origin).parent / "lib"
        torch = ctypes.CDLL(str(folder / "libtorch_cpu.so"), mode=os.RTLD_LOCAL | os.RTLD_LAZY)
        print(ours.lntune_runtime_init(None, None, ctypes.c_void_p(torch._handle)))
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "0\n1\n"), done.stderr


def test_set_num_threads_holds_in_every_thread(threads: Callable[[int], None]) -> None:
    """A new Python thread takes PyTorch's number, though OpenMP keeps one per thread and starts
    from all cores.
    """
    threads(1)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(launch).result(30) == [(0, 1)]


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_more_tasks_than_threads(count: int, threads: Callable[[int], None]) -> None:
    """However few threads there are, every task runs exactly once."""
    threads(2)
    assert launch(count) == [(i, count) for i in range(count)]


def test_a_failed_task_is_reported(threads: Callable[[int], None]) -> None:
    """The launcher gives back a task's error code, serial or not."""
    for number in (1, 2):
        threads(number)
        assert (
            runtime._own().lntune_parallel_launch(
                TASK(lambda i, _e, _d, last=number - 1: -7 if i == last else 0), None, 0
            )
            == -7
        )


NESTED = """
typedef int (*Task)(int, void *, void *);
typedef int (*Launch)(Task, void *, int);
extern void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned);
extern int omp_get_thread_num(void);
static int ran[64], tasks[64];
static int task(int i, void *env, void *data) {
  __atomic_fetch_add((int *)data, 1, __ATOMIC_SEQ_CST);
  tasks[omp_get_thread_num() & 63] = *(int *)((char *)env + 8) + i;
  return 0;
}
static void region(void *launch) { ((Launch)launch)(task, &ran[omp_get_thread_num() & 63], 0); }
/* 0 if in a team of `team` threads every one of them ran the one task of its own launch */
#ifdef __cplusplus
extern "C"
#endif
int nested(void *launch, int team) {
  GOMP_parallel(region, launch, (unsigned)team, 0);
  for (int i = 0; i < team; ++i)
    if (ran[i] != 1 || tasks[i] != 1) return i + 1;
  return 0;
}
"""


def test_inside_an_openmp_region(tmp_path: Path, threads: Callable[[int], None]) -> None:
    """Called from inside somebody's parallel region a launch is serial in each thread: no team
    inside a team, no deadlock.

    A small C library opens the region on the very pool, and calls the launcher from all its
    threads.
    """
    threads(2)
    source, library = tmp_path / "nested.c", tmp_path / "nested.so"
    source.write_text(
        NESTED.replace(
            "extern void GOMP", '#ifdef __cplusplus\nextern "C" {\n#endif\nextern void GOMP'
        ).replace("static int ran", "#ifdef __cplusplus\n}\n#endif\nstatic int ran")
    )
    toolchain.run_compiler(["-O1", "-shared", "-fPIC", str(source)], library)
    launcher = ctypes.cast(runtime._own().lntune_parallel_launch, ctypes.c_void_p)
    assert ctypes.CDLL(str(library)).nested(launcher, 4) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_the_threads(
    dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    """The same bits with 1, 2, 3 and 5 threads, forward, with statistics and in 3-D; rows that do
    not divide among them.
    """
    x, w = torch.randn(517, 256).to(dtype), torch.randn(256).to(dtype)
    seen: list[list[torch.Tensor]] = []
    for number in (1, 2, 3, 5, 1):
        threads(number)
        y = [lntune.layer_norm(x, (256,), w) for _ in range(2)]
        y += [lntune.layer_norm(x.view(11, 47, 256), (256,), w).view(517, 256) for _ in range(2)]
        y.append(lntune.layer_norm(x, (256,), w.clone().requires_grad_()).detach())
        seen.append(y)
    assert all(torch.equal(a, b) for ys in seen for a, b in zip(ys, seen[0], strict=True))
    assert torch.equal(seen[0][0], seen[0][1])


def test_many_python_threads_at_once() -> None:
    """8 threads, each with shapes of its own, first calls included: every result is right, and
    nothing blocks for ever.
    """
    lntune.reload()
    start = threading.Barrier(8)

    def work(index: int) -> float:
        start.wait(60)
        worst = 0.0
        for step in range(12):
            hidden, rows = (96 + 32 * (index % 2)), (1, 40, 517)[(index + step) % 3]
            x, w = torch.randn(rows, hidden), torch.randn(hidden)
            expected = torch.nn.functional.layer_norm(x, (hidden,), w)
            worst = max(worst, float((lntune.layer_norm(x, (hidden,), w) - expected).abs().max()))
            if step % 4 == 3 and index < 2:
                lntune.layer_norm(x.requires_grad_(), (hidden,), w).sum().backward()
        return worst

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert max(f.result(120) for f in [pool.submit(work, i) for i in range(8)]) < 1e-4


def test_scratch_memory() -> None:
    """Blocks are aligned, distinct while in use, reused after, at least as large as asked, and each
    thread has its own.
    """
    library = runtime._own()
    allocate, free = library.lntune_workspace_alloc, library.lntune_workspace_free
    allocate.restype = ctypes.c_void_p
    allocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_int]
    free.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]

    def round_trip(_: Any = None) -> set[int]:
        seen: set[int] = set()
        for size in (100, 4096, 1 << 20, 64):
            blocks = [allocate(1, 0, size, 2, 32) for _ in range(3)]
            assert all(blocks) and len(set(blocks)) == 3 and all(b % 64 == 0 for b in blocks)
            for b in blocks:
                ctypes.memset(b, 1, size)
                assert free(1, 0, b) == 0
            seen |= set(blocks)
        held = [allocate(1, 0, 64, 2, 32) for _ in range(32)]
        assert len(set(held)) == 32 and all(held)
        for b in held:
            free(1, 0, b)
        return seen

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(round_trip, range(4)))


def test_no_scratch_memory() -> None:
    """A kernel that gets no scratch memory raises, on one thread and on several, and works again
    when there is some.
    """
    done = process("""
        import ctypes
        from lntune import device, schedule
        from lntune.backends.cpu import runtime
        from lntune.kernels import compiler
        from lntune.case import Case
        case, plan = Case("layer_norm", 4096, "float16", 512), schedule.get("widened_rows")
        here = device.current()
        kernel = compiler.in_memory(case, plan, plan.default(case, here), here)
        allocate, free = runtime._own().lntune_workspace_alloc, runtime._own().lntune_workspace_free
        number = ctypes.c_int
        allocate.restype = ctypes.c_void_p
        allocate.argtypes = [number, number, ctypes.c_uint64, number, number]
        free.argtypes = [number, number, ctypes.c_void_p]
        x, one = torch.randn(512, 4096).half(), torch.ones(4096).half()
        y = torch.empty_like(x)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            held = [allocate(1, 0, 8, 2, 32) for _ in range(32)]
            try:
                kernel(x, one, one, 1e-5, y)
                print("not refused")
            except MemoryError as e:
                print("scratch" in str(e))
            for block in held:
                free(1, 0, block)
            kernel(x, one, one, 1e-5, y)
        """)
    assert (done.returncode, done.stdout) == (0, "True\nTrue\n"), done.stderr


# Forks.


@pytest.mark.parametrize(
    "before",
    [
        pytest.param(("None", "right()"), id="nothing, kernel"),
        exhaustive(pytest.param(("(torch.randn(2048, 2048).exp(), runtime_ready())",), id="torch")),
    ],
)
def test_fork(before: tuple[str, ...]) -> None:
    """A forked child calls the kernel and PyTorch's own parallel operators with the default
    threads, and exits; so does the parent after it. Whoever used the pool before: our kernel,
    PyTorch alone, or nobody.
    """
    warm()
    done = process(f"""
        torch.set_num_threads(2)
        def runtime_ready():
            from lntune.backends.cpu import runtime
            runtime.has_pool()
        for parent in {before}:
            eval(parent)
            child = os.fork()
            if child == 0:
                right(); right(torch.randn(40, 96)); torch.randn(2048, 2048).exp(); right()
                os._exit(0)
            print("child", os.waitpid(child, 0)[1])
        right(); torch.randn(2048, 2048).exp()
        """)
    assert (done.returncode, done.stdout) == (0, "child 0\n" * len(before)), done.stderr


def test_fork_while_another_thread_builds() -> None:
    """A child forked in the middle of another thread's first call is not left with its lock
    shut.
    """
    done = process("""
        import threading, time
        right()
        def build():
            for n in (33, 34):
                lntune.layer_norm(torch.randn(3, n), (n,))
        thread = threading.Thread(target=build)
        thread.start()
        codes = []
        while thread.is_alive():
            time.sleep(0.05)
            child = os.fork()
            if child == 0:
                right(torch.randn(1, 256)) if len(codes) % 2 else right()
                os._exit(0)
            codes.append(os.waitpid(child, 0)[1])
        print("children", len(codes) > 0, set(codes))
        """)
    assert (done.returncode, done.stdout) == (0, "children True {0}\n"), done.stderr


def test_data_loader_workers() -> None:
    """A data set that normalizes in two forked workers gives what it gives in the main process,
    after that used the kernel.
    """
    warm()
    done = process("""
        from torch.utils.data import DataLoader, Dataset
        class Rows(Dataset):
            def __len__(self): return 8
            def __getitem__(self, i): return lntune.layer_norm(x + i, (256,))
        if __name__ == "__main__":
            wanted = [Rows()[i] for i in range(8)]
            for workers, context in ((0, None), (2, "fork")):
                options = {"num_workers": workers, "multiprocessing_context": context}
                got = list(DataLoader(Rows(), batch_size=None, **options))
                assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
            print("done")
        """)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


# TVM beside it.

ADD = """
def parallel_add():
    import numpy, tvm
    from tvm import s_tir, te, tirx
    n = te.var("n", "int64")
    a = te.placeholder((n,), "float32", name="a")
    b = te.compute((n,), lambda i: a[i] + tirx.const(1.0, "float32"), name="b")
    sch = s_tir.Schedule(te.create_prim_func([a, b]))
    sch.parallel(sch.get_loops(sch.get_sblock("b"))[0])
    function = tvm.compile(sch.mod, target="llvm")["main"]
    def run():
        given, out = torch.arange(1000.0), torch.zeros(1000)
        function(given, out)
        assert torch.equal(out, given + 1)
    return run
"""


def test_tvm_modules_of_the_user() -> None:
    """Modules compiled with TVM before, after and between calls of ours keep TVM's own pool, and
    both go on working.
    """
    warm()
    done = process(
        ADD
        + textwrap.dedent("""
        right()
        first = parallel_add(); first()
        right(torch.randn(700, 320))
        second = parallel_add(); second(); first(); right()
        import ctypes
        from lntune.backends.cpu import runtime
        theirs = ctypes.cast(runtime._tvm_runtime().TVMBackendParallelLaunch, ctypes.c_void_p).value
        registered, real = [], runtime._register
        def noted(name, library, function):
            registered.append(function)
            return real(name, library, function)
        runtime._register = noted
        with runtime.own_symbols(): pass
        print(registered[3:])
        """)
    )
    expected = [theirs for _, theirs in runtime._SYMBOLS.values()]
    assert (done.returncode, done.stdout) == (0, f"{expected}\n"), done.stderr


def test_a_cached_kernel_needs_no_compiler() -> None:
    """A fresh process with a filled cache loads the kernel without importing TVM or what
    torch.compile needs, and finds no C++ compiler missing.
    """
    warm()
    done = process(
        "right(); right(); print(*(m in sys.modules for m in ('tvm', 'torch._dynamo', 'tvm_ffi')))",
        CXX="/nonexistent",
        PATH="",
    )
    assert (done.returncode, done.stdout) == (0, "False False True\n"), done.stderr


# What goes wrong with the cache.


@pytest.mark.parametrize(
    "content",
    [b"", b"not a library", b"\x7fELF" + bytes(60), None],
    ids=["empty", "text", "zeros", "half"],
)
def test_damaged_kernels_are_refused(
    tmp_path: Path, cache_dir: Path, content: bytes | None
) -> None:
    """A file that is no whole kernel is a DamagedError naming it, never the end of the process."""
    warm()
    if content is None:
        whole = next(cache_dir.glob("kernels/**/*.so")).read_bytes()
        content = whole[: len(whole) // 2]
    path = tmp_path / "kernel.so"
    path.write_bytes(content)
    with pytest.raises(DamagedError, match=r"kernel\.so is damaged"):
        runtime.load(path)


def test_two_processes_fill_one_cache_and_mend_it(tmp_path: Path) -> None:
    """Two processes that build the same kernel at the same time both end well; a kernel and a
    runtime library that were cut short or overwritten later are put aside and rebuilt, each with a
    warning.
    """
    own_cache = tmp_path / "cache"
    env = {
        **os.environ,
        "PYTHONPATH": str(paths.PACKAGE.parent),
        "LNTUNE_CACHE_DIR": str(own_cache),
    }
    running = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", PRELUDE + "right()"], env=env)
        for _ in range(2)
    ]
    assert [p.wait(120) for p in running] == [0, 0]
    files = [*own_cache.glob("kernels/**/*.so"), *own_cache.glob("runtime/*.so")]
    assert len(files) == 3  # the kernel, its runtime, and direct calls
    sizes = {f: f.stat().st_size for f in files}
    files[0].write_bytes(files[0].read_bytes()[: sizes[files[0]] // 2])
    for file in files[1:]:
        file.write_bytes(b"not a library")
    done = process(
        "right(); from lntune.torch import layer_norm; print(layer_norm._direct.ready)",
        LNTUNE_CACHE_DIR=str(own_cache),
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert all(abs(f.stat().st_size - sizes[f]) < 4096 for f in files)
    assert not list(own_cache.rglob(".*"))
    assert sorted(f.name for f in own_cache.rglob("*.damaged")) == sorted(
        f"{f.name}.damaged" for f in files
    )


ONCE = """
from lntune.errors import LntuneError
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        assert torch.equal(lntune.layer_norm(x, (256,)), functional.layer_norm(x, (256,)))
untuned = [str(w.message) for w in caught if issubclass(w.category, lntune.UntunedWarning)]
eager = [message for message in untuned if "eager mode serves it" in message]
lntune.strict()
from lntune.log.select import Choice
Choice.measured = True
errors = []
for _ in range(2):
    try:
        lntune.layer_norm(x, (256,))
    except LntuneError as e:
        errors.append(type(e).__name__)
print(len(eager), errors, eager[0])
"""


def test_no_compiler(tmp_path: Path) -> None:
    """Without a C++ compiler and a kernel one warning says so and eager serves; strict mode raises,
    every time.
    """
    done = process(ONCE, LNTUNE_CACHE_DIR=str(tmp_path / "cache"), CXX="/nonexistent", PATH="")
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.startswith("1 ['ToolchainError', 'ToolchainError'] ")
        and "no C++ compiler found" in done.stdout
    )


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    """A cache folder below a file: one warning that names LNTUNE_CACHE_DIR, and eager serves;
    strict mode raises.
    """
    (tmp_path / "file").write_text("in the way")
    done = process(ONCE, LNTUNE_CACHE_DIR=str(tmp_path / "file" / "cache"))
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.startswith("1 ['StoreError', 'StoreError'] ")
        and "LNTUNE_CACHE_DIR" in done.stdout
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_atomic_leaves_nothing_half(tmp_path: Path) -> None:
    """A write that fails leaves neither the file nor its temporary, and the error names the file
    and the remedy.
    """
    target = tmp_path / "deep" / "kernel.so"
    with (
        pytest.raises(
            BuildError, match=r"cannot store .*kernel\.so: No space left.*LNTUNE_CACHE_DIR"
        ),
        native.atomic(target) as temporary,
    ):
        temporary.write_bytes(b"half")
        with Path("/dev/full").open("wb", buffering=0) as full:
            full.write(b"rest")
    assert list(target.parent.iterdir()) == []
    with native.atomic(target) as temporary:
        temporary.write_bytes(b"whole")
    assert [f.name for f in target.parent.iterdir()] == ["kernel.so"]
