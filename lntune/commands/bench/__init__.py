"""`lntune bench`: an operator as a user calls it against eager mode, torch.compile, a plain copy
and, on a GPU, others' kernels, interleaved in one run.
"""

from __future__ import annotations

import datetime
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from lntune import backends, knobs, ops, schedule, timing
from lntune import device as device_module
from lntune.backends import inputs
from lntune.case import Case
from lntune.commands.bench import peers
from lntune.device import Device
from lntune.log.records import Record
from lntune.measure import calls
from lntune.system import toolchain
from lntune.system.heap import kept_heap
from lntune.torch import bound_call, devices, dispatch
from lntune.transforms import strides

Progress = Callable[[int, int, Case], None]
Calls = dict[str, Sequence[Callable[[], Any]]]
"""Contender -> its call bound to each copy of the inputs."""

ROUNDS = 11
COPY_SECONDS = 0.2
"""For a device whose outputs are on no heap: the copy that its kernels are held against."""
_HELD = "and held for a turn"


class Result(msgspec.Struct, frozen=True):
    """One record per case, and where the outputs came from: "given", or "allocated by every call"
    and how. `bandwidth` is what a plain copy of hundreds of MB reaches on the GPU, in bytes a
    second, read and written; None on a CPU.
    """

    outputs: str
    records: list[Record]
    bandwidth: float | None = None


def _silent(*_: Any) -> None:
    """Nobody is told."""


def run(
    cases: Sequence[Case],
    seconds: float,
    with_compile: bool = True,
    given_output: bool = False,
    page_faults: bool = False,
    seed: int = 0,
    on_case: Progress = _silent,
    device: Device | None = None,
    on_result: Callable[[Result], None] = _silent,
    strided: bool = False,
) -> Result:
    """Benchmark each case for about `seconds` on a device, this machine's CPU if none is given; one
    record each, with timings "eager", "compile", "tuned" and "copy", and on a GPU those of
    bench.peers.

    Everybody allocates its output, as a call in PyTorch does. With `given_output` nobody does,
    where that can be had: the kernel and the copy write into a tensor given to them, and the others
    are left out, since they cannot. With `strided` the rows of all matrices are halves of wider
    rows, as in `x[:, :1024]`. The heap keeps its pages while outputs are allocated, unless
    `page_faults` leaves the system's behaviour. On a GPU the outputs are held for a turn of the
    inputs' copies, so that they are not in the cache either (see device_timing). A case measured
    while others used the machine is measured again, up to three times, and the quietest is kept.
    `on_result` is told what there is after every case; an interrupt ends the run with that.

    Raises:
        InputError: the GPU is not here, or a case's tensors do not fit into memory.
        KeyboardInterrupt: before the first case was measured.
    """
    import torch

    device = device or device_module.current()
    backend = backends.of(device)
    backend.torch_device(device)
    inputs.check_size(cases)
    torch.manual_seed(seed)
    measured: list[Record] = []
    on_heap = backend.outputs_on_heap
    bandwidth = None if on_heap else backend.copy_bandwidth(device, COPY_SECONDS)
    heap = kept_heap(not page_faults and not given_output and on_heap)
    with devices.serving(device), heap as kept:
        how = "from a kept heap" if kept else "with page faults" if on_heap else _HELD
        how += ", inputs half of wider rows" if strided else ""
        result = Result(
            "given" if given_output else f"allocated by every call {how}", measured, bandwidth
        )
        try:
            for index, case in enumerate(cases):
                on_case(index, len(cases), case)
                measured.append(
                    _one(case, device, seconds, with_compile, given_output, seed, strided)
                )
                on_result(result)
        except KeyboardInterrupt:
            if not measured:
                raise
    return result


def _one(
    case: Case,
    device: Device,
    seconds: float,
    with_compile: bool,
    given_output: bool,
    seed: int,
    strided: bool,
) -> Record:
    import torch

    backend = backends.of(device)
    copies = backend.inputs(case, device, seed)
    if strided:
        copies = [_halves(case, given) for given in copies]
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore", dispatch.UntunedWarning)
        kernel, choice = (
            dispatch.kernel_for(case, _tensors(copies[0])),
            dispatch.choose(case, device),
        )
        left_out: dict[str, str] = {}
        contenders = (
            _given(case, kernel, copies)
            if given_output
            else _calls(case, copies, device, with_compile, left_out)
        )
        measured = timing.quietest(
            lambda: backend.measure(contenders, device, seconds, rounds=ROUNDS, seed=seed)
        )
    verdict = backend.verify(case, device, kernel) if kernel else None
    message = (
        verdict.message
        if verdict and not verdict.ok
        else f"{choice.tier}: {knobs.describe(choice.knobs)}"
    )
    message += "".join(f"; {name} left out: {why}" for name, why in left_out.items())
    return Record(
        role="bench-given-output" if given_output else "bench-strided" if strided else "bench",
        case=case,
        device=device,
        threads=torch.get_num_threads(),
        schedule=choice.schedule or "eager",
        code=schedule.code_of(choice.schedule),
        knobs=choice.knobs,
        status="wrong" if verdict and not verdict.ok else "ok",
        message=message
        + (f"; not as a graph: {', '.join(measured.uncaptured)}" if measured.uncaptured else ""),
        timings=measured.timings,
        errors=verdict.errors if verdict else {},
        versus_eager=verdict.versus_eager if verdict else {},
        busy=measured.busy,
        clocks=measured.clocks,
        versions=toolchain.versions(),
        time=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def _halves(case: Case, given: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with every row of a matrix the first half of a row twice as long."""
    import torch

    matrices = strides.names(ops.get(case.op).arguments(case))
    return {
        name: torch.cat([v, v], 1)[:, : v.shape[1]] if name in matrices else v
        for name, v in given.items()
    }


def _tensors(given: Mapping[str, Any]) -> list[Any]:
    """The tensors among a case's inputs."""
    import torch

    return [v for v in given.values() if isinstance(v, torch.Tensor)]


def _calls(
    case: Case,
    copies: Sequence[dict[str, Any]],
    device: Device,
    with_compile: bool,
    left_out: dict[str, str] | None = None,
) -> Calls:
    """Everyone as a user calls them, bound to each copy of the inputs.

    torch.compile needs more than is on every machine (a C compiler, Python's headers): where it
    fails `left_out` says why, and the others are measured.
    """
    backend = backends.of(device)

    first = ops.get(case.op).arguments(case)[0].name
    contenders: Calls = {
        "eager": [backend.baseline(device, case, given) for given in copies],
        "tuned": [bound_call(case, given) for given in copies],
        "copy": [given[first].clone for given in copies],
    }
    if with_compile:
        compiled, reason = calls.compiled(case, copies, device)
        if not reason:
            contenders["compile"] = compiled
        elif left_out is not None:
            left_out["torch.compile"] = reason
    if backend.has_peers:
        others = [peers.calls(case, given) for given in copies]
        contenders |= {
            name: [bound[name] for bound in others]
            for name, call in others[0].items()
            if not calls.refusal(call)
        }
    return contenders


def _given(
    case: Case, kernel: Callable[..., Any] | None, copies: Sequence[dict[str, Any]]
) -> Calls:
    """The kernel and a copy, both into existing outputs."""
    import torch

    first = ops.get(case.op).arguments(case)[0].name
    contenders: Calls = {
        "copy": [
            functools.partial(torch.empty_like(given[first]).copy_, given[first])
            for given in copies
        ]
    }
    if kernel is not None:
        contenders["tuned"] = calls.bind(case, kernel, copies, allocate=False)
    return contenders
