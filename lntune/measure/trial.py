"""One trial: build a candidate, check it, and only then time it. Failure is data."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from lntune import check, knobs, ops, schedule, timing
from lntune.backends import places
from lntune.backends.emulated import calls as emulated
from lntune.backends.places import Place
from lntune.case import Case
from lntune.device import Device
from lntune.errors import LntuneError, gist
from lntune.kernels import cache, compiler, direct, statics
from lntune.kernels.statics import Facts
from lntune.log.records import Record, Timing
from lntune.schedule import Schedule

TRIAL_SAMPLES = 16
"""Samples of a trial that the log keeps, of a hundred or so; the median is of all. A final keeps
them all.
"""
TRIAL_ATTEMPTS = 2
"""How often a disturbed trial is measured; a final, which decides what serves calls,
timing.ATTEMPTS times.
"""
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
    """Work for one process: one candidate to try, or several finalists to measure against each
    other, the default and eager.

    `spare` seconds may be spent beside `seconds` to measure a final again that other work on the
    machine disturbed. `default` is what serves the case where nothing is tuned.

    `only` leaves something out, so that the device need not be here: "build" puts the kernel into
    the cache, as far as it is worth it; "check" builds it and checks it, a GPU's in the emulator,
    on rows as short as its knobs allow; "context" only makes the device ready.
    """

    case: Case
    device: Device
    candidates: tuple[Candidate, ...]
    seconds: float
    spare: float = 0.0
    final: bool = False
    seed: int = 0
    default: Candidate | None = None
    only: str = ""


class Outcome(msgspec.Struct, frozen=True):
    """What came of a job. In a final, `timings` has an entry per candidate ("0", "1", ...), and
    "default" (where it is given and works), "eager" and "copy"; `message` is the number of the
    fastest candidate.

    `facts` are what a job that only builds or checks found out about a GPU's kernel, and `seconds`
    what building took it; `clocks` a GPU's in MHz; `lost` says that the process can do no more: its
    GPU's context is broken.
    """

    status: str
    message: str = ""
    timings: dict[str, Timing] = {}
    errors: dict[str, float] = {}
    versus_eager: dict[str, float] = {}
    busy: bool | None = None
    clocks: tuple[int, ...] = ()
    facts: Facts | None = None
    seconds: float = 0.0
    lost: bool = False


def measured(of: Outcome | Record) -> dict[str, Any]:
    """What came of a job, as the fields of a record."""
    return {
        name: getattr(of, name)
        for name in ("status", "message", "timings", "errors", "versus_eager", "busy", "clocks")
    }


def run(job: Job) -> Outcome:
    """Carry out a job in this process. Whatever a schedule or a kernel raises becomes the
    outcome.
    """
    try:
        if job.only == "context":
            return Outcome("run", broken) if (broken := _broken(job.device)) else Outcome("ok")
        if job.only:
            return _prepared(job)
        outcome = _final(job) if job.final else _trial(job)
    except Exception as e:
        outcome = Outcome("run", _brief(e))
    return (
        msgspec.structs.replace(outcome, lost=True)
        if outcome.status == "run" and _broken(job.device)
        else outcome
    )


def _broken(device: Device) -> str:
    """What keeps the device from working, empty when it does. An illegal access breaks a GPU's
    context for good: every later call fails.
    """
    if device.kind == "cpu":
        return ""
    try:
        import torch

        place = places.of(device)
        torch.zeros(1, device=place.name).sum().item()
        if place.gpu is not None:
            place.gpu.wait()
    except Exception as e:
        return _brief(e)
    return ""


def _brief(error: Exception) -> str:
    """An exception on one line of bounded length."""
    text = gist(error)
    if not isinstance(error, LntuneError):
        text = f"{type(error).__name__}: {text}"
    return (
        text if len(text) <= _MESSAGE else f"{text[: _MESSAGE // 2]} ... {text[-_MESSAGE // 2 :]}"
    )


def _planned(job: Job, candidate: Candidate) -> tuple[Schedule, Any] | Outcome:
    """A candidate's schedule and knobs, or the outcome that says why they do not fit."""
    try:
        plan = schedule.get(candidate.schedule, job.case.op)
        setting = knobs.from_dict(plan.knobs, candidate.knobs)
        reason = plan.reason_invalid(setting, job.case, job.device)
    except Exception as e:
        reason = _brief(e)
    return Outcome("invalid", reason) if reason else (plan, setting)


