"""Candidates that write, kill, fork and eat: each costs its trial, with words that say what it did,
and nothing of it stays.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from grids import exhaustive

from lntune.measure import frames
from lntune.measure.jobs import Outcome
from lntune.measure.worker import Worker
from lntune.system import confined, excess, processes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what Linux offers against them")

ACTS = Path(__file__).parent / "hostile" / "cpu" / "hostile.py"


class Light(Worker):
    """A worker whose child does one of the acts a job, without TVM and PyTorch."""

    program = f"""
import importlib.util, sys, types
sys.path[:] = sys.argv[3:]
sys.modules["torch"] = types.ModuleType("torch")
from lntune.measure.serving import serve
spec = importlib.util.spec_from_file_location("hostile", {str(ACTS)!r})
acts = importlib.util.module_from_spec(spec)
sys.modules["hostile"] = acts
spec.loader.exec_module(acts)
def do(content):
    getattr(acts, content.decode().strip('"'))()
    return b"done"
serve(int(sys.argv[1]), 0, do, lambda: None)
"""


@pytest.fixture(scope="module")
def worker() -> Iterator[Light]:
    """One for all acts; each that costs its trial gets the next a new child."""
    with Light() as process:
        yield process


def act(worker: Light, name: str, seconds: float = 20.0) -> Outcome | bytes:
    """What comes of an act."""
    return worker.answer(name, seconds)


def failed(worker: Light, name: str, seconds: float = 20.0) -> Outcome:
    """The outcome of an act that costs its trial. Nothing of its process stays, and the next act
    has another one.
    """
    worker.start()
    pid, folder = worker.pid, worker._scratch.folder
    outcome = act(worker, name, seconds)
    assert isinstance(outcome, Outcome)
    assert processes.marked(folder) == [] and not Path(folder).exists()
    assert act(worker, "harmless") == b"done"
    assert worker.pid != pid
    return outcome


@pytest.mark.parametrize("name", ["reads_standard_input", exhaustive("prints_without_end")])
def test_what_does_no_harm(name: str, worker: Light) -> None:
    """Its standard input is empty, and what it prints is nowhere: it costs nothing."""
    assert act(worker, "harmless") == b"done"
    pid = worker.pid
    assert act(worker, name) == b"done"
    assert worker.pid == pid


@pytest.mark.parametrize(
    "name",
    [
        *("writes_everywhere", "writes_without_end", "writes_while_it_answers"),
        exhaustive("writes_a_part"),
    ],
)
def test_what_writes_elsewhere(name: str, worker: Light) -> None:
    """Whatever it writes where answers come from is no answer."""
    outcome = failed(worker, name)
    assert outcome.status == "run"
    assert outcome.message.startswith(
        "the candidate wrote on descriptors that are not its own: its process gave "
    )
    assert len(outcome.message) < 300


def test_what_writes_later(worker: Light) -> None:
    """What is written between two trials costs neither; the next one has a new child."""
    assert act(worker, "writes_later") == b"done"
    before, pid = worker.restarts, worker.pid
    time.sleep(0.3)
    assert act(worker, "harmless") == b"done"
    assert worker.restarts == before + 1 and worker.pid != pid


MESSAGE = frames.packed(b"n" * 16, frames.ANSWER, b"content")


@pytest.mark.parametrize(
    "come",
    [
        *(b"x" + MESSAGE, b"\n", MESSAGE[:20] + b"noise" + MESSAGE[20:]),
        MESSAGE[:-3] + b"xyz" + MESSAGE[-3:],
        frames.packed(b"m" * 16, frames.ANSWER, b"content"),
        MESSAGE[:21] + b"\xff\xff\xff\xff" + MESSAGE[25:],
        MESSAGE + MESSAGE[:1] + b"x",
    ],
    ids=["before", "a line", "in the header", "within", "of another job", "too long", "behind"],
)
def test_what_is_no_message(come: bytes) -> None:
    """Garbage before, within and behind a message, an earlier job's and one without end are told
    from it; and it is taken in pieces of any size.
    """
    for size in (1, 7, len(come)):
        reader = frames.Reader(b"n" * 16)
        with pytest.raises(frames.GarbledError):
            for start in range(0, len(come), size):
                reader.feed(come[start : start + size])
                while (message := reader.message()) is not None:
                    assert message == (frames.ANSWER, b"content") and come.startswith(MESSAGE)
        reader = frames.Reader(b"n" * 16)
        for start in range(0, len(MESSAGE), size):
            assert reader.message() is None
            reader.feed(MESSAGE[start : start + size])
        assert reader.message() == (frames.ANSWER, b"content")


def test_what_closes_descriptors(worker: Light) -> None:
    """A child that cannot answer any more is ended at once."""
    outcome = failed(worker, "closes_everything")
    assert outcome.status == "run"
    assert "closed descriptors that are not its own" in outcome.message


@pytest.mark.parametrize(
    "name",
    [
        "reads_everything",
        "stops_itself",
        exhaustive("ignores_signals"),
        "holds_the_interpreter",
    ],
)
def test_what_never_ends(name: str, worker: Light) -> None:
    """Whoever stops, ignores or blocks what it can is ended in time."""
    outcome = failed(worker, name, 0.5)
    assert (outcome.status, outcome.message) == ("timeout", "no answer within 0.5 s; killed")


@pytest.mark.parametrize(
    "name",
    [
        *("kills_its_parent", "kills_its_parents_group", "kills_everybody"),
        *map(exhaustive, ("ends_its_parent", "stops_its_parent")),
    ],
)
def test_what_kills_the_tuner(name: str, worker: Light) -> None:
    """A signal to the tuner, its group or everybody ends the child that sends it, and says so."""
    outcome = failed(worker, name)
    assert outcome.status == "run"
    assert "SIGSYS: it sent a signal to a process that is not its own" in outcome.message


def test_what_kills_others(worker: Light) -> None:
    """A signal to any other process is refused; the sender's programs end as ever."""
    with Light() as other:
        other.start()
        outcome = failed(worker, "kills_its_siblings")
        assert "PermissionError" in outcome.message
        assert act(other, "harmless") == b"done"
        assert other.restarts == 0


