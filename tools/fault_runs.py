"""Tuning runs to which something happens at a random moment, and whether they go on.

    python tools/fault_runs.py                 # 40 signals, and the rest: half an hour on two cores
    python tools/fault_runs.py --quick         # two minutes: measurements are made up
    python tools/fault_runs.py --only hostile  # what begins so; --json FILE keeps the table

A fault is a signal to the tuner (Ctrl-C, SIGTERM, SIGHUP, kill -9) or to a process that it has
started, a log folder that is full, read-only or gone, or a candidate that goes wrong
(tests/hostile). After each of them every line of the log is a record, none of those before is lost,
no process lives, no temporary file is left, and the same command goes on without making a trial
again: what is not so is printed below the table, and the exit code is 1. Needs Linux; a full disk
and little memory are the real ones where this user may mount and make control groups (root), else
limits of the process, or left out, which the table says.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from places import BRIEF, Place, repeated  # noqa: E402 (a folder of the checkout)

HOSTILE = ROOT / "tests" / "hostile"
WAIT = 300.0
"""Seconds that a command may take to end."""
GROUPS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))
MEMORY = 3 << 30
"""Bytes of a control group in which memory is eaten."""
# A child that measures nothing: what is tested is who is left when the tuner or it is killed.
QUICK = (
    '''
from lntune.measure import worker
worker.Worker.program = """
import sys, time, types
sys.path[:] = sys.argv[3:]
sys.modules["torch"] = types.ModuleType("torch")
import msgspec
from lntune.log.records import Timing
from lntune.measure.jobs import Final, Job, Open, Outcome
from lntune.measure.serving import serve
def do(content):
    job = msgspec.json.decode(content, type=Job)
    if isinstance(job, Open):
        return msgspec.json.encode(Outcome("ok"))
    time.sleep(0.05)
    timing = Timing((1.0,), 1.0 + len(str(job)) % 7)
    timings = {"tuned": timing}
    if isinstance(job, Final):
        timings |= {"eager": timing, "copy": timing}
    return msgspec.json.encode(Outcome("ok", "", timings, {"y": 0.5}, {"y": 1.0}, winner=0))
