"""Kernels are checked before they serve: what is wrong, whoever made it, never reaches a result; a
check is made once for each machine; and the user's program does not notice it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_broken_schedules import forget, won
from torch.nn import functional

import lntune
from lntune import backends, check, device, schedule
from lntune.case import Case
from lntune.check import problems, short
from lntune.commands import build
from lntune.commands import check as check_command
from lntune.commands.doctor import folders, looked
from lntune.kernels import cache, compiler, verdicts
from lntune.report import builds as builds_report
from lntune.system import paths, scratch, sealed
from lntune.torch import apart, dispatch, explanation, first_check
from lntune.torch.first_check import WrongKernelError, WrongKernelWarning

pytestmark = pytest.mark.filterwarnings("ignore::lntune.UntunedWarning")

CASE = Case("layer_norm", 48, "float32", 8, "plain")
HERE = device.current()
CPU = backends.of(HERE)
X = torch.randn(8, 48)
MINE = """
from dataclasses import dataclass
from lntune import ops
from lntune.knobs import knob
from lntune.schedule import Schedule
from lntune.transforms.cpu import alignment, row_sums

@dataclass(frozen=True)
class Knobs:
    scale: int = knob(0, (0, 1), "thousandths that sums are too large")

def default(case, device):
    return Knobs({default})

def valid(knobs, case, device):
    return None

def apply(case, knobs, device):
    import tvm
    from tvm import tirx

    def row_sum(rows, hidden, expressions, name):
        factor = tirx.const(1 + knobs.scale / 1000, "float32")
        return [
            lambda i, s=s: s(i) * factor
            for s in row_sums.plain_sum(rows, hidden, expressions, name)
        ]

    made = ops.get(case.op).define(case, row_sum)
    func = alignment.element_aligned(made).with_attr("global_symbol", "main")
    return tvm.IRModule({{"main": func}})

SCHEDULES = (Schedule("mine", "layer_norm", "cpu", Knobs, default, valid, apply, version=1),)
"""
CODE = """
import torch, lntune, warnings
from torch.nn import functional
x = torch.randn(8, 48)
torch.testing.assert_close(lntune.layer_norm(x, (48,)), functional.layer_norm(x, (48,)))
"""


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Nothing that a test has found wrong outlives it."""
    verdicts._here.clear()
    lntune.reload()
    yield
    lntune.strict(False)
    verdicts._here.clear()
    forget()


@pytest.fixture
def mine(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[int], list[str]]]:
    """`mine(default)` puts a schedule into the user's folder that is wrong with `scale` 1; the
    answer gets a line for each kernel that is built of it.
    """
    file = tmp_path / "schedules" / "cpu" / "mine.py"
    file.parent.mkdir(parents=True)
    builds: list[str] = []
    to_file = compiler.to_file

    def counted(case: Case, plan: Any, setting: Any, *rest: Any) -> None:
        builds.append(f"{plan.name} {setting}")
        to_file(case, plan, setting, *rest)

    monkeypatch.setattr(compiler, "to_file", counted)

    def put(default: int = 0) -> list[str]:
        file.write_text(MINE.format(default=default))
        monkeypatch.setenv("LNTUNE_SCHEDULES", str(tmp_path / "schedules"))
        forget()
        return builds

    yield put


def right(x: torch.Tensor = X) -> bool:
    """True where a call gives what PyTorch gives."""
    y = lntune.layer_norm(x, x.shape[-1:])
    return torch.allclose(y, functional.layer_norm(x, x.shape[-1:]), rtol=1e-5, atol=1e-5)


