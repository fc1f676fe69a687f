"""The steps of a bringup beside tuning, each done in a child process.

A kernel that crashes, hangs or spoils the device's context costs its own step, and whatever
torch.compile takes, the step ends on time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from lntune import backends
from lntune.case import Case
from lntune.commands.check import Result
from lntune.device import Device
from lntune.errors import gist
from lntune.log.records import Record
from lntune.measure import serving, worker
from lntune.measure.jobs import Open, Outcome, Try

COPY_SECONDS = 0.5


class Copy(msgspec.Struct, frozen=True, tag=True):
    """Measure the bandwidth of a plain copy on a device, in bytes a second."""

    device: Device


class Smoke(msgspec.Struct, frozen=True, tag=True):
    """Build, load, check and time one candidate."""

    job: Try


class Verify(msgspec.Struct, frozen=True, tag=True):
    """Check what serves a case on a device."""

    case: Case
    device: Device


class Bench(msgspec.Struct, frozen=True, tag=True):
    """Benchmark what serves a case on a device for about `seconds`."""

    case: Case
    device: Device
    seconds: float
    with_compile: bool


Step = Copy | Smoke | Verify | Bench


class Answer(msgspec.Struct, frozen=True):
    """What came of a step: one of the results, or `error` in words; `late` when its time was over,
    `lost` when the child can do no more.
    """

    error: str = ""
    late: bool = False
    lost: bool = False
    bandwidth: float | None = None
    outcome: Outcome | None = None
    results: Sequence[Result] = ()
    record: Record | None = None


class Helper(worker.Worker):
    """The child that does steps. Use as a context manager."""

    program = (
        "import sys; sys.path[:] = sys.argv[3:]; from lntune.commands.bringup.steps import main;"
        " main(int(sys.argv[1]), int(sys.argv[2]))"
    )

    def __init__(self, threads: int | None = None) -> None:
        super().__init__(threads)
        self.start_seconds = 0.0
        """How long the child took to come up when it last did."""

    def __enter__(self) -> Helper:
        return self

    def start(self) -> None:
        """Start the child where there is none.

        Raises:
            BuildError: it did not come up.
        """
        if self.pid is None:
            begun = time.monotonic()
            super().start()
            self.start_seconds = time.monotonic() - begun

    def do(self, step: Step, seconds: float, patient: bool = False) -> Answer:
        """A step's answer, within `seconds` or so; `patient` as worker.Worker.answer's: the time is
        to find what hangs.

        Raises:
            BuildError: no child came up to do it.
        """
        raw = self.answer(step, max(seconds, 0.1), patient)
        if isinstance(raw, Outcome):
            return (
                Answer(outcome=raw)
                if isinstance(step, Smoke)
                else Answer(raw.message, raw.status == "timeout")
            )
        answer = msgspec.json.decode(raw, type=Answer)
        if answer.lost:
            self.stop()
        return answer


def perform(step: Step) -> Answer:
    """Do a step in this process."""
    try:
        answer = _done(step)
        _give_back(step.job.device if isinstance(step, Smoke) else step.device)
    except Exception as e:
        answer = Answer(f"{type(e).__name__}: {gist(e)}")
    if isinstance(step, Smoke):
        return msgspec.structs.replace(
            answer, lost=answer.outcome is not None and answer.outcome.lost
        )
    failed = answer.error or any(not r.ok for r in answer.results)
    # What broke a GPU's context stays with the process, and every later step would report it too.
    return msgspec.structs.replace(answer, lost=True) if failed and _broken(step.device) else answer


def _give_back(device: Device) -> None:
    """Have PyTorch keep no memory of a GPU for this process, which waits while another tunes."""
    backends.of(device).give_back_memory(device)


def _broken(device: Device) -> bool:
    """True when this process can do no more on the device."""
    from lntune.measure import trial

    return trial.run(Open(device)).status != "ok"


def _done(step: Step) -> Answer:
    match step:
        case Copy(device):
            return Answer(bandwidth=backends.of(device).copy_bandwidth(device, COPY_SECONDS))
        case Smoke(job):
            from lntune.measure import trial

            return Answer(outcome=trial.run(job))
        case Verify(case, device):
            from lntune.commands import check as verification

            return Answer(results=verification.check_cases([case], device))
        case Bench(case, device, seconds, with_compile):
            from lntune.commands import bench

            return Answer(record=bench.run([case], seconds, with_compile, device=device).records[0])


def main(answers: int, threads: int) -> None:
    """The child."""

    def do(line: bytes) -> bytes:
        step: Any = msgspec.json.decode(line, type=Step)
        return msgspec.json.encode(perform(step))

    serving.serve(answers, threads, do)