serve(int(sys.argv[1]), 0, do, lambda: None)
"""
'''
    + BRIEF
)


class Ended(NamedTuple):
    """How a command ended: its exit code, and what it said."""

    code: int
    said: str
    errors: str


class Faults:
    """Runs of one command in one place, one after the other, each going on where the last ended."""

    def __init__(self, place: Place, quick: bool, seed: str) -> None:
        self.place, self.random = place, random.Random(seed)
        self.code = QUICK if quick else BRIEF
        self.longest, self.wrong, self.ways = 6.0, list[str](), Counter[str]()
        self._kept = self._logged()

    def start(self, *more: object) -> subprocess.Popen[str]:
        """The command; its next six trials."""
        return self.place.start("tune", "--trials", 6, *more, code=self.code)

    def moment(self, run: subprocess.Popen[str]) -> bool:
        """Wait for a random moment of the run; False when it has ended before."""
        try:
            run.wait(self.random.uniform(0, self.longest))
        except subprocess.TimeoutExpired:
            return True
        return False

    def end(
        self, run: subprocess.Popen[str], *codes: int, restore: Callable[[], None] = lambda: None
    ) -> Ended:
        """Wait for the command's end, when it may have these exit codes, `restore` what was taken
        from it, and look at what is there then.
        """
        try:
            said, errors = run.communicate(timeout=WAIT)
        except subprocess.TimeoutExpired:
            run.kill()
            said, errors = run.communicate()
            self.wrong.append(f"did not end within {WAIT:.0f} s")
        restore()
        code = run.returncode
        self.ways[str(code)] += 1
        if code not in codes:
            self.wrong.append(f"ended with {code}: {errors.strip()[-300:]}")
        self._look()
        return Ended(code, said, errors)

    def finish(self) -> None:
        """The same command, to which nothing happens, goes on to its end."""
        begun = time.monotonic()
        ended = self.end(self.start(), 0)
        self.ways["0"] -= 1
        self.longest = max(2.0, time.monotonic() - begun)
        if ended.code == 0 and not json.loads(ended.said)["cases"]:
            self.wrong.append("the last run has tuned nothing")

    def _look(self) -> None:
        """Whether all is there that has to be, and nothing else."""
        if alive := self.place.ended():
            self.wrong.append(f"alive: {[command[:200] for command in alive.values()]}")
            self.place.end()
        if left := self.place.left():
            self.wrong.append(f"left: {left}")
        logged = self._logged()
        if logged[: len(self._kept)] != self._kept:
            self.wrong.append("records are lost")
        self._kept = logged

    def _logged(self) -> list[object]:
        try:
            logged = self.place.records()
        except (AssertionError, ValueError, Warning) as e:
            self.wrong.append(f"the log cannot be read: {e}")
            return []
        if twice := repeated(logged):
            self.wrong.append(f"trials made again: {len(twice)}")
        return list(logged)


def signals(faults: Faults, number: int, times: int) -> None:
    """A signal to the tuner. Before it heeds it, it dies of it."""
    heeded = {signal.SIGINT: (0, 1, 130), signal.SIGTERM: (143,), signal.SIGHUP: (129,)}
    for seed in range(times):
        run = faults.start("--seed", seed)
        if faults.moment(run):
            run.send_signal(number)
        faults.end(run, 0, -number, *heeded.get(signal.Signals(number), ()))


def killed_children(faults: Faults, times: int, *more: str) -> None:
    """kill -9 of what the tuner has started to measure or to build."""
    for seed in range(times):
        run = faults.start("--seed", seed, *more)
        if faults.moment(run):
            children = [
                pid
                for pid, words in faults.place.alive().items()
                if pid != run.pid and ("serving" in words or "sys.argv[2]" in words)
            ]
            for pid in children[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        faults.end(run, 0)


def vanished(faults: Faults, times: int) -> None:
    """The log folder is moved away, and brought back afterwards."""
    logs, away = faults.place.logs, faults.place.folder / "away"

    def bring_back() -> None:
        if not away.exists():
            return
        for path in logs.rglob("*.jsonl"):  # moved before the run had written anything
            with (away / path.relative_to(logs)).open("ab") as whole:
                whole.write(path.read_bytes())
        shutil.rmtree(logs, ignore_errors=True)
        away.rename(logs)

    for seed in range(times):
        run = faults.start("--seed", seed)
        if faults.moment(run):
            logs.rename(away)
        ended = faults.end(run, 0, 1, restore=bring_back)
        if ended.code and "is there no more" not in ended.errors:
            faults.wrong.append(f"says nothing of the log: {ended.errors[-300:]}")


def full_disk(faults: Faults, times: int, mounted: bool) -> None:
    """The log's disk has no room any more, and later has."""
    for seed in range(times):
        if mounted:
            _mount(faults.place.logs, f"size={_room(faults.place)}")
        run = faults.start("--seed", seed, "--trials", 12)
        if not mounted and faults.moment(run):
            size = max((f.stat().st_size for f in faults.place.logs.rglob("*.jsonl")), default=0)
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (size + 1000, size + 1000))
        ended = faults.end(run, 0, 1)
        if ended.code and not any(w in ended.errors for w in ("No space left", "File too large")):
            faults.wrong.append(f"says nothing of the disk: {ended.errors[-300:]}")
        if mounted:
            _mount(faults.place.logs, "size=64m")