def _kernel(job: Job, candidate: Candidate) -> Callable[..., Any] | Outcome:
    """The built kernel, or the outcome that says why there is none. A GPU's is found in the cache
    where it was built ahead.
    """
    planned = _planned(job, candidate)
    if isinstance(planned, Outcome):
        return planned
    plan, setting = planned
    try:
        make = compiler.in_memory if job.device.kind == "cpu" else cache.kernel
        return make(job.case, plan, setting, job.device)
    except Exception as e:
        return Outcome("compile", _brief(e))


def _prepared(job: Job) -> Outcome:
    """Build one candidate and find out what there is to know about it without its device; with
    "check" its outputs, too.
    """
    planned = _planned(job, job.candidates[0])
    if isinstance(planned, Outcome):
        return planned
    (plan, setting), case, start, found = planned, job.case, time.monotonic(), None
    try:
        if job.device.kind == "cpu":
            kernel: Callable[..., Any] = compiler.in_memory(case, plan, setting, job.device)
        else:
            found = statics.facts(case, plan, setting, job.device)
            if not found.problems:
                cache.prepare(case, plan, setting, job.device)
            if job.only == "check":
                # of which a short row need not be as large as a cache
                uncached = msgspec.structs.replace(job.device, l2=0)
                case = statics.shortened(case, plan, setting, uncached)
                kernel = emulated.kernel(case, compiler.program(case, plan, setting, uncached))
    except Exception as e:
        return Outcome("compile", _brief(e), facts=found)
    took = time.monotonic() - start
    if job.only != "check":
        return Outcome("ok", facts=found, seconds=took)
    try:
        fence = check.FENCE if job.device.kind == "cpu" else check.ALIGNED
        verdict = check.verify(case, kernel, fence, cores=job.device.cores)
    except Exception as e:
        return Outcome("run", _brief(e), facts=found, seconds=took)
    return msgspec.structs.replace(_judged(verdict), facts=found, seconds=took)


def _judged(verdict: check.Verdict) -> Outcome:
    """A verdict as an outcome, not timed yet."""
    return Outcome(
        "ok" if verdict.ok else "wrong",
        verdict.message,
        errors=verdict.errors,
        versus_eager=verdict.versus_eager,
    )


def _trial(job: Job) -> Outcome:
    place = places.of(job.device)
    kernel = _kernel(job, job.candidates[0])
    if isinstance(kernel, Outcome):
        return kernel
    try:
        outcome = _judged(place.verify(job.case, kernel))
    except Exception as e:
        return Outcome("run", _brief(e))
    if outcome.status != "ok":
        return outcome
    calls = bound_each(job.case, kernel, _inputs(job.case, place), allocate=False)
    measured = timing.quietest(
        lambda: place.measure({"tuned": calls}, job.seconds, seed=job.seed), TRIAL_ATTEMPTS
    )
    tuned = measured.timings["tuned"]
    kept = {"tuned": Timing(tuned.samples_us[:TRIAL_SAMPLES], tuned.median_us)}
    return msgspec.structs.replace(
        outcome, timings=kept, busy=measured.busy, clocks=measured.clocks
    )


def _final(job: Job) -> Outcome:
    """Finalists, the default knobs, eager and a copy, interleaved on the same inputs, as they are
    called from Python: everyone allocates its output.
    """
    import torch

    case, place = job.case, places.of(job.device)
    given = _inputs(case, place)
    first = ops.get(case.op).arguments(case)[0].name
    contenders: dict[str, Sequence[Callable[[], Any]]] = {
        "eager": [place.baseline(case, g) for g in given],
        "copy": [g[first].clone for g in given],
    }
    verdicts: list[Outcome] = []
    for name, candidate in [
        *((str(i), c) for i, c in enumerate(job.candidates)),
        ("default", job.default),
    ]:
        if candidate is None or (name == "default" and candidate in job.candidates):
            continue
        kernel = _kernel(job, candidate)
        outcome = kernel if isinstance(kernel, Outcome) else _judged(place.verify(case, kernel))
        if not isinstance(kernel, Outcome) and outcome.status == "ok":
            verdicts.append(outcome)
            contenders[name] = bound_each(case, kernel, given, allocate=True)
        elif name != "default":
            return outcome
    with torch.inference_mode():
        again = functools.partial(place.measure, contenders, job.seconds, rounds=9, seed=job.seed)
        # it decides what serves calls
        measured = timing.quietest(again, seconds=job.seconds + job.spare)
    best = min(range(len(job.candidates)), key=lambda i: measured.timings[str(i)].median_us)
    timings = measured.timings
    if job.default in job.candidates:
        timings = {**timings, "default": timings[str(job.candidates.index(job.default))]}
    return msgspec.structs.replace(
        verdicts[best],
        message=str(best),
        timings=timings,
        busy=measured.busy,
        clocks=measured.clocks,
    )


