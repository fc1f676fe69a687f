"""The benchmark: the op as a user calls it against eager, torch.compile and a plain copy, interleaved in one run."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from lntune import check, device, knobs, ops, schedule, timing, toolchain, trial
from lntune.case import Case
from lntune.heap import kept_heap
from lntune.records import Record
from lntune.torch import dispatch

Progress = Callable[[int, int, Case], None]

ROUNDS = 11


class Result(msgspec.Struct, frozen=True):
    """One record per case, and where the outputs came from: "given", or "allocated by every call" and how."""

    outputs: str
    records: list[Record]


def _silent(*_: Any) -> None:
    """No progress is shown."""


def run(
    cases: Sequence[Case],
    seconds: float,
    with_compile: bool = True,
    given_output: bool = False,
    page_faults: bool = False,
    seed: int = 0,
    on_case: Progress = _silent,
) -> Result:
    """Benchmark each case for about `seconds`; one record each, with timings "eager", "compile", "tuned" and "copy".

    Everybody allocates its output, as a call in PyTorch does. With `given_output` nobody does, where that can be had: the
    kernel and the copy write into a tensor given to them, and eager and torch.compile are left out, since neither can.
    The heap keeps its pages while outputs are allocated, unless `page_faults` leaves the system's behaviour.
    A case measured while others used the machine is measured again, up to three times, and the quietest is kept.
    """
    import torch

    torch.manual_seed(seed)
    made = []
    with kept_heap(not page_faults and not given_output) as kept:
        for index, case in enumerate(cases):
            on_case(index, len(cases), case)
            made.append(_one(case, seconds, with_compile, given_output, seed))
    allocated = f"allocated by every call {'from a kept heap' if kept else 'with page faults'}"
    return Result("given" if given_output else allocated, made)


def _one(case: Case, seconds: float, with_compile: bool, given_output: bool, seed: int) -> Record:
    import torch

    given = ops.get(case.op).inputs(case, case.rows, "normal", seed)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore", dispatch.UntunedWarning)
        contenders = _given(case, given) if given_output else _calls(case, given, with_compile)
        measured = timing.quietest(lambda: timing.measure(contenders, seconds, rounds=ROUNDS, seed=seed))
        choice, kernel = dispatch.choose(case), dispatch.kernel_for(case)
    plan = schedule.get(choice.schedule) if choice.schedule else None
    verdict = check.verify(case, kernel) if kernel else None
    return Record(
        role="bench-given-output" if given_output else "bench",
        case=case,
        device=device.current(),
        threads=torch.get_num_threads(),
        schedule=choice.schedule or "eager",
        source=plan.source if plan else "",
        knobs=choice.knobs,
        status="wrong" if verdict and not verdict.ok else "ok",
        message=verdict.message if verdict and not verdict.ok else f"{choice.tier}: {knobs.describe(choice.knobs)}",
        timings=measured.timings,
        errors=verdict.errors if verdict else {},
        versus_eager=verdict.versus_eager if verdict else {},
        busy=measured.busy,
        versions=toolchain.versions(),
        time=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def _calls(case: Case, given: dict[str, Any], with_compile: bool) -> dict[str, Callable[[], Any]]:
    """Everyone as a user calls them."""
    import torch

    from lntune.torch import CALLS

    eager, first = ops.get(case.op).baseline(case, given), given[ops.get(case.op).arguments(case)[0].name]
    contenders: dict[str, Callable[[], Any]] = {"eager": eager, "tuned": CALLS[case.op](case, given), "copy": first.clone}
    if with_compile:
        torch._dynamo.reset()
        contenders["compile"] = _compiled(case, given)
    return contenders


def _compiled(case: Case, given: dict[str, Any]) -> Callable[[], Any]:
    """Eager's call (or what the operator has for it) through torch.compile, with the inputs as arguments: constants would be folded in."""
    import torch

    op = ops.get(case.op)
    make = op.compiled or op.baseline
    names = [n for n, v in given.items() if isinstance(v, torch.Tensor)]

    def call(*tensors: Any) -> Any:
        return make(case, {**given, **dict(zip(names, tensors, strict=True))})()

    compiled = torch.compile(call, dynamic=False, fullgraph=True)
    tensors = [given[n] for n in names]
    return lambda: compiled(*tensors)


def _given(case: Case, given: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """The kernel and a copy, both into existing outputs."""
    import torch

    kernel = dispatch.kernel_for(case)
    x = given[ops.get(case.op).arguments(case)[0].name]
    y = torch.empty_like(x)
    contenders: dict[str, Callable[[], Any]] = {"copy": lambda: y.copy_(x)}
    if kernel is not None:
        contenders["tuned"] = trial.bound(case, kernel, given, allocate=False)
    return contenders
