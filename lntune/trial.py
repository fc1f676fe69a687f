"""One trial: build a candidate, check it, and only then time it. Failure is data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from lntune import build, check, knobs, ops, schedule, timing
from lntune.case import Case
from lntune.device import Device
from lntune.errors import LntuneError, ScheduleError
from lntune.records import Timing


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
    """Work for one process: one candidate to try, or several finalists to measure against each other and eager."""

    case: Case
    device: Device
    candidates: tuple[Candidate, ...]
    seconds: float
    final: bool = False
    seed: int = 0


class Outcome(msgspec.Struct, frozen=True):
    """What came of a job. In a final, `timings` has an entry per candidate ("0", "1", ...), and "default", "eager", "copy"."""

    status: str
    message: str = ""
    timings: dict[str, Timing] = {}
    errors: dict[str, float] = {}
    versus_eager: dict[str, float] = {}
    busy: bool = False


def run(job: Job) -> Outcome:
    """Carry out a job in this process."""
    return _final(job) if job.final else _trial(job)


def _kernel(job: Job, candidate: Candidate) -> tuple[Callable[..., Any] | None, Outcome | None]:
    """The built kernel, or the outcome that says why there is none."""
    plan = schedule.get(candidate.schedule, job.case.op)
    try:
        setting = knobs.from_dict(plan.knobs, candidate.knobs)
    except LntuneError as e:
        return None, Outcome("invalid", str(e))
    if reason := plan.reason_invalid(setting, job.case, job.device):
        return None, Outcome("invalid", reason)
    try:
        return build.in_memory(job.case, plan, setting, job.device), None
    except ScheduleError as e:
        return None, Outcome("compile", str(e))
    except LntuneError as e:
        return None, Outcome("compile", str(e))


def _trial(job: Job) -> Outcome:
    kernel, failed = _kernel(job, job.candidates[0])
    if kernel is None:
        return failed or Outcome("compile")
    try:
        verdict = check.verify(job.case, kernel)
    except Exception as e:
        return Outcome("run", f"{type(e).__name__}: {e}")
    if not verdict.ok:
        return Outcome("wrong", verdict.message, errors=verdict.errors, versus_eager=verdict.versus_eager)
    measured = timing.measure({"tuned": _bound(job.case, kernel, allocate=False)}, job.seconds, seed=job.seed)
    return Outcome("ok", "", measured.timings, verdict.errors, verdict.versus_eager, measured.busy)


def _final(job: Job) -> Outcome:
    """Finalists, the first schedule's default knobs, eager and a copy, interleaved; everyone allocates its output."""
    case = job.case
    op = ops.get(case.op)
    given = op.inputs(case, case.rows, "normal", job.seed)
    contenders: dict[str, Callable[[], Any]] = {"eager": op.baseline(case, given), "copy": given["x"].clone}
    verdicts: list[check.Verdict] = []
    plan = next(iter(schedule.for_op(case.op, job.device.kind).values()))
    default = Candidate.of(plan.name, plan.default(case, job.device))
    for name, candidate in [*((str(i), c) for i, c in enumerate(job.candidates)), ("default", default)]:
        kernel, failed = _kernel(job, candidate)
        if kernel is None:
            if name == "default":
                continue
            return failed or Outcome("compile")
        if name != "default":
            verdict = check.verify(case, kernel)
            if not verdict.ok:
                return Outcome("wrong", verdict.message, errors=verdict.errors)
            verdicts.append(verdict)
        contenders[name] = _bound(case, kernel, allocate=True)
    measured = timing.measure(contenders, job.seconds, rounds=9, seed=job.seed)
    best = min(range(len(job.candidates)), key=lambda i: measured.timings[str(i)].median_us)
    return Outcome("ok", str(best), measured.timings, verdicts[best].errors, verdicts[best].versus_eager, measured.busy)


def _bound(case: Case, kernel: Callable[..., Any], allocate: bool) -> Callable[[], Any]:
    """The kernel bound to plain random inputs of the case. With `allocate` every call makes its outputs, as PyTorch does."""
    import torch

    op = ops.get(case.op)
    given = op.inputs(case, case.rows, "normal", 0)
    arguments = op.arguments(case)
    shapes = {a.name: (a.sizes(case.rows, case.hidden), getattr(torch, a.dtype)) for a in arguments if a.role == "out"}
    outputs = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    values = [outputs[a.name] if a.role == "out" else given[a.name] for a in arguments]
    if not allocate:
        return lambda: kernel(*values)
    places = [(i, shapes[a.name]) for i, a in enumerate(arguments) if a.role == "out"]
    if len(places) == 1:
        (at, _), x, empty_like = places[0], outputs[arguments[places[0][0]].name], torch.empty_like
        before, after = values[:at], values[at + 1 :]
        return lambda: kernel(*before, empty_like(x), *after)

    def call() -> None:
        fresh = list(values)
        for at, (shape, dtype) in places:
            fresh[at] = torch.empty(shape, dtype=dtype)
        kernel(*fresh)

    return call