# made once per case: it takes longer than a trial when the case is large
@functools.lru_cache(maxsize=1)
def _inputs(case: Case, place: Place) -> list[dict[str, Any]]:
    """Plain random inputs of a case at a place; contenders share them and none writes to them."""
    return place.inputs(case)


def bound(
    case: Case, kernel: Callable[..., Any], given: dict[str, Any], allocate: bool
) -> Callable[[], Any]:
    """The kernel bound to named inputs of the case; with `allocate` as a direct call, which makes
    its outputs as PyTorch does.

    Raises:
        LntuneError: direct calls cannot be made here.
    """
    (call,) = bound_each(case, kernel, [given], allocate)
    return call


def bound_each(
    case: Case, kernel: Callable[..., Any], copies: Sequence[dict[str, Any]], allocate: bool
) -> list[Callable[[], Any]]:
    """The kernel bound to each of several copies of a case's named inputs, see `bound`.

    On a GPU, where launches are recorded and the price of a call from Python does not count,
    outputs are made in Python if need be.
    """
    if not allocate:
        return [
            functools.partial(kernel, *_values(case, given, _outputs(case, given)))
            for given in copies
        ]
    if (calls := _direct(case, kernel, copies)) is not None:
        return calls
    if _where(copies[0]).type == "cpu":
        raise LntuneError(
            f"a direct call of {case.op} {case.variant} was refused; its inputs are of a kind that"
            " direct calls do not take."
        )
    return [functools.partial(_allocating, case, kernel, given) for given in copies]


def _direct(
    case: Case, kernel: Callable[..., Any], copies: Sequence[dict[str, Any]]
) -> list[Callable[[], Any]] | None:
    """Direct calls; None where they are refused."""
    import torch

    arguments = ops.get(case.op).arguments(case)
    inputs = [a for a in arguments if a.role != "out"]
    calls = [[given[a.name] for a in inputs] for given in copies]
    table = direct.Table("".join("f" if a.role == "scalar" else "t" for a in inputs))
    bits = case.rows.bit_length()
    table.remember(kernel, arguments, [a.name for a in inputs], (bits, bits), calls[0], case)
    with torch.inference_mode():
        refused = table.call(*calls[0]) is None
    return None if refused else [functools.partial(table.call, *call) for call in calls]


def _allocating(case: Case, kernel: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """One call that makes its outputs in Python; the answer is what was made."""
    made = _outputs(case, given)
    kernel(*_values(case, given, made))
    return made


def _values(case: Case, given: dict[str, Any], outputs: dict[str, Any]) -> list[Any]:
    """The kernel's arguments in order."""
    return [
        outputs[a.name] if a.role == "out" else given[a.name]
        for a in ops.get(case.op).arguments(case)
    ]


def _outputs(case: Case, given: dict[str, Any]) -> dict[str, Any]:
    """New tensors for what the kernel writes, where the inputs are."""
    import torch

    written = [a for a in ops.get(case.op).arguments(case) if a.role == "out"]
    return {
        a.name: torch.empty(
            a.sizes(case.rows, case.hidden), dtype=getattr(torch, a.dtype), device=_where(given)
        )
        for a in written
    }


def _where(given: dict[str, Any]) -> Any:
    """PyTorch's device of a case's inputs."""
    import torch

    return next(v.device for v in given.values() if isinstance(v, torch.Tensor))
