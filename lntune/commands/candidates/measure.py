"""What `measure.py` of a folder of candidates does: try each that was not tried before, then
measure the best of each case again, interleaved with eager mode and what serves untuned.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from lntune import backends
from lntune.case import Case
from lntune.commands.candidates import manifest
from lntune.commands.candidates.manifest import Built, Manifest, Sums
from lntune.device import Device
from lntune.errors import InputError, LntuneError, got_expected
from lntune.kernels import cache
from lntune.log import records
from lntune.log.records import Record, Role
from lntune.measure import serving, trial, written
from lntune.measure.jobs import Candidate, Final, Job, Outcome, Try
from lntune.measure.worker import Worker
from lntune.system import interrupts
from lntune.tune import finals
from lntune.words import counted

TIMEOUT = 60.0
"""Seconds of a trial, beside those that it measures."""
FINAL_SECONDS = 5.0
"""Times a trial's: what the final of a case measures."""


class Child(Worker):
    """The process that measures. It builds nothing."""

    program = (
        "import sys; sys.path[:] = sys.argv[3:];"
        " from lntune.commands.candidates.measure import child;"
        " child(int(sys.argv[1]), int(sys.argv[2]))"
    )


def child(answers: int, threads: int) -> None:
    """The life of that process: kernels come from the cache alone."""
    trial.from_cache()
    jobs = msgspec.json.Decoder(Job)

    def do(content: bytes) -> bytes:
        return msgspec.json.encode(trial.run(jobs.decode(content)))

    serving.serve(answers, threads, do, _ready)


def _ready() -> None:
    from lntune.kernels import direct

    direct.ensure_library()


class _Over(Exception):
    """The time is over."""