def said(call: Callable[[], object]) -> list[str]:
    """What is said of wrong kernels while something is called."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if issubclass(w.category, WrongKernelWarning)]


def another_process() -> None:
    """What a new process has: nothing but what is on the disk."""
    verdicts._here.clear()
    lntune.reload()


def checks(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """A list that gets the case of each check from now on."""
    made: list[Case] = []
    original = type(CPU).verify_shortly

    def verify(self: Any, case: Case, *rest: Any) -> Any:
        made.append(case)
        return original(self, case, *rest)

    monkeypatch.setattr(type(CPU), "verify_shortly", verify)
    return made


# What is wrong does not serve.


def test_a_record_whose_kernel_is_wrong(
    mine: Callable[[int], list[str]], log_dir: Path, own_cache: Path
) -> None:
    """Another serves from the first call on; it is said once, with what is wrong and the command
    that helps; the file is put aside with the reason beside it, and no later process builds it.
    """
    builds = mine(0)
    won(log_dir, "mine", {"scale": 1})
    forget()
    (message,) = said(lambda: [right() or pytest.fail("wrong") for _ in range(3)])
    assert "mine (scale=1) is wrong" in message and "times what is allowed" in message
    assert "lntune check layer_norm --hidden 48 --dtype float32 --rows 8" in message
    folder = own_cache / "kernels" / "layer_norm"
    (aside,) = folder.glob("*.wrong")
    assert aside.name in message and not aside.with_suffix("").exists()
    (reason,) = (f for f in folder.glob("*.checked") if '"ok": false' in f.read_text())
    assert reason.name.startswith(aside.stem) and "scale=1" in reason.read_text()
    choice = dispatch.choose(CASE)
    assert (choice.tier, choice.schedule) == ("default", "cached_rows")
    assert any("its kernel is wrong" in step for step in choice.steps)
    assert builds.count("mine Knobs(scale=1)") == 1

    another_process()
    (again,) = said(lambda: right() or pytest.fail("wrong"))
    assert "mine (scale=1) is wrong" in again and "put aside" in again
    assert builds.count("mine Knobs(scale=1)") == 1
    assert any("its kernel is wrong" in step for step in dispatch.choose(CASE).steps)
    lntune.strict()
    with pytest.raises(WrongKernelError, match=r"mine"):
        lntune.layer_norm(X, (48,))


def test_default_knobs_that_are_wrong(
    mine: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no other schedule fits, eager mode serves; strict mode raises at once."""
    mine(1)
    only = {"mine": schedule.get("mine")}
    monkeypatch.setattr(schedule, "for_op", lambda op, kind: only)
    (message,) = said(lambda: right() or pytest.fail("wrong"))
    assert "mine (scale=1) is wrong" in message
    assert dispatch.kernel_for(CASE) is None and dispatch.choose(CASE).tier == "eager"
    verdicts.clear(cache.path_of(CASE, *schedule.resolve("mine", "layer_norm", {"scale": 1}), HERE),
                   verdicts.environment(HERE))  # fmt: skip
    with lntune.strict(), pytest.raises((WrongKernelError, lntune.NotTunedError)):
        lntune.layer_norm(X, (48,))


def test_a_file_exchanged_for_that_of_another_kernel(own_cache: Path) -> None:
    """A sound kernel under another's name is not loaded: it is put aside and the right one
    built.
    """
    plan = schedule.get("cached_rows")
    other = Case("layer_norm", 48, "float32", 1, "plain")
    paths_ = [cache.prepare(c, plan, plan.default(c.typical, HERE), HERE) for c in (CASE, other)]
    assert paths_[0] != paths_[1]

    def exchange() -> None:
        # not written in place: a file that this process has loaded loses its pages by that
        new = paths_[0].with_suffix(".new")
        new.write_bytes(paths_[1].read_bytes())
        new.replace(paths_[0])

    exchange()
    with pytest.warns(sealed.DamagedWarning, match=r"is the kernel of something else: .*damaged"):
        assert right()
    with warnings.catch_warnings():
        warnings.simplefilter("error", sealed.DamagedWarning)
        another_process()
        assert right() and dispatch.kernel_for(CASE) is not None
    exchange()
    with pytest.warns(sealed.DamagedWarning, match="something else"):
        cache.prepare(CASE, plan, plan.default(CASE.typical, HERE), HERE)