@pytest.mark.parametrize("landlock", [True, False])
def test_what_may_be_sent(landlock: bool) -> None:
    """A process may end itself and, with Landlock, what it has started; abort ends it and its
    programs, and to ask whether there is a process is free where Landlock allows it.
    """
    code = f"""
import os, signal, subprocess, sys
sys.path[:] = {sys.path!r}
from lntune.system import confined
if not {landlock}:
    confined._scoped = lambda: False
assert confined.keep_signals()
os.kill(os.getpid(), 0)
aborted = subprocess.run([sys.executable, "-c", "import os; os.abort()"])
assert aborted.returncode == -signal.SIGABRT
started = subprocess.Popen(["sleep", "0.3"])
try:
    started.kill()
except PermissionError:
    assert not {landlock}
else:
    assert {landlock} and started.wait() == -signal.SIGKILL
os.kill(os.getpid(), signal.SIGKILL)
"""
    landlocked = confined._libc().syscall(444, None, 0, 1) >= confined._SCOPES_SINCE
    if landlock and not landlocked:
        pytest.skip("this Linux has no Landlock that keeps signals")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == -9, done.stderr


@pytest.fixture
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has 768 MiB of memory to give, of which half is to be left, and lets a job
    start 60 processes and write 256 MiB; hostile acts take 1 GiB at most.
    """

    def used() -> int:
        folders = Path(tempfile.gettempdir()).glob("lntune-scratch-*")
        pids = [os.getpid(), *(pid for folder in folders for pid in processes.marked(str(folder)))]
        held = processes.memory(pids)
        return held.own + max(held.shared, excess._used(Path("/dev/shm")))

    before = used()
    if "memory" in request.node.name:
        monkeypatch.setattr(excess, "available", lambda _: float((768 << 20) - used() + before))
    monkeypatch.setattr(excess, "TASKS", 60)
    monkeypatch.setattr(excess, "DISK_MOST", 256 << 20)
    monkeypatch.setenv("LNTUNE_TEST_MOST", str(1 << 30))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("eats_memory", "took GiB of memory, which left GiB"),
        exhaustive(("eats_shared_memory", "took GiB of memory, which left GiB")),
        exhaustive(("eats_memory_elsewhere", "took GiB of memory, which left GiB")),
        ("fills_the_disk", "wrote GiB of temporary files, which left GiB"),
        ("forks_without_end", "started processes and threads"),
        exhaustive(("starts_threads_without_end", "started processes and threads")),
    ],
)
def test_what_takes_too_much(name: str, says: str, small: None) -> None:
    """What eats memory, the disk or the table of processes is ended with all it has started, and
    told how much it had; what others take is not laid at its door.
    """
    with Light() as worker:
        outcome = failed(worker, name)
    assert outcome.status == "run"
    words = re.sub(r" [0-9.,]+", "", outcome.message)
    assert words == f"the candidate {says}; killed"
    assert list(Path("/dev/shm").glob("tmp*")) == []


@pytest.mark.parametrize("kinds", ["memory", ""], ids=["first version", "second version"])
def test_a_container_with_little_memory(
    kinds: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a control group may use still counts, its own or one above it, without what lies in
    files that nobody looks at; groups without a limit do not.
    """
    most, uses, files = excess._FIRST if kinds else excess._SECOND
    groups, proc = tmp_path / "groups", tmp_path / "proc"
    root = groups / kinds
    for folder, limit in (("", "max"), ("a", "1000"), ("a/b", str(1 << 62))):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / most).write_text(f"{limit}\n")
        (root / folder / uses).write_text("700\n")
        (root / folder / "memory.stat").write_text(f"anon 5\n{files} 200\nfile 9\n")
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text(f"5:cpu:/x\n0:{kinds}:/a/b\n")
    (proc / "meminfo").write_text("MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:       4 kB\n")
    monkeypatch.setattr(excess, "_PROC", proc)
    monkeypatch.setattr(excess, "_GROUPS", groups)
    excess._limits.cache_clear()
    limits = excess._limits()
    excess._limits.cache_clear()
    assert [(g.folder, g.limit) for g in limits] == [(root / "a", 1000.0)]
    assert excess.available(limits) == 500 and excess.available([]) == 4096
    assert excess.available([limits[0]._replace(folder=tmp_path / "gone")]) == 4096
    (proc / "meminfo").unlink()
    assert excess.available([]) == float("inf") and excess.all_tasks() == 0