class Measuring:
    """One call of `measure.py`."""

    def __init__(self, folder: Path, target: str, minutes: float, seconds: float) -> None:
        import torch

        self.folder, self.seconds = folder, seconds
        self.manifest = manifest.read(folder)
        self.device = here(self.manifest, target)
        self.threads = torch.get_num_threads()
        self._end = time.monotonic() + minutes * 60 if minutes else math.inf
        self._log = folder / manifest.RECORDS
        self._run = uuid.uuid4().hex[:12]
        self._before = records.read([self._log], device=self.device) if self._log.is_dir() else []

    def cases(self) -> dict[Case, list[Built]]:
        """What there is to try of each case, but for kernels of other devices."""
        found: dict[Case, list[Built]] = {}
        for built in self.manifest.candidates:
            found.setdefault(built.case, [])
            if self._fits(built):
                found[built.case].append(built)
        return found

    def _fits(self, built: Built) -> bool:
        """Whether the kernel is what this device would be served by with these knobs."""
        plan, setting = built.candidate.resolved(built.case.op)
        path = cache.path_of(built.case, plan, setting, self.device)
        return path == self.folder / built.file

    def all(self, worker: Worker) -> Iterator[str]:
        """Measure everything; what is done, a sentence each."""
        cases = self.cases()
        if not any(cases.values()):
            other = self.manifest.device
            raise InputError(
                f"none of the kernels is for {self.device.name} ({self.device.isa},"
                f" {counted(self.device.cores, 'core')}): they were built for {other.name}"
                f" ({other.isa}, {other.cores}). Export them with this device's --target."
            )
        for number, (case, built) in enumerate(cases.items(), 1):
            costs = dict[Candidate, float]()
            for place, one in enumerate(built, 1):
                record = self._tried(case, one.candidate)
                if record is None:
                    job = Try(case, self.device, one.candidate, self.seconds)
                    outcome = self._measure(worker, job, TIMEOUT + 4 * self.seconds)
                    record = self._record(case, one.candidate, outcome, "trial")
                costs[one.candidate] = record.median() or math.inf
                best = min(costs.values())
                said = f"{best:.2f} us" if best < math.inf else "none works"
                yield f"[{number}/{len(cases)}] {case}: {place}/{len(built)} tried, best {said}"
            if any(r.role == "final" and r.case == case for r in self._before):
                continue
            if (final := self._final(worker, case, built, costs)) is not None:
                tuned, eager = final.median(), final.median("eager")
                yield f"{case}: {final.schedule}, {tuned:.2f} us, eager {eager or math.nan:.2f} us"

    def _final(
        self, worker: Worker, case: Case, built: Sequence[Built], costs: dict[Candidate, float]
    ) -> Record | None:
        default = next((b.candidate for b in built if b.default), None)
        chosen = finals.choose(costs, default)
        seconds = FINAL_SECONDS * self.seconds
        while chosen:
            working = default if costs.get(default, math.inf) < math.inf else None  # type: ignore[arg-type]
            job = Final(
                case,
                self.device,
                tuple(chosen),
                seconds,
                seconds,
                seed=1,
                default=working,
                beside_seconds=seconds / 3,
            )
            outcome = self._measure(worker, job, TIMEOUT + 10 * seconds)
            if outcome.status == "ok":
                assert outcome.winner is not None
                named = working if "default" in outcome.timings else None
                winner = chosen[outcome.winner]
                return self._record(case, winner, outcome, "final", named)
            failed = chosen.pop(0)  # one by one: who fails alone is found, in the end
            self._record(case, failed, outcome, "final")
        return None

    def _tried(self, case: Case, candidate: Candidate) -> Record | None:
        return next(
            (
                r
                for r in reversed(self._before)
                if r.role == "trial" and r.case == case and Candidate.of_record(r) == candidate
            ),
            None,
        )

    def _measure(self, worker: Worker, job: Job, timeout: float) -> Outcome:
        if time.monotonic() > self._end:
            raise _Over
        return worker.run(job, timeout)

    def _record(
        self,
        case: Case,
        candidate: Candidate,
        outcome: Outcome,
        role: Role,
        default: Candidate | None = None,
    ) -> Record:
        """Put down what came of a candidate. How certain a winner is takes SciPy, and is found out
        at home.
        """
        record = written.record(
            outcome,
            candidate,
            default,
            role=role,
            case=case,
            device=self.device,
            threads=self.threads,
            run=self._run,
        )
        with interrupts.held():
            records.append(self._log, record)
        return record

    def sum_up(self) -> None:
        """Write down the digests of what was measured."""
        sums = Sums(
            manifest.digest(self.folder / manifest.MANIFEST),
            manifest.digests(self.folder, records.files(self._log)),
        )
        (self.folder / manifest.SUMS).write_bytes(msgspec.json.encode(sums) + b"\n")


def here(of: Manifest, target: str) -> Device:
    """The device that is to be measured on.

    Raises:
        InputError: it is another architecture than what was built for.
    """
    usual = "cpu" if of.device.kind == "cpu" else "cuda"
    device = backends.device_of(of.target if of.device.backend else target or usual)
    if (device.kind, device.isa) != (of.device.kind, of.device.isa):
        got = f"{device.name} ({device.isa})"
        raise InputError(got_expected("device", got, f"one of {of.device.isa}: built for it"))
    return device


def main(folder: Path, target: str = "", minutes: float = 0.0, seconds: float = 0.2) -> int:
    """Measure, say what is done, and leave digests; the exit code: 0 where all was measured, 1
    where the time was over.
    """
    try:
        with interrupts.as_ctrl_c():
            measuring = Measuring(folder, target, minutes, seconds)
            try:
                with Child() as worker:
                    for line in measuring.all(worker):
                        print(line, flush=True)
            finally:
                measuring.sum_up()
    except LntuneError as e:
        print(f"measure.py: {e}")
        return 2
    except _Over:
        print("measure.py: the time is over; the same command goes on")
        return 1
    except KeyboardInterrupt:
        print("measure.py: interrupted; the same command goes on")
        return 130
    print(f"all is measured; bring it home: lntune import {folder}")
    return 0
