"""How a part of tools/gpu_pass.sh is run: cut off anywhere it loses nothing and goes on, it keeps
its time, and looks for the reason where the first kernel is wrong. Nothing is built or measured.
"""

from __future__ import annotations

import json
import signal
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from grids import thinned

from lntune.backends import device_of
from lntune.backends.cuda import locate
from lntune.commands.gpu_pass import plan, programs, run, works
from lntune.commands.gpu_pass.book import Book, unpack
from lntune.commands.gpu_pass.jobs import Answer, Compare, Copy, Find, Job
from lntune.commands.gpu_pass.parts import NUMBERS, Parts
from lntune.commands.gpu_pass.run import ENDING, Runner, Step, Work
from lntune.errors import InputError
from lntune.system import toolchain

GPU = device_of("nvidia/nvidia-h200")
EACH = 5.0
"""Seconds that every work takes here."""


class Clock:
    """A clock that works move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Hands:
    """Hands that answer at once, and let the clock say that it took EACH. `answers` are by what is
    in a work's job or words; with `interrupted` that many works are done before a signal comes.
    """

    def __init__(
        self,
        clock: Clock,
        answers: dict[str, Answer] | None = None,
        interrupted: int | None = None,
    ) -> None:
        self.clock, self.answers, self.interrupted = clock, answers or {}, interrupted
        self.done: list[str] = []
        self.words: list[tuple[str, ...]] = []

    def do(self, job: Job, seconds: float) -> Answer:
        if isinstance(job, Find):
            return Answer("ok", "", msgspec.to_builtins({"device": GPU, "sizes": plan.FULL}))
        return self._answer(repr(job), seconds)

    def run(self, words: tuple[str, ...], seconds: float, output: Path) -> Answer:
        self.words.append(words)
        return self._answer(" ".join(words), seconds)

    def _answer(self, what: str, seconds: float) -> Answer:
        if self.interrupted is not None and len(self.done) >= self.interrupted:
            raise KeyboardInterrupt
        self.done.append(what)
        self.clock.now += min(EACH, seconds)
        if seconds < EACH:
            return Answer("late", f"no answer within {seconds} s")
        return next((a for text, a in self.answers.items() if text in what), Answer("ok"))


def copies(numbers: Any, most: float = 20.0) -> tuple[Work, ...]:
    """Works that are told apart by a number."""
    return tuple(Work(f"work {n}", most, Copy(GPU, n, 1.0)) for n in numbers)


def small(_book: Book, _hands: run.Hands) -> Iterator[Step]:
    """A part of three steps with three works each."""
    for number in range(3):
        yield Step(f"step {number}", 900, copies(range(3 * number, 3 * number + 3)))


def minutes_for(count: int) -> float:
    """Minutes in which so many works are done, and no more."""
    return (ENDING + EACH * count + 1) / 60


def archived(archive: Path) -> list[dict[str, Any]]:
    """The results in an archive."""
    with tarfile.open(archive) as tar:
        file = tar.extractfile("results.jsonl")
        assert file is not None
        return [json.loads(line) for line in file.read().splitlines() if line.endswith(b"}}")]


def keys(lines: list[dict[str, Any]]) -> list[str]:
    """What was done to its end, by name."""
    return [line["key"] for line in lines if line["answer"]["status"] != "cut"]


def part(
    folder: Path, of: run.Part, minutes: float, hands: Hands, number: int = 1
) -> tuple[bool, list[dict[str, Any]]]:
    """Run a part; whether all is done, and what its archive has."""
    (folder / "out").mkdir(exist_ok=True)
    archive = folder / "out" / f"part{number}.tar.gz"
    runner = Runner(Book(folder / "work"), hands, minutes, archive, hands.clock)
    done = runner.run(of)
    assert all(path.name.startswith("part") for path in archive.parent.iterdir())
    return done, archived(archive)


@pytest.mark.parametrize("count", range(9))
def test_the_time_is_over_anywhere(count: int, tmp_path: Path) -> None:
    """A part ends by itself in its time, with what it did in the archive, and the next run does the
    rest, each work once.
    """
    clock = Clock()
    done, lines = part(tmp_path, small, minutes_for(count), Hands(clock))
    assert clock.now <= 60 * minutes_for(count)
    assert not done and len(keys(lines)) == count
    rest = Hands(Clock())
    done, lines = part(tmp_path, small, 9, rest)
    assert done and sorted(keys(lines)) == [f"work {n}" for n in range(9)]
    assert len(rest.done) == 9 - count


@pytest.mark.parametrize("count", range(9))
def test_a_signal_anywhere(count: int, tmp_path: Path) -> None:
    """SIGTERM and Ctrl-C leave an archive of what was done until then, and the next run goes on."""
    with pytest.raises(KeyboardInterrupt):
        part(tmp_path, small, 9, Hands(Clock(), interrupted=count))
    if count:
        assert len(archived(tmp_path / "out" / "part1.tar.gz")) == count
    done, lines = part(tmp_path, small, 9, Hands(Clock()))
    assert done and sorted(keys(lines)) == [f"work {n}" for n in range(9)]


@pytest.mark.parametrize("cut", [1, 20, -5])
def test_killed_while_it_wrote(cut: int, tmp_path: Path) -> None:
    """A line that was cut short is as if it had not been written, and spoils no other."""
    part(tmp_path, small, minutes_for(4), Hands(Clock()))
    path = tmp_path / "work" / "results.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole[:3]) + whole[3][:cut])
    hands = Hands(Clock())
    done, _ = part(tmp_path, small, 9, hands)
    assert done and len(hands.done) == 6
    again = Hands(Clock())
    assert part(tmp_path, small, 9, again)[0] and not again.done


def test_who_took_too_long(tmp_path: Path) -> None:
    """What does not answer in its own time is late, and fails the part; what the end of the part
    cut off is neither.
    """

    def slow(_book: Book, _hands: run.Hands) -> Iterator[Step]:
        yield Step("slow", 900, (*copies([0], 4.0), *copies([1, 2])))

    done, lines = part(tmp_path, slow, (ENDING + 4 + EACH + 4) / 60, Hands(Clock()))
    assert not done
    assert [(line["key"], line["answer"]["status"]) for line in lines] == [
        ("work 0", "late"),
        ("work 1", "ok"),
        ("work 2", "cut"),
    ]


def test_a_program_that_needs_its_time(tmp_path: Path) -> None:
    """What would not come far in the time that is left is left for another run; what is behind it
    is not.
    """

    def uneven(_book: Book, _hands: run.Hands) -> Iterator[Step]:
        long = Work("long", 600, words=("program", run.LEFT), resumed=True, least=60)
        yield Step("one", 900, (*copies([0]), long, *copies([1])))

    hands = Hands(Clock())
    done, lines = part(tmp_path, uneven, 1.0, hands)
    assert not done and keys(lines) == ["work 0", "work 1"]
    hands = Hands(Clock())
    done, lines = part(tmp_path, uneven, 9.0, hands)
    assert done and keys(lines)[2:] == ["long"]
    assert hands.words == [("program", str(9 * 60 - 3 * int(ENDING)))]


def test_what_failed_is_done_again(tmp_path: Path) -> None:
    """Another run of a part does again what did not go well before, not what did."""
    first = Hands(Clock(), {"bytes=4": Answer("wrong", "dx: 3 times what is allowed")})
    done, _ = part(tmp_path, small, 9, first)
    assert not done and len(first.done) == 9
    assert "dx: 3 times what is allowed" in (tmp_path / "work" / "log.txt").read_text()
    again = Hands(Clock())
    done, _ = part(tmp_path, small, 9, again)
    assert done and len(again.done) == 1 and "bytes=4" in again.done[0]


def test_a_step_leaves_time_for_others(tmp_path: Path) -> None:
    """A step that would take all the time has its share first, and what is left at the end."""

    def uneven(_book: Book, _hands: run.Hands) -> Iterator[Step]:
        yield Step("long", 20, copies(range(200)))
        yield Step("short", 20, copies([200, 201]))

    hands = Hands(Clock())
    _, lines = part(tmp_path, uneven, 1.0, hands)
    steps = [line["step"] for line in lines]
    assert steps.count("short") == 0 and hands.clock.now <= 60
    hands = Hands(Clock())
    _, lines = part(tmp_path, uneven, 9.0, hands)
    assert [line["key"] for line in lines if line["step"] == "short"] == ["work 200", "work 201"]
    assert lines[-1]["step"] == "long" and 9 * 60 - ENDING - EACH <= hands.clock.now <= 9 * 60


# --------------------------------------------------------------------------------------------------
# the parts themselves


@pytest.fixture
def a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """All programs are there, all kernels are built, TVM is installed."""
    monkeypatch.setattr(locate, "program", lambda name: f"/bin/{name}")
    monkeypatch.setattr(works, "missing", lambda listed, device: [])
    monkeypatch.setattr(toolchain, "incompatible", list)


def parts(folder: Path) -> Parts:
    """Those of a GPU, in a checkout without tests."""
    (folder / "tests").mkdir(exist_ok=True)
    return Parts("cuda", folder, folder / "work" / "tuning_logs")


def steps_of(lines: list[dict[str, Any]]) -> list[str]:
    """The steps in order."""
    return list(dict.fromkeys(line["step"] for line in lines))


FIRST = [
    *("facts", "first", "checks", "doctor", "yardsticks", "defaults"),
    *("knobs", "profile", "sequence", "few rows"),
]


@pytest.mark.usefixtures("a_machine")
def test_the_first_part(tmp_path: Path) -> None:
    """The cheapest and most telling first: facts, one kernel against float64, seven others, the
    yardsticks, then speed: six sizes in two dtypes, forward and backward, beyond the cache.
    """
    hands = Hands(Clock())
    done, lines = part(tmp_path, parts(tmp_path).first, 30, hands)
    assert done and steps_of(lines) == FIRST
    of = {step: [line["key"] for line in lines if line["step"] == step] for step in FIRST}
    assert len(of["first"]) == 1 and len(of["checks"]) == 7
    assert [k for k in of["yardsticks"] if k.startswith("copy")] == [
        f"copy of {n << 20} bytes" for n in (64, 256, 4096)
    ]
    assert {"empty_node", "cluster_barrier", "distributed_shared", "l2_flag"} <= set(
        of["yardsticks"]
    )
    assert sum("32768x" in key for key in of["defaults"]) == len(of["defaults"]) == 24 + 2
    assert len(of["knobs"]) >= 8 and len(of["profile"]) == 2 and len(of["sequence"]) == 4
    assert all("4096x" in key for key in of["few rows"])
    profiled = [words for words in hands.words if words[0] == "/bin/ncu" and len(words) > 2]
    assert all(words[1:3] == ("--clock-control", "none") for words in profiled)
    assert sum(len(json.loads(words[-1])) for words in profiled) == 8


@pytest.mark.usefixtures("a_machine")
@pytest.mark.parametrize(
    ("number", "count"),
    thinned(
        (number, count) for number in NUMBERS for count in range(0, {1: 64, 2: 8, 3: 32}[number], 7)
    ),
)
def test_parts_that_are_cut(number: int, count: int, tmp_path: Path) -> None:
    """Each part, cut off after any number of works, ends in its time with these in the archive, and
    goes on from there: from the folder, or on another machine from the archive alone.
    """
    clock = Clock()
    part(tmp_path, parts(tmp_path).numbered(number), minutes_for(count), Hands(clock), number)
    assert clock.now <= 60 * minutes_for(count)
    archive = tmp_path / "out" / f"part{number}.tar.gz"
    before = keys(archived(archive))
    assert len(before) <= count
    other = tmp_path / "other"
    other.mkdir()
    unpack(archive, other / "work")
    for folder in (tmp_path, other):
        hands = Hands(Clock())
        of = parts(folder).numbered(number)
        done, lines = part(folder, of, 60, hands, number)
        assert done, [line for line in lines if line["answer"]["status"] != "ok"]
        assert len(keys(lines)) == len(before) + len(hands.done)
        assert len({(line["step"], line["key"]) for line in lines}) == len(keys(lines))


@pytest.mark.usefixtures("a_machine")
@pytest.mark.parametrize("status", ["wrong", "failed", "late"])
def test_a_first_kernel_that_is_wrong(status: Any, tmp_path: Path) -> None:
    """Where the first kernel is wrong, crashes or hangs, compute-sanitizer has the rest of the
    part, with that kernel; nothing is timed.
    """
    first, job = next(works.compared(GPU, plan.FULL))
    hands = Hands(Clock(), {repr(job): Answer(status, "y: 1e+05 times what is allowed")})
    done, lines = part(tmp_path, parts(tmp_path).first, 30, hands)
    assert not done and steps_of(lines) == ["facts", "first", "sanitizer"]
    tools = [words for words in hands.words if "check" in words]
    assert [words[words.index("--tool") + 1] for words in tools] == list(works.TOOLS)
    assert all(job.case.op in words[-1] and str(job.case.hidden) in words[-1] for words in tools)
    assert first.key in (tmp_path / "work" / "log.txt").read_text()


@pytest.mark.usefixtures("a_machine")
def test_another_kernel_that_is_wrong(tmp_path: Path) -> None:
    """It is said, and the rest is measured all the same."""
    job = [job for _, job in works.compared(GPU, plan.FULL)][3]
    hands = Hands(Clock(), {repr(job): Answer("wrong", "dx")})
    done, lines = part(tmp_path, parts(tmp_path).first, 30, hands)
    assert not done and steps_of(lines) == FIRST


@pytest.mark.usefixtures("a_machine")
def test_kernels_that_were_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are built where TVM is; where it is not, the part says how to build them beforehand."""
    monkeypatch.setattr(works, "missing", lambda listed, device: ["some"])
    hands = Hands(Clock())
    done, lines = part(tmp_path, parts(tmp_path).first, 9, hands)
    assert not done and steps_of(lines) == ["facts", "kernels"]
    assert hands.words[-1][3:5] == ("build", "--gpu-pass")
    monkeypatch.setattr(toolchain, "incompatible", lambda: ["apache-tvm is not installed"])
    _, lines = part(tmp_path, parts(tmp_path).first, 9, Hands(Clock()))
    assert "lntune build --gpu-pass --target cuda" in (tmp_path / "work" / "log.txt").read_text()