def test_what_is_left(tmp_path: Path) -> None:
    """What a daemon, a library and a core dump leave is gone with the child; the files in memory
    that others hold, or are older, stay.
    """
    begun = time.time()
    names = ("torch_77_1", "cuda.shm.0.4d.1", "held", "both", "data_772")
    shared = [Path("/dev/shm", f"{name}-{tmp_path.name}-{os.getpid()}") for name in names]
    for path in shared:
        path.touch()
    with shared[3].open("rb"):
        processes.remove_shared(77, {shared[2].name, shared[3].name}, begun + 1000)
        assert all(path.exists() for path in shared)
        processes.remove_shared(77, {shared[2].name, shared[3].name}, begun - 1)
        left = [path.exists() for path in shared]
    for path in shared:
        path.unlink(missing_ok=True)
    assert left == [False, False, False, True, True]


@pytest.mark.parametrize(
    "name", ["leaves_a_daemon", "leaves_shared_memory", exhaustive("dumps_its_memory")]
)
def test_what_leaves_something(name: str, worker: Light) -> None:
    """A process in a session of its own, a file in memory: they end with the child."""
    worker.start()
    pid = worker.pid
    assert "SIGABRT" in failed(worker, name).message
    assert not Path(f"/dev/shm/torch_{pid}_1").exists()


def test_what_writes_a_long_file(worker: Light) -> None:
    """A file does not become longer than anything that is of use."""
    outcome = failed(worker, "writes_a_long_file")
    assert "File too large" in outcome.message or "SIGXFSZ" in outcome.message


def test_what_a_child_has_open() -> None:
    """No log, no lock, no terminal: its three standard files, what it reads jobs from and what it
    writes answers to.
    """
    with Light() as worker, Path(__file__).open("rb") as log:
        os.set_inheritable(log.fileno(), True)
        worker.start()
        links = [str(p.readlink()) for p in Path(f"/proc/{worker.pid}/fd").iterdir()]
        score = int(Path(f"/proc/{worker.pid}/oom_score_adj").read_text())
        assert Path(f"/proc/{worker.pid}/stat").read_text().split()[6] == "0"  # no terminal
    kinds = sorted(link.partition(":")[0] for link in links)
    assert kinds == ["/dev/null", "/dev/null", "pipe", "pipe", "pipe"]
    assert score == 1000