def test_a_kernel_that_raises(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is wrong, and eager mode serves where nothing else does."""

    def broken(*_: Any) -> None:
        raise ValueError("not today")

    monkeypatch.setattr(type(CPU), "load", lambda *_: broken)
    messages = said(lambda: right() or pytest.fail("wrong"))
    assert messages and all("raises ValueError: not today" in m for m in messages)
    assert dispatch.kernel_for(CASE) is None


def test_too_little_memory_is_no_verdict(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check for which there is no memory says nothing of the kernel: eager mode serves, and it is
    tried again.
    """

    def full(*_: Any) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(check.problems, "_problem", full)
        with pytest.warns(lntune.UntunedWarning, match="cannot be checked.*tried again later"):
            assert right()
    assert not list(own_cache.glob("kernels/*/*.checked"))
    lntune.reload()
    assert right() and dispatch.kernel_for(CASE) is not None


# Once for each machine.


def test_a_check_is_made_once(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process takes its verdict; another environment, or another file, makes one anew."""
    made = checks(monkeypatch)
    assert right() and right() and len(made) == 1
    (note,) = own_cache.glob("kernels/layer_norm/*.checked")
    another_process()
    assert right() and len(made) == 1
    real = verdicts.environment
    with monkeypatch.context() as patch:
        patch.setattr(verdicts, "environment", lambda d: {**real(d), "torch": "of tomorrow"})
        another_process()
        assert right() and len(made) == 2
    assert len(list(note.parent.glob("*.checked"))) == 2
    note.write_text("{half")
    another_process()
    assert right() and len(made) == 3
    assert "found right on this machine" in first_check.state(CASE, dispatch.choose(CASE), HERE)
    assert "not checked on this machine yet" in lntune.explain("layer_norm", 48, rows=8).steps[-1]


def test_without_checks(mine: Callable[[int], list[str]], log_dir: Path, own_cache: Path,
                        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """LNTUNE_CHECK=0 has kernels serve as they come, right or wrong, and keeps no verdicts."""
    mine(0)
    won(log_dir, "mine", {"scale": 1})
    monkeypatch.setenv("LNTUNE_CHECK", "0")
    forget()
    assert not right()
    assert not list(own_cache.glob("kernels/*/*.checked"))


@pytest.mark.parametrize("scale", [0, 1])
def test_a_cache_that_cannot_be_written(
    scale: int, mine: Callable[[int], list[str]], log_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verdict is then this process's, for as long as it lasts."""
    mine(0)
    won(log_dir, "mine", {"scale": scale})
    forget()
    whole = scratch.whole

    def refuse(path: Path, closed: bool = False) -> Any:
        if path.suffix == verdicts.SUFFIX:
            raise OSError(30, "Read-only file system")
        return whole(path, closed)

    monkeypatch.setattr(scratch, "whole", refuse)
    made = checks(monkeypatch)
    messages = said(lambda: right() or pytest.fail("wrong"))
    assert len(messages) == scale and all("cannot be noted" in m for m in messages)
    before = len(made)
    lntune.reload()
    assert right() and len(made) == before


def start(code: str, **env: str) -> subprocess.Popen[str]:
    """Python code in a process of its own."""
    path = os.pathsep.join([str(paths.PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **env},
    )


def test_processes_at_once_and_one_that_is_killed(own_cache: Path) -> None:
    """Killed in the middle of a check, a process leaves nothing; two at once both serve, and leave
    one verdict.
    """
    killed = start(
        f"""
        import os, signal
        from lntune.backends.cpu.backend import Cpu
        Cpu.verify_shortly = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        {CODE.replace(chr(10), chr(10) + 8 * " ")}
        """
    )
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert not list(own_cache.glob("kernels/*/*.checked*"))
    both = [start(CODE) for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    (note,) = own_cache.glob("kernels/*/*.checked")
    assert '"ok": true' in note.read_text()
    assert not [f for f in note.parent.iterdir() if f.name.startswith(".")]


# Nobody notices.


def state() -> list[Any]:
    """What a check may not change."""
    return [
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.empty(0).device,
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        (torch.full((1,), 1e-40, device="cpu") * 0.5).item(),
        list(warnings.filters),
    ]


@contextlib.contextmanager
def flushed() -> Iterator[None]:
    """Denormal numbers are zero."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def defaults(dtype: torch.dtype, deterministic: bool) -> Iterator[None]:
    """Other defaults of PyTorch's."""
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": lambda: defaults(torch.float64, False),
    "deterministic": lambda: defaults(torch.float32, True),
    "meta": lambda: torch.device("meta"),
    "flushed": flushed,
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_of_the_users(mode: str, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is in force, the kernel is found right, and all is as before."""
    plan = schedule.get("cached_rows")
    monkeypatch.setattr(verdicts, "note", lambda *_: "")
    monkeypatch.setattr(verdicts, "of", lambda *_: None)
    made = checks(monkeypatch)
    with MODES[mode]():
        before = state()
        first_check.kernel(CASE, plan, plan.default(CASE.typical, HERE), HERE)
        assert state() == before
    assert made == [CASE]


def test_a_call_that_is_compiled(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first call checks, and the code that torch.compile makes is one graph."""
    made = checks(monkeypatch)
    called = torch.compile(lambda x: lntune.layer_norm(x, (48,)), fullgraph=True, backend="eager")
    y = called(X)
    assert torch.allclose(y, functional.layer_norm(X, (48,)), atol=1e-5)
    assert len(made) == 1


def test_while_a_graph_is_recorded(
    own_cache: Path, log_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not checked does not serve a recording: eager mode does, which is said; after it the
    kernel is checked, and later recordings have it.
    """
    monkeypatch.setattr(type(CPU), "recording", lambda _: True)
    with pytest.warns(lntune.UntunedWarning, match="not checked yet.*call it once before"):
        assert right()
    assert dispatch.kernel_for(CASE) is None
    assert not list(own_cache.glob("kernels/*/*"))
    plan = schedule.get("cached_rows")
    with pytest.raises(first_check.RecordingError, match="call it once before"):
        first_check.kernel(CASE, plan, plan.default(CASE.typical, HERE), HERE)
    lntune.reload()
    with monkeypatch.context() as patch:
        patch.setattr(type(CPU), "recording", lambda _: False)
        assert right() and dispatch.kernel_for(CASE) is not None
    another_process()
    assert dispatch.kernel_for(CASE) is not None


def test_pytorchs_function_replaced_by_ours(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check, which compares with PyTorch's function, then neither waits for itself nor
    fails.
    """
    original = functional.layer_norm
    monkeypatch.setattr(functional, "layer_norm", lntune.layer_norm)
    done: list[torch.Tensor] = []
    caller = threading.Thread(target=lambda: done.append(lntune.layer_norm(X, (48,))), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        caller.start()
        caller.join(60)
    monkeypatch.undo()
    assert not caller.is_alive()
    assert done == [] or torch.allclose(done[0], original(X, (48,)), atol=1e-5)


def test_an_interrupt_in_the_middle(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends the call and not the check; the next call is served as if nothing had been."""
    wait = threading.Event()

    def interrupted(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        wait.wait(30)
        return short.Shortly("", 0.0)

    with monkeypatch.context() as patch:
        patch.setattr(type(CPU), "verify_shortly", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lntune.layer_norm(X, (48,))
    wait.set()
    assert not list(own_cache.glob("kernels/*/*.checked"))
    assert right() and dispatch.kernel_for(CASE) is not None


def test_a_thread_apart() -> None:
    """Its result and its errors come through, and it knows what it is."""
    assert apart.run(lambda: (apart.here(), torch.is_grad_enabled())) == (True, True)
    assert not apart.here()
    with pytest.raises(ZeroDivisionError):
        apart.run(lambda: 1 // 0)


def test_a_thread_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels are compared with is made by one thread, and kernels run on as many as the
    caller's, whatever another thread has set; nobody else's number changes.
    """

    def elsewhere(work: Callable[[], Any]) -> Any:
        """What a thread that begins now gives."""
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(work).result()

    made: list[tuple[int, int]] = []
    called: list[int] = []
    solved, before = problems.solved, torch.get_num_threads()

    def seen(*of: Any) -> Any:
        made.append((torch.get_num_threads(), elsewhere(torch.get_num_threads)))
        return solved(*of)

    kernel = wrong(lambda x, y: called.append(torch.get_num_threads()))
    monkeypatch.setattr(problems, "solved", seen)
    torch.set_num_threads(3)
    try:
        elsewhere(lambda: torch.set_num_threads(2))
        outcome = apart.run(lambda: CPU.verify_shortly(CASE, HERE, kernel))
        assert outcome.message == ""
        assert set(made) == {(1, 2)} and set(called) == {3}
        assert (torch.get_num_threads(), elsewhere(torch.get_num_threads)) == (3, 2)
    finally:
        torch.set_num_threads(before)


# What it finds.


def wrong(change: Callable[[torch.Tensor, torch.Tensor], None]) -> Callable[..., None]:
    """A layer norm that is right but for `change(x, y)`."""

    def kernel(x: torch.Tensor, eps: float, y: torch.Tensor) -> None:
        y.copy_(functional.layer_norm(x, x.shape[-1:], eps=eps))
        change(x, y)

    return kernel


def _set(y: torch.Tensor, where: Any) -> None:
    y[where] = 0.5


WRONG: dict[str, Callable[..., None]] = {
    "the last row": wrong(lambda x, y: _set(y, -1)),
    "rows from 21 on": wrong(lambda x, y: _set(y, slice(21, None))),
    "even rows": wrong(lambda x, y: _set(y, -1) if len(y) % 2 == 0 else None),
    "the last element": wrong(lambda x, y: _set(y, (slice(None), -1))),
    "infinities": wrong(lambda x, y: y.nan_to_num_(nan=0.0)),
    "x": wrong(lambda x, y: x.zero_()),
    "beyond": wrong(lambda x, y: y.as_strided((1,), (1,), y.storage_offset() + y.numel()).zero_()),
    "eps": lambda x, eps, y: y.copy_(functional.layer_norm(x, x.shape[-1:], eps=1e-5)),
    "one pass": lambda x, eps, y: y.copy_(
        (x - x.mean(-1, keepdim=True))
        * ((x * x).mean(-1, keepdim=True) - x.mean(-1, keepdim=True) ** 2 + eps).rsqrt()
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_it_finds(what: str) -> None:
    """Rows left out, other elements, infinities taken for numbers, inputs changed, writes behind a
    tensor, another eps, a variance in one pass.
    """
    assert CPU.verify_shortly(CASE, HERE, WRONG[what]).message
    assert not CPU.verify_shortly(CASE, HERE, wrong(lambda x, y: None)).message


@pytest.mark.parametrize("hidden", [1, 2, 7, 5000, 65536])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_eager_mode_is_right(hidden: int, dtype: str) -> None:
    """What PyTorch gives is never found wrong."""
    case = Case("layer_norm", hidden, dtype, 8, "plain")
    assert CPU.verify_shortly(case, HERE, wrong(lambda x, y: None)).message == ""
    assert CPU.verify_shortly(case, HERE, wrong(lambda x, y: None), True).message == ""


def test_rows_of_a_short_check() -> None:
    """The most that a limit of elements leaves, and few that are even."""
    assert short.rows_within((2, 3, 4, 6, 7, 67), 48) == (6, 67)
    assert short.rows_within((2, 3, 4, 6, 7, 67), 1 << 14) == (4, 6)
    assert short.rows_within((), 48) == ()


# What says it.


def test_build_and_check_keep_verdicts(
    mine: Callable[[int], list[str]], log_dir: Path, own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """`lntune build` checks what it builds, so that no call has to, and where it is wrong builds
    the next choice and says both; `lntune check` checks anew what was found wrong before; `lntune
    doctor` names it.
    """
    builds = mine(0)
    made = checks(monkeypatch)
    built = build.build_case(CASE, HERE)
    assert (built.status, built.checked, len(made)) == ("built", True, 1)
    another_process()
    assert right() and len(made) == 1
    Path(built.path).unlink()
    won(log_dir, "mine", {"scale": 1})
    forget()
    with pytest.warns(WrongKernelWarning):
        built = build.build_case(CASE, HERE)
    assert (built.status, built.schedule, built.checked) == ("built", "cached_rows", True)
    (wrong,) = built.wrong
    assert "mine (scale=1): its kernel is wrong: y: error" in wrong
    assert f"{CASE.typical} is served by another: {wrong}" in builds_report.lines([built], None)
    another_process()
    with pytest.warns(WrongKernelWarning):
        again = build.build_case(CASE, HERE)
    assert (again.status, again.wrong) == ("there", built.wrong)
    another_process()
    (result,) = check_command.check_cases([CASE])
    assert builds.count("mine Knobs(scale=1)") == 2 and result.schedule == "cached_rows"
    (finding,) = looked("kernel checks", folders._checks)
    assert finding.status == "warn" and "1 wrong and not used: " in finding.detail


def test_why_names_other_kernels(own_cache: Path) -> None:
    """`lntune why` says which kernels beside that of contiguous rows in the default variant were
    found right, and which wrong; in short, and as data.
    """

    def others() -> tuple[explanation.Other, ...]:
        return lntune.explain("layer_norm", 48, rows=8).others

    assert others() == ()
    weight = torch.ones(48)
    lntune.layer_norm(X, (48,), weight)
    assert [(o.name, o.right, o.wrong) for o in others()] == [("weight", True, ())]
    wide = torch.randn(8, 96)[:, :48]
    lntune.layer_norm(wide, (48,))
    case = Case("layer_norm", 48, "float32", 8, "weight")
    choice = dispatch.choose(case)
    said(lambda: first_check.refuse(case, choice, HERE, "wrong from row 1000 on"))
    another_process()
    (message,) = said(others)
    assert "wrong from row 1000 on" in message
    plain, other = others()
    assert (plain.name, plain.right, plain.wrong) == ("plain, rows apart", True, ())
    assert (other.name, other.right) == ("weight", False)
    assert other.knobs != choice.knobs
    (wrong,) = other.wrong
    assert wrong.endswith("its kernel is wrong: wrong from row 1000 on")
    text = str(lntune.explain("layer_norm", 48, rows=8))
    assert "  - found right, too: plain, rows apart\n" in text
    assert f"  - weight: {wrong}\n" in text


def test_a_thorough_check_refuses(own_cache: Path) -> None:
    """What `lntune check` finds wrong serves no later process, though a short check found it
    right.
    """
    assert right()
    choice = dispatch.choose(CASE)
    (message,) = said(lambda: first_check.refuse(CASE, choice, HERE, "wrong from row 1000 on"))
    assert "wrong from row 1000 on" in message
    another_process()
    (message,) = said(lambda: right() or pytest.fail("wrong"))
    assert "wrong from row 1000 on" in message
    assert dispatch.choose(CASE).knobs != choice.knobs
