"""How a job is done in this process: a kernel is built, checked, and only then timed. What fails is
an outcome, not an exception.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from lntune import backends, check, ops, timing
from lntune.backends.backend import Call, Kernel
from lntune.case import Case
from lntune.check import team
from lntune.device import Device
from lntune.errors import LntuneError, StoreError, ToolchainError, UnfitError, gist
from lntune.kernels import cache, candidate_facts, compiler
from lntune.kernels.candidate_facts import Facts
from lntune.log import disturbance, pace
from lntune.log.records import Rival, Timing
from lntune.measure import calls, training
from lntune.measure.jobs import (
    Build,
    Candidate,
    Check,
    Final,
    Heat,
    Job,
    Open,
    Outcome,
    Prepare,
    Training,
    Try,
)
from lntune.measure.kept import Kept
from lntune.timing import Measured

TRIAL_SAMPLES = 16
"""Samples of a trial that the log keeps, of a hundred or so; the median is of all. A final keeps
them all.
"""
TRIAL_ATTEMPTS = 2
"""How often a disturbed trial is measured; a final, which decides what serves calls,
timing.ATTEMPTS times.
"""
HEAT_ROUNDS = 5
BESIDE_CALLS = 12
"""Calls that measuring with the other cache makes of each contender at least: where there is no
time for them it is left out.
"""
_MESSAGE = 500
"""Characters of a message that are kept; the log has a line for every trial."""
_kept = Kept()
_prepared: dict[tuple[Case, Device, Candidate], tuple[Kernel, Outcome]] = {}
"""What the last job has prepared, if it was that: a right kernel, and how right it is."""
_reference: dict[tuple[Case, Device], tuple[Candidate, Kernel | None]] = {}
"""What the last trial was timed beside, or may have been."""


_only_cached = False


def from_cache() -> None:
    """From now on this process has kernels from the cache alone, where nothing can be compiled."""
    global _only_cached  # noqa: PLW0603
    _only_cached = True


def run(job: Job) -> Outcome:
    """Carry out a job in this process. Whatever a schedule or a kernel raises becomes the
    outcome.
    """
    if isinstance(job, Open):
        fault = _fault(job.device)
        return Outcome("run", fault) if fault else Outcome("ok")
    try:
        match job:
            case Build() | Check():
                return _build(job)
            case Prepare():
                outcome = _prepare(job)
            case Try():
                outcome = _try(job)
            case Heat():
                outcome = _heat(job)
            case Final():
                outcome = _final(job)
            case Training():
                outcome = _training(job)
    except Exception as e:
        outcome = Outcome("run", _brief(e))
    return (
        msgspec.structs.replace(outcome, lost=True)
        if outcome.status == "run" and _fault(job.device)
        else outcome
    )


def _fault(device: Device) -> str:
    """What keeps the device from working, empty when it does."""
    try:
        return _bounded(backends.of(device).fault(device))
    except Exception as e:
        return _brief(e)


def _brief(error: Exception) -> str:
    """An exception on one line of bounded length."""
    text = gist(error)
    if not isinstance(error, LntuneError):
        text = f"{type(error).__name__}: {text}"
    return _bounded(text)


def _bounded(text: str) -> str:
    """A text as it is logged: its beginning and its end."""
    if len(text) <= _MESSAGE:
        return text
    return f"{text[: _MESSAGE // 2]} ... {text[-_MESSAGE // 2 :]}"


def _kernel(
    case: Case, device: Device, candidate: Candidate, checked: bool = True
) -> Kernel | Outcome:
    """The built kernel, or the outcome that says why there is none; from the cache where it was
    built ahead, and one that is not `checked` (as in backend.Scheduled) as it was tried where it
    was among the best.
    """
    if not checked and (kernel := _kept.get(case, device, candidate)) is not None:
        return kernel
    try:
        schedule, setting = candidate.resolved(case.op)
    except Exception as e:  # the class of the knobs may be a user's
        return Outcome("invalid", _brief(e))
    try:
        if backends.of(device).builds_ahead or _only_cached:
            return cache.kernel(case, schedule, setting, device)
        return compiler.in_memory(case, schedule, setting, device, checked=checked)
    except Exception as e:
        return _not_built(e)


def _not_built(error: Exception, facts: Facts | None = None) -> Outcome:
    """What came of a candidate of which no kernel could be made."""
    if isinstance(error, UnfitError):
        return Outcome("invalid", error.reason)
    blameless = isinstance(error, StoreError | ToolchainError)
    return Outcome("compile", _brief(error), facts=facts, blameless=blameless)


def _build(job: Build | Check) -> Outcome:
    """Build a kernel and find out what there is to know about it without its device; check its
    outputs where that is asked for.
    """
    case, candidate = job.case, job.candidate
    try:
        schedule, setting = candidate.resolved(case.op)
    except Exception as e:  # the class of the knobs may be a user's
        return Outcome("invalid", _brief(e))
    backend, device = backends.of(job.device), job.device
    start, facts, kernel = time.monotonic(), None, None
    try:
        if backend.builds_ahead:
            # lowered once, for the facts and for the file
            scheduled = compiler.lowered(case.typical, schedule, setting, device)
            facts = candidate_facts.facts(case, schedule, setting, device, scheduled.program)
            if not facts.problems:
                cache.prepare(case, schedule, setting, device, scheduled=scheduled)
        if isinstance(job, Check) and backend.checks_elsewhere:
            short = candidate_facts.to_emulate(case, schedule, setting, device)
            case, device, kernel = short.case, short.device, backend.stand_in(short)
        elif isinstance(job, Check):
            kernel = compiler.stand_in(case, schedule, setting, device)
        elif not backend.builds_ahead:
            compiler.in_memory(case, schedule, setting, device)
    except Exception as e:
        return _not_built(e, facts)
    seconds = time.monotonic() - start
    if kernel is None:
        return Outcome("ok", facts=facts, seconds=seconds)
    try:
        more = backend.more_rows(case, device, kernel)
        verdict = check.verify(case, kernel, backend.fence, device=device, more_rows=more)
    except Exception as e:
        return Outcome("run", _brief(e), facts=facts, seconds=seconds)
    return msgspec.structs.replace(_judged(verdict), facts=facts, seconds=seconds)


def _judged(verdict: check.Verdict) -> Outcome:
    """A verdict as an outcome, not timed yet."""
    return Outcome(
        "ok" if verdict.ok else "wrong",
        verdict.message,
        errors=verdict.errors,
        versus_eager=verdict.versus_eager,
    )


def _prepare(job: Prepare) -> Outcome:
    """Build and check a candidate on one thread: a team's would wait for those whose cores others
    use. Keep it, and have the inputs ready that it is timed on.
    """
    _prepared.clear()
    with team.alone():
        kernel, outcome = _right(job.case, job.device, job.candidate)
        if kernel is not None:
            _inputs(job.case, job.device)
            _prepared[job.case, job.device, job.candidate] = kernel, outcome
    return outcome


def _right(case: Case, device: Device, candidate: Candidate) -> tuple[Kernel | None, Outcome]:
    """A candidate as it is tried, built and right, or None, and the outcome of its check."""
    backend = backends.of(device)
    backend.torch_device(device)  # complains where it is not here
    # It is called with tensors that are made here alone. What serves, and the finalists, check
    # their arguments, which takes 0.1 us a call and half of the time that LLVM does.
    kernel = _kernel(case, device, candidate, checked=False)
    if isinstance(kernel, Outcome):
        return None, kernel
    try:
        outcome = _judged(backend.verify(case, device, kernel))
    except Exception as e:
        return None, Outcome("run", _brief(e))
    return (kernel if outcome.status == "ok" else None), outcome


def _try(job: Try) -> Outcome:
    """Build, check and time one candidate, with its outputs given; one that was prepared is checked
    by all threads and timed.
    """
    backend, device = backends.of(job.device), job.device
    prepared = _prepared.pop((job.case, device, job.candidate), None)
    _prepared.clear()
    kernel, outcome = prepared or _right(job.case, device, job.candidate)
    if prepared:
        by_all = _judged(backend.verify_by_all(job.case, device, prepared[0]))
        if by_all.status != "ok":
            return msgspec.structs.replace(by_all, message=f"{by_all.message}, by all threads")
    if kernel is None or outcome.status != "ok":
        return outcome
    inputs = _inputs(job.case, device)
    contenders = {pace.TRIED: calls.bind(job.case, kernel, inputs, allocate=False)}
    if (reference := _reference_of(job, kernel)) is not None:
        contenders[pace.BESIDE] = calls.bind(job.case, reference, inputs, allocate=False)
    enough = timing.race(job.seconds, job.best_us, job.unit_us)

    def measure() -> Measured:
        taken = backend.measure(contenders, device, job.seconds, seed=job.seed, enough=enough)
        us = pace.at(job.unit_us, taken.timings)
        # no knobs are so much slower than others
        apart = job.best_us is not None and us > disturbance.APART * job.best_us
        return msgspec.structs.replace(taken, busy=True) if apart else taken

    measured = timing.quietest(measure, TRIAL_ATTEMPTS)
    if not backend.builds_ahead:
        us = pace.at(job.unit_us, measured.timings)
        _kept.add(job.case, device, job.candidate, kernel, us)
    timings = {
        name: Timing(taken.samples_us[:TRIAL_SAMPLES], taken.median_us)
        for name, taken in measured.timings.items()
    }
    return msgspec.structs.replace(
        outcome,
        timings=timings,
        busy=measured.busy,
        clocks=measured.clocks,
        noticed=measured.noticed,
    )


def _reference_of(job: Try, kernel: Kernel) -> Kernel | None:
    """The kernel of a trial's reference, kept for the next trials of the case: that of a trial of
    its own, else built, once in this process; None where there is none, or it cannot be built.
    """
    key = job.case, job.device
    if job.reference is None:
        _reference.clear()
        _reference[key] = job.candidate, kernel
        return None
    known = _reference.get(key)
    if known is None or known[0] != job.reference:
        built = _kernel(job.case, job.device, job.reference, checked=False)
        known = job.reference, None if isinstance(built, Outcome) else built
        _reference.clear()
        _reference[key] = known
    return known[1]


def _heat(job: Heat) -> Outcome:
    """Candidates against each other, in parts of which each has half as many as the one before.
    Their order: by how far they came, then by their median in the last part that they were in.
    """
    case, device, backend = job.case, job.device, backends.of(job.device)
    bound: dict[str, Sequence[Call]] = {}
    for i, candidate in enumerate(job.candidates):
        kernel = _kernel(case, device, candidate, checked=False)
        if isinstance(kernel, Outcome):
            return kernel
        bound[str(i)] = calls.bind(case, kernel, _inputs(case, device), allocate=False)
    order: list[str] = []
    racing = list(bound)
    parts = max(1, (len(racing) - 1).bit_length())
    for part in range(parts):
        contenders = {name: bound[name] for name in racing}
        measured = backend.measure(
            contenders, device, job.seconds / parts, HEAT_ROUNDS, job.seed + part
        )
        racing.sort(key=lambda name: measured.timings[name].median_us)
        ahead = (len(racing) + 1) // 2 if part < parts - 1 else 0
        order = [*racing[ahead:], *order]
        racing = racing[:ahead]
    return Outcome("ok", order=tuple(int(name) for name in order))


def _final(job: Final) -> Outcome:
    """Finalists, the default knobs, eager and a copy, interleaved on the same inputs, as they are
    called from Python: everyone allocates its output.
    """
    import torch

    case, device, backend = job.case, job.device, backends.of(job.device)
    verdicts: list[Outcome] = []
    names = [f"finalist {i}" for i in range(len(job.candidates))]
    kernels: dict[str, Kernel] = {}
    for name, candidate in zip(names, job.candidates, strict=True):
        kernel, verdict = _verified(case, device, candidate, job.seed)
        if kernel is None:
            return verdict
        verdicts.append(verdict)
        kernels[name] = kernel
    if job.default is not None and job.default not in job.candidates:
        kernel, _ = _verified(case, device, job.default, job.seed)
        if kernel is not None:
            kernels["default"] = kernel
    inputs, left_out = _inputs(case, device, job.seed), ""
    contenders = _contenders(case, device, kernels, inputs)
    with torch.inference_mode():
        if job.with_compile:
            compiled, why = calls.compiled(case, inputs, device)
            contenders |= {} if why else {"compile": compiled}
            left_out = f"torch.compile left out: {why}" if why else ""
        # default knobs that are a candidate's have its name
        sides = [*names, *job.sides]

        def measure() -> Measured:
            enough = timing.precise(job.seconds, job.most_seconds, sides)
            return backend.measure(
                contenders, device, job.seconds, rounds=9, seed=job.seed, enough=enough
            )

        # it decides what serves calls
        measured = timing.quietest(measure, seconds=job.seconds + job.retry_seconds)
    beside = _beside(job, kernels, measured.timings)
    winner = min(range(len(names)), key=lambda i: measured.timings[names[i]].median_us)
    places = {"tuned": names[winner]} | {n: n for n in measured.timings if n not in names}
    if job.default in job.candidates:
        places["default"] = names[job.candidates.index(job.default)]
    rivals = [
        _rival(case, candidate, verdicts[i], names[i], measured.timings, {backend.beside: beside})
        for i, candidate in enumerate(job.candidates)
        if i != winner
    ]
    return msgspec.structs.replace(
        verdicts[winner],
        message=_bounded(left_out),
        winner=winner,
        rivals=tuple(rivals),
        timings={name: measured.timings[of] for name, of in places.items()},
        busy=measured.busy,
        clocks=measured.clocks,
        noticed=measured.noticed,
        **{backend.beside: {n: beside[of] for n, of in places.items() if of in beside}}
        if beside
        else {},
    )


def _contenders(
    case: Case, device: Device, kernels: Mapping[str, Kernel], inputs: Sequence[dict[str, Any]]
) -> dict[str, Sequence[Call]]:
    """Kernels, eager and a copy as they are called from Python, bound to copies of the inputs."""
    backend = backends.of(device)
    first = ops.get(case.op).arguments(case)[0].name
    contenders: dict[str, Sequence[Call]] = {
        "eager": [backend.baseline(device, case, given) for given in inputs],
        "copy": [given[first].clone for given in inputs],
    }
    for name, kernel in kernels.items():
        contenders[name] = calls.bind(case, kernel, inputs, True, backend.calls_directly)
    return contenders


def _beside(
    job: Final, kernels: Mapping[str, Kernel], timings: Mapping[str, Timing]
) -> dict[str, Timing]:
    """A final's contenders, but for torch.compile, with the cache that `timings` are not of; where
    the case leaves only one, their medians.
    """
    import torch

    backend, case, device = backends.of(job.device), job.case, job.device
    least = BESIDE_CALLS * sum(timing.median_us for timing in timings.values()) * 1e-6
    if not backend.beside or not job.beside_seconds or job.beside_seconds < least:
        return {}
    inputs = backend.inputs_beside(case, device, job.seed)
    if not inputs:
        return {name: Timing((), timing.median_us) for name, timing in timings.items()}
    contenders = _contenders(case, device, kernels, inputs)
    with torch.inference_mode():
        return backend.measure_beside(contenders, case, device, job.beside_seconds, job.seed)


def _training(job: Training) -> Outcome:
    """A step of training by two kernels and one of eager mode, interleaved."""
    backend, device = backends.of(job.device), job.device
    kernels: dict[Case, Kernel] = {}
    for case, candidate in zip(
        training.passes(job.case), (job.forward, job.candidate), strict=True
    ):
        kernel = _kernel(case, device, candidate)
        if isinstance(kernel, Outcome):
            return kernel
        kernels[case] = kernel
    with training.steps(job.case, device, kernels, job.seed) as contenders:
        measure = functools.partial(backend.measure, contenders, device, job.seconds, seed=job.seed)
        measured = timing.quietest(measure, seconds=job.seconds + job.retry_seconds)
    return Outcome(
        "ok",
        busy=measured.busy,
        noticed=measured.noticed,
        training=dict(measured.timings),
        forward=job.forward.as_setting,
    )


def _rival(
    case: Case,
    candidate: Candidate,
    verdict: Outcome,
    name: str,
    timings: Mapping[str, Timing],
    beside: Mapping[str, Mapping[str, Timing]],
) -> Rival:
    """A finalist that did not win."""
    return Rival(
        candidate.schedule,
        candidate.knobs,
        timings[name],
        candidate.resolved(case.op)[0].code,
        verdict.errors,
        verdict.versus_eager,
        cold=beside.get("cold", {}).get(name),
        warm=beside.get("warm", {}).get(name),
    )


def _verified(
    case: Case, device: Device, candidate: Candidate, seed: int
) -> tuple[Kernel | None, Outcome]:
    """A built kernel that is right, or None, and the outcome of its check."""
    import torch

    kernel = _kernel(case, device, candidate)
    if isinstance(kernel, Outcome):
        return None, kernel
    backend = backends.of(device)
    outcome = _judged(backend.verify(case, device, kernel, thoroughly=True))
    if outcome.status == "ok":
        with torch.inference_mode():
            wrong = backend.compare(case, device, kernel, _inputs(case, device, seed)[0])
        if wrong:
            outcome = Outcome("wrong", wrong)
    return (kernel if outcome.status == "ok" else None), outcome


# kept for one case: to make them takes longer than a trial when the case is large
@functools.lru_cache(maxsize=1)
def _inputs(case: Case, device: Device, seed: int = 0) -> list[dict[str, Any]]:
    """Plain random inputs of a case on a device, those of trials where no seed is given; contenders
    share them and none writes to them.
    """
    return backends.of(device).inputs(case, device, seed)
