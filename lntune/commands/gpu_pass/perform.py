"""How a job is done in the process that works on the GPU."""

from __future__ import annotations

from typing import Any

import msgspec

from lntune import backends
from lntune.commands.gpu_pass import checks, plan, roundtrips, speed
from lntune.commands.gpu_pass.jobs import (
    Answer,
    Beside,
    Called,
    Compare,
    Copy,
    Find,
    Job,
    RoundTrip,
    Sequence,
)
from lntune.errors import LntuneError, gist
from lntune.measure import serving


def perform(job: Job) -> Answer:
    """Do a job in this process. Whatever it raises becomes the answer."""
    try:
        wrong, values = _figures(job)
        answer = Answer("wrong" if wrong else "ok", wrong, values)
    except Exception as e:
        reason = gist(e) if isinstance(e, LntuneError) else f"{type(e).__name__}: {gist(e)}"
        answer = Answer("failed", reason)
    if answer.status == "ok" or isinstance(job, Find):
        return answer
    # What broke a GPU's context stays with the process, and every later job would report it too.
    try:
        fault = backends.of(job.device).fault(job.device)
    except Exception as e:
        fault = gist(e)
    return msgspec.structs.replace(answer, lost=bool(fault))


def _figures(job: Job) -> tuple[str, dict[str, Any]]:
    """(what is wrong, the figures) of a job."""
    match job:
        case Find(target):
            device = backends.device_of(target)
            place = backends.of(device).torch_device(device)
            return "", {"device": device, "place": place, "sizes": plan.sizes_for(device)}
        case Compare():
            return _compared(job)
        case Copy(device, size, seconds):
            return "", speed.copy(device, size, seconds)
        case RoundTrip(device, kernel, seconds):
            return "", roundtrips.measure(kernel, device, seconds)
        case Called(one, device, seconds, with_compile):
            return speed.as_called(one, device, seconds, with_compile)
        case Beside(one, device, candidate, default, seconds):
            return speed.beside_default(one, candidate, default, device, seconds)
        case Sequence(device, batch, hidden, dtype, steps, seconds):
            return speed.sequence(device, batch, hidden, dtype, steps, seconds)


def _compared(job: Compare) -> tuple[str, dict[str, Any]]:
    kernel = checks.load(job.case, job.candidate, job.device)
    verdict = checks.against_float64(job.case, kernel, job.rows, job.device)
    wrong = [verdict.message] if verdict.message else []
    if not wrong:
        wrong = [
            f"other bits than a plain call's: {name}"
            for name in checks.elsewhere(job.case, kernel, max(job.rows), job.device)
        ]
    return "; ".join(wrong), {"errors": verdict.errors, "knobs": job.candidate.knobs}


def main(answers: int) -> None:
    """The child."""
    jobs = msgspec.json.Decoder(Job)

    def do(line: bytes) -> bytes:
        return msgspec.json.encode(perform(jobs.decode(line)))

    serving.serve(answers, 0, do, _ready)


def _ready() -> None:
    """What every job needs: neither TVM, nor a compiler where this was built beforehand."""
    from lntune.kernels import direct

    direct.ensure_library()