def read_only(faults: Faults, times: int, mounted: bool) -> None:
    """The log's disk becomes read-only, and later can be written again."""
    for seed in range(times):
        run = faults.start("--seed", seed)
        if faults.moment(run) and faults.place.logs.exists():
            if mounted:
                _mount(faults.place.logs, "ro")
            else:
                for folder in (faults.place.logs, *faults.place.logs.rglob("*")):
                    folder.chmod(0o555 if folder.is_dir() else 0o444)
        ended = faults.end(run, 0, 1)
        if ended.code and "log" not in ended.errors:
            faults.wrong.append(f"says nothing of the log: {ended.errors[-300:]}")
        if mounted:
            _mount(faults.place.logs, "rw")
        else:
            for folder in (faults.place.logs, *faults.place.logs.rglob("*")):
                folder.chmod(0o755 if folder.is_dir() else 0o644)


def _mount(folder: Path, options: str) -> None:
    """Change what is mounted on a folder. A disk in use is not made read-only: then it stays."""
    words = ["mount", "-o", f"remount,{options}", str(folder)]
    for _ in range(50):
        if subprocess.run(words, capture_output=True, check=False).returncode == 0:
            return
        time.sleep(0.02)


def _room(place: Place) -> int:
    """Bytes for what is logged, and for some records more."""
    used = sum(f.stat().st_blocks * 512 for f in place.logs.rglob("*") if f.is_file())
    return used + (4 << 10)


EXPECTED = {
    "harmless": "ok", "reads_standard_input": "ok", "prints_without_end": "ok",
    "writes_later": "ok", "reads_everything": "timeout", "stops_itself": "timeout",
    "ignores_signals": "timeout", "holds_the_interpreter": "timeout",
}  # fmt: skip
"""How a trial ends where that is neither "run" nor "compile", which is what an error of Python's
is.
"""


def hostile(faults: Faults, name: str) -> None:
    """A candidate that goes wrong, beside one that is right: the run goes on to its end."""
    faults.place.environment |= {
        "LNTUNE_SCHEDULES": str(HOSTILE),
        "LNTUNE_TEST_MOST": str(2 * MEMORY),
        "LNTUNE_TEST_FORKS": "2000",
    }
    chosen = ",".join(dict.fromkeys((name, "harmless")))
    run = faults.start("--schedule", chosen, "--timeout", "4s", "--search", "exhaustive")
    faults.end(run, 0)
    records = [r for r in faults.place.records() if r.schedule == name and r.role == "trial"]
    statuses = {r.status for r in records}
    faults.ways = Counter(
        f"{r.status}: {r.message}" if r.message else r.status for r in records[:1]
    )
    expected = {EXPECTED[name]} if name in EXPECTED else {"run", "compile"}
    if not statuses or statuses - expected:
        faults.wrong.append(f"{name}: {statuses or 'no record'}, expected {expected}")


@contextlib.contextmanager
def little_memory() -> Iterator[Path | None]:
    """A control group with little memory that this process and all that it starts is in; None where
    this user may not make one.
    """
    group = next((g for g in GROUPS if (g / "memory.limit_in_bytes").exists()), GROUPS[-1])
    before = group / _own_group() / "cgroup.procs"
    own = group / f"lntune-{os.getpid()}"
    limit = "memory.limit_in_bytes" if group.name == "memory" else "memory.max"
    try:
        own.mkdir()
        (own / limit).write_text(str(MEMORY))
        (own / "cgroup.procs").write_text(str(os.getpid()))
    except OSError:
        with contextlib.suppress(OSError):
            own.rmdir()
        yield None
        return
    try:
        yield own
    finally:
        before.write_text(str(os.getpid()))
        for _ in range(100):
            with contextlib.suppress(OSError):
                own.rmdir()
                break
            time.sleep(0.05)


