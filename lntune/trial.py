"""One trial: build a candidate, check it, and only then time it. Failure is data."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import msgspec

from lntune import build, check, direct, knobs, ops, schedule, timing
from lntune.case import Case
from lntune.device import Device
from lntune.errors import LntuneError, gist
from lntune.records import Timing

TRIAL_SAMPLES = 16
"""Samples of a trial that the log keeps, of a hundred or so; the median is of all. A final keeps them all."""
_MESSAGE = 500
"""Characters of a message that are kept; the log has a line for every trial."""


class Candidate(msgspec.Struct, frozen=True):
    """A schedule with its knobs, as plain data: hashable, and ready to cross to another process."""

    schedule: str
    items: tuple[tuple[str, knobs.Value], ...]

    @classmethod
    def of(cls, name: str, setting: Any) -> Candidate:
        """The candidate of a schedule's name and a knob dataclass."""
        return cls(name, tuple(knobs.to_dict(setting).items()))

    @property
    def knobs(self) -> dict[str, knobs.Value]:
        """The knobs as a dictionary, as the log has them."""
        return dict(self.items)


class Job(msgspec.Struct, frozen=True):
    """Work for one process: one candidate to try, or several finalists to measure against each other, the default and eager."""

    case: Case
    device: Device
    candidates: tuple[Candidate, ...]
    seconds: float
    final: bool = False
    seed: int = 0
    default: Candidate | None = None


class Outcome(msgspec.Struct, frozen=True):
    """What came of a job. In a final, `timings` has an entry per candidate ("0", "1", ...), and "default" (where it is given
    and works), "eager" and "copy"; `message` is the number of the fastest candidate.
    """

    status: str
    message: str = ""
    timings: dict[str, Timing] = {}
    errors: dict[str, float] = {}
    versus_eager: dict[str, float] = {}
    busy: bool = False


def run(job: Job) -> Outcome:
    """Carry out a job in this process. Whatever a schedule or a kernel raises becomes the outcome."""
    try:
        return _final(job) if job.final else _trial(job)
    except Exception as e:
        return Outcome("run", _brief(e))


def _brief(error: Exception) -> str:
    """An exception on one line of bounded length."""
    text = gist(error)
    if not isinstance(error, LntuneError):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= _MESSAGE else f"{text[: _MESSAGE // 2]} ... {text[-_MESSAGE // 2 :]}"


def _kernel(job: Job, candidate: Candidate) -> tuple[Callable[..., Any] | None, Outcome | None]:
    """The built kernel, or the outcome that says why there is none."""
    try:
        plan = schedule.get(candidate.schedule, job.case.op)
        setting = knobs.from_dict(plan.knobs, candidate.knobs)
        reason = plan.reason_invalid(setting, job.case, job.device)
    except Exception as e:
        reason = _brief(e)
    if reason:
        return None, Outcome("invalid", reason)
    try:
        return build.in_memory(job.case, plan, setting, job.device), None
    except Exception as e:
        return None, Outcome("compile", _brief(e))


def _trial(job: Job) -> Outcome:
    kernel, failed = _kernel(job, job.candidates[0])
    if kernel is None:
        return failed or Outcome("compile")
    try:
        verdict = check.verify(job.case, kernel)
    except Exception as e:
        return Outcome("run", _brief(e))
    if not verdict.ok:
        return Outcome("wrong", verdict.message, errors=verdict.errors, versus_eager=verdict.versus_eager)
    measured = timing.measure({"tuned": bound(job.case, kernel, _inputs(job.case), allocate=False)}, job.seconds, seed=job.seed)
    tuned = measured.timings["tuned"]
    kept = {"tuned": Timing(tuned.samples_us[:TRIAL_SAMPLES], tuned.median_us)}
    return Outcome("ok", "", kept, verdict.errors, verdict.versus_eager, measured.busy)


def _final(job: Job) -> Outcome:
    """Finalists, the default knobs, eager and a copy, interleaved on the same input, as they are called from Python:
    everyone allocates its output.
    """
    import torch

    case = job.case
    given = _inputs(case)
    op = ops.get(case.op)
    contenders: dict[str, Callable[[], Any]] = {"eager": op.baseline(case, given), "copy": given[op.arguments(case)[0].name].clone}
    verdicts: list[check.Verdict] = []
    for name, candidate in [*((str(i), c) for i, c in enumerate(job.candidates)), ("default", job.default)]:
        if candidate is None or (name == "default" and candidate in job.candidates):
            continue
        kernel, failed = _kernel(job, candidate)
        verdict = check.verify(case, kernel) if kernel else None
        if kernel and verdict and verdict.ok:
            verdicts.append(verdict)
            contenders[name] = bound(case, kernel, given, allocate=True)
        elif name != "default":
            return failed or Outcome("wrong", verdict.message if verdict else "", errors=verdict.errors if verdict else {})
    with torch.inference_mode():
        measured = timing.quietest(lambda: timing.measure(contenders, job.seconds, rounds=9, seed=job.seed))  # it decides what serves calls
    best = min(range(len(job.candidates)), key=lambda i: measured.timings[str(i)].median_us)
    timings = measured.timings
    if job.default in job.candidates:
        timings = {**timings, "default": timings[str(job.candidates.index(job.default))]}
    return Outcome("ok", str(best), timings, verdicts[best].errors, verdicts[best].versus_eager, measured.busy)


@functools.lru_cache(maxsize=1)  # made once per case: it takes longer than a trial when the case is large
def _inputs(case: Case) -> dict[str, Any]:
    """Plain random inputs of a case; contenders share them and none writes to them."""
    return ops.get(case.op).inputs(case, case.rows, "normal", 0)


def bound(case: Case, kernel: Callable[..., Any], given: dict[str, Any], allocate: bool) -> Callable[[], Any]:
    """The kernel bound to named inputs of the case; with `allocate` as a direct call, which makes its outputs as PyTorch does.

    Raises:
        LntuneError: direct calls cannot be made here.
    """
    import torch

    arguments = ops.get(case.op).arguments(case)
    if not allocate:
        outputs = {a.name: torch.empty(a.sizes(case.rows, case.hidden), dtype=getattr(torch, a.dtype)) for a in arguments if a.role == "out"}
        values = [outputs[a.name] if a.role == "out" else given[a.name] for a in arguments]
        return lambda: kernel(*values)
    inputs = [a for a in arguments if a.role != "out"]
    names, call = [a.name for a in inputs], [given[a.name] for a in inputs]
    signature = "".join("f" if a.role == "scalar" else "t" for a in inputs)
    table = direct.Table(signature)
    bits = case.rows.bit_length()
    table.remember(kernel, arguments, names, (bits, bits), call, case)
    with torch.inference_mode():
        if table.call(*call) is None:
            raise LntuneError(f"a direct call of {case.op} {case.variant} was refused; its inputs are of a kind that direct calls do not take.")
    serve = table.call
    return lambda: serve(*call)