@pytest.mark.usefixtures("a_machine")
def test_the_other_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second tests and begins a bringup with the time that is left; the third goes on with it,
    compiles, and looks for races in a backward of several rows a block. Both need TVM.
    """
    second, third = Hands(Clock()), Hands(Clock())
    _, lines = part(tmp_path, parts(tmp_path).second, 9, second, 2)
    assert steps_of(lines) == ["facts", "doctor", "tests", "bringup"]
    bringup = next(words for words in second.words if "bringup" in words)
    budget = int(bringup[bringup.index("--budget") + 1].removesuffix("s"))
    assert 60 < budget < 9 * 60 - 2 * ENDING
    assert bringup[bringup.index("--log-dir") + 1] == str(tmp_path / "work" / "tuning_logs")
    _, lines = part(tmp_path, parts(tmp_path).third, 30, third, 3)
    assert steps_of(lines)[-4:] == ["bringup on", "compile", "racecheck", "rest"]
    raced = [words for words in third.words if "racecheck" in words]
    assert raced and all(
        json.loads(words[-1])[0]["rows"] > 3 * GPU.cores and "backward" in words[-1]
        for words in raced
    )
    monkeypatch.setattr(toolchain, "incompatible", lambda: ["apache-tvm is not installed"])
    done, _ = part(tmp_path, parts(tmp_path).second, 9, Hands(Clock()), 2)
    assert not done
    assert "apache-tvm is not installed" in (tmp_path / "work" / "log.txt").read_text()


def test_no_device(tmp_path: Path) -> None:
    """Without a GPU the facts are there, and why nothing else is."""

    class NoDevice(Hands):
        def do(self, job: Job, seconds: float) -> Answer:
            return Answer("failed", "no GPU can be used here: no NVIDIA driver.")

    done, lines = part(tmp_path, parts(tmp_path).first, 9, NoDevice(Clock()))
    assert not done and steps_of(lines) == ["facts"]
    assert "no NVIDIA driver" in (tmp_path / "work" / "log.txt").read_text()


def test_every_trial_is_one(tmp_path: Path) -> None:
    """The knobs that are measured beside the defaults exist, fit their cases, and most differ from
    the defaults of today.
    """
    for trial in plan.FULL.trials:
        candidate = plan.default_of(trial.case, GPU)
        assert set(trial.knobs) <= set(candidate.knobs), trial
    different = [trial for trial in plan.FULL.trials if plan.other(trial, GPU)]
    assert len(different) >= len(plan.FULL.trials) // 2


def test_kernels_are_those_that_are_asked_for() -> None:
    """What is built beforehand has the kernel of every work of the first part, once."""
    listed = plan.kernels(GPU, plan.FULL)
    assert len(set(listed)) == len(listed)
    wanted = [job for _, job in works.compared(GPU, plan.FULL)]
    assert {(job.case.typical, job.candidate) for job in wanted} <= set(listed)
    for work in (*works.trials(GPU, plan.FULL), *works.defaults(GPU, plan.FULL, 32768)):
        job: Any = work.job
        candidate = getattr(job, "candidate", None) or plan.default_of(job.case.typical, GPU)
        assert (job.case.typical, candidate) in listed, work.key


# --------------------------------------------------------------------------------------------------
# programs, tests, archives


def program(tmp_path: Path, code: str, seconds: float) -> tuple[Answer, str]:
    """A Python program run, and its output."""
    output = tmp_path / "output.txt"
    output.unlink(missing_ok=True)
    answer = programs.run((sys.executable, "-c", code), seconds, output, {}, tmp_path)
    return answer, output.read_text()


def test_programs(tmp_path: Path) -> None:
    """Exit codes, the last line of what fails, and programs that are not there."""
    answer, output = program(tmp_path, "print('fine')", 60)
    assert (answer.status, output) == ("ok", "fine\n")
    answer, _ = program(
        tmp_path, "import sys; print('first', flush=True); sys.exit('the reason')", 60
    )
    assert (answer.status, answer.message, answer.values["code"]) == ("failed", "the reason", 1)
    again = (sys.executable, "-c", "print('again')")
    programs.run(again, 60, tmp_path / "output.txt", {}, tmp_path)
    assert (tmp_path / "output.txt").read_text() == "first\nthe reason\nagain\n"
    missing = programs.run(("/no/such",), 60, tmp_path / "none.txt", {}, tmp_path)
    assert missing.status == "failed" and "No such file" in missing.message


@pytest.mark.parametrize("listens", [True, False])
def test_a_program_that_takes_too_long(listens: bool, tmp_path: Path) -> None:
    """It is told to end, and ended where it does not listen; what it wrote until then is there."""
    deaf = "" if listens else "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    code = f"{deaf}import time\nprint('begun', flush=True)\ntime.sleep(600)"
    answer, output = program(tmp_path, code, 4)
    assert answer.status == "late" and output.startswith("begun")
    assert answer.values["code"] == (-signal.SIGINT if listens else -signal.SIGKILL)


def test_a_program_ends_with_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was started is gone when an interrupt reaches whoever waits for it."""
    marks = tmp_path / "pid"
    code = f"import os, pathlib, time; pathlib.Path({str(marks)!r}).write_text(str(os.getpid()));"

    def interrupted(self: Any, timeout: float | None = None) -> int:
        if timeout is None:
            return real(self)
        until = time.monotonic() + 60
        while not marks.exists() and time.monotonic() < until:
            time.sleep(0.01)
        raise KeyboardInterrupt

    real = programs.subprocess.Popen.wait
    monkeypatch.setattr(programs.subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        program(tmp_path, f"{code} time.sleep(600)", 60)
    assert not Path(f"/proc/{marks.read_text()}").exists()


def test_tests_go_on(tmp_path: Path) -> None:
    """Tests that passed are left out of the next run of a step, however often it is cut."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text("from on_gpu import Here, here\n")
    (tmp_path / "tests" / "test_b.py").write_text("@pytest.mark.gpu\n")
    (tmp_path / "tests" / "test_c.py").write_text("nothing\n")
    work = works.tests(tmp_path, tmp_path, "tests", "gpu and not sanitizer")
    assert work.words[-2:] == ("tests/test_a.py", "tests/test_b.py")
    output = tmp_path / "tests-gpu_and_not_sanitizer.txt"
    output.write_text(
        "tests/test_a.py::test_one[cuda a-1] PASSED  [ 10%]\ntests/test_a.py::test_two FAILED\n"
        "tests/test_b.py::test_three PASSED\ntests/test_b.py::test_four"
    )
    works.tests(tmp_path, tmp_path, "tests", "gpu and not sanitizer")
    output.write_text("tests/test_b.py::test_four PASSED\n")
    work = works.tests(tmp_path, tmp_path, "tests", "gpu and not sanitizer")
    assert [word for word in work.words if word.startswith("--deselect=")] == [
        "--deselect=tests/test_a.py::test_one[cuda a-1]",
        "--deselect=tests/test_b.py::test_three",
        "--deselect=tests/test_b.py::test_four",
    ]


def test_archives(tmp_path: Path) -> None:
    """An archive does not replace what came since; what is none is refused by name."""
    book = Book(tmp_path / "work")
    book.add("step", "key", Answer("ok"), 1.0)
    book.pack(tmp_path / "a.tar.gz")
    book.add("step", "another", Answer("ok"), 1.0)
    unpack(tmp_path / "a.tar.gz", tmp_path / "work")
    assert len(Book(tmp_path / "work").lines()) == 2
    (tmp_path / "b.tar.gz").write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"--after: got .*b\.tar\.gz"):
        unpack(tmp_path / "b.tar.gz", tmp_path / "elsewhere")


def test_large_files_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would make the archive a burden is left out."""
    monkeypatch.setattr("lntune.commands.gpu_pass.book.LARGEST", 1000)
    book = Book(tmp_path / "work")
    book.add("step", "key", Answer("ok"), 1.0)
    (book.folder / "large.bin").write_bytes(bytes(1001))
    book.pack(tmp_path / "a.tar.gz")
    with tarfile.open(tmp_path / "a.tar.gz") as tar:
        assert sorted(tar.getnames()) == ["log.txt", "results.jsonl", "summary.txt"]


def test_figures_for_people(tmp_path: Path) -> None:
    """The log has a work's figures, the summary each case's share of the fastest copy, how the
    others compare, and what went wrong.
    """
    book = Book(tmp_path / "work")
    book.add("yardsticks", "copy of 1 bytes", Answer("ok", "", {"gbps": 2000.0}), 1.0)
    book.add("yardsticks", "copy of 2 bytes", Answer("ok", "", {"gbps": 4000.0}), 1.0)
    book.add("yardsticks", "l2_flag", Answer("ok", "", {"us": 0.75, "cycles": 1400.0}), 1.0)
    us, gbps = {"eager": 30.0, "tuned": 20.0}, {"eager": 2000.0, "tuned": 3000.0}
    book.add("defaults", "a case", Answer("ok", "", {"us": us, "gbps": gbps}), 1.0)
    errors = {"y": 1.25, "mean": 0.0}
    book.add("checks", "a kernel", Answer("wrong", "y: too far", {"errors": errors}), 1.0)
    book.pack(tmp_path / "a.tar.gz")
    assert (book.folder / "summary.txt").read_text().splitlines() == [
        "fastest copy: 4000 GB/s",
        "defaults: a case: 20 us, 75 % of copy, eager 1.50x",
        "wrong: checks: a kernel: y: too far",
    ]
    log = [line.partition(" ")[2] for line in (book.folder / "log.txt").read_text().splitlines()]
    assert log[2:] == [
        "yardsticks, l2_flag: ok: 0.75 us, 1400 cycles (1.0 s)",
        "defaults, a case: ok: eager 30 us, tuned 20 us (1.0 s)",
        "checks, a kernel: wrong: y: too far: errors 1.25 of what is allowed (1.0 s)",
    ]


def test_a_job_crosses_between_processes() -> None:
    """Jobs come back from JSON as they were."""
    for work, job in works.compared(GPU, plan.TINY):
        assert work.job == job
        assert msgspec.json.decode(msgspec.json.encode(job), type=Compare) == job
        assert msgspec.json.decode(msgspec.json.encode(job), type=Job) == job