def _own_group() -> str:
    """The path of this process's control group for memory."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        if "memory" in kinds.split(",") or not kinds:
            return path.strip("/")
    return ""


@contextlib.contextmanager
def disk_of_its_own(place: Place) -> Iterator[bool]:
    """A small disk for the logs; False where this user may mount none."""
    place.logs.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place.logs)]
    mounted = subprocess.run(words, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(place.logs)], check=True)


EATERS = ("eats_memory", "eats_shared_memory", "eats_memory_elsewhere")


class Row(NamedTuple):
    """A line of the table."""

    fault: str
    times: int
    ended: str
    wrong: list[str]


def rows(quick: bool, times: int, only: str) -> Iterator[Row]:
    """Do all faults whose name begins so."""
    of_signals: dict[str, Callable[[Faults], None]] = {
        f"{name} of the tuner": lambda faults, number=number: signals(faults, number, times)  # type: ignore[misc]
        for name, number in (
            ("Ctrl-C", signal.SIGINT),
            ("SIGTERM", signal.SIGTERM),
            ("SIGHUP", signal.SIGHUP),
            ("kill -9", signal.SIGKILL),
        )
    }
    few = max(1, times // 3)
    plain = {
        **of_signals,
        "kill -9 of a worker": lambda faults: killed_children(faults, times),
        "log folder gone": lambda faults: vanished(faults, few),
    }
    for name, do in plain.items():
        if name.startswith(only):
            count = few if name == "log folder gone" else times
            yield _row(name, count, quick, do)
    if "kill -9 of a builder".startswith(only) and not quick:
        yield _row(
            "kill -9 of a builder", few, quick, lambda f: killed_children(f, few, "--dry-run")
        )
    for name, fault in (("log disk full", full_disk), ("log disk read-only", read_only)):
        if name.startswith(only):
            yield _row_on_disk(name, few, quick, fault)
    if quick:
        return
    for path in sorted(HOSTILE.rglob("*.py")):
        for name in _schedules(path):
            if f"hostile: {name}".startswith(only):
                yield _hostile_row(name)


def _row(name: str, times: int, quick: bool, do: Callable[[Faults], None]) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(Place(Path(folder)), quick, name)
        faults.finish()
        do(faults)
        faults.finish()
        return Row(name, times, _ways(faults), faults.wrong)


def _row_on_disk(
    name: str, times: int, quick: bool, do: Callable[[Faults, int, bool], None]
) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        with disk_of_its_own(place) as mounted:
            if not mounted and name.endswith("only") and os.getuid() == 0:
                return Row(name, 0, "left out: root, and may not mount", [])
            faults = Faults(place, quick, name)
            faults.finish()
            do(faults, times, mounted)
            faults.finish()
            how = "" if mounted else " (a limit, not a disk)"
            return Row(name, times, _ways(faults) + how, faults.wrong)


def _hostile_row(name: str) -> Row:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if name in EATERS and stack.enter_context(little_memory()) is None:
            return Row(f"hostile: {name}", 0, "left out: no control group can be made", [])
        faults = Faults(Place(Path(folder)), False, name)
        hostile(faults, name)
        return Row(f"hostile: {name}", 1, next(iter(faults.ways), "no record"), faults.wrong)


def _schedules(path: Path) -> list[str]:
    """The names of a file's schedules."""
    from lntune.schedule import load_file

    return [one.name for one in load_file(path, path.parent.name)]


def _ways(faults: Faults) -> str:
    return ", ".join(f"{n} ended with {code}" for code, n in sorted(faults.ways.items()) if n)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="made-up measurements, no candidates")
    parser.add_argument("--times", type=int, default=0, help="how often each signal is sent")
    parser.add_argument("--only", default="", help="faults whose name begins so")
    parser.add_argument("--json", type=Path, help="a file for the table")
    options = parser.parse_args()
    begun, found = time.monotonic(), list[Row]()
    for row in rows(options.quick, options.times or (2 if options.quick else 10), options.only):
        found.append(row)
        print(f"{row.fault:<36} {row.times:>3}  {row.ended}", flush=True)
        for wrong in row.wrong:
            print(f"    wrong: {wrong}", flush=True)
    wrong = sum(len(row.wrong) for row in found)
    faults = sum(row.times for row in found)
    print(f"{faults} faults in {time.monotonic() - begun:.0f} s; not as it should be: {wrong}")
    if options.json:
        options.json.write_text(json.dumps([row._asdict() for row in found], indent=1) + "\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
