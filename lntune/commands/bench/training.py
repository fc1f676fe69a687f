"""`lntune bench --training`: a training step of a layer-norm module, its forward with gradients
recorded and its backward, as autograd runs them.
"""

from __future__ import annotations

import datetime
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from lntune import device as device_module
from lntune import knobs, ops, schedule, timing
from lntune.case import Case
from lntune.commands.bench import ROUNDS, Progress
from lntune.errors import InputError, got_expected
from lntune.log.records import Record, Role
from lntune.ops import layer_norm
from lntune.system import toolchain
from lntune.system.heap import kept_heap
from lntune.torch import dispatch
from lntune.torch.modules import LayerNorm

ROLE: Role = "bench-training"
FORWARD = " forward"
"""What the name of a contender ends with where its forward is measured alone."""
_VARIANT = "weight+bias+stats"


def run(
    cases: Sequence[Case],
    seconds: float,
    with_compile: bool = True,
    seed: int = 0,
    on_case: Progress = lambda *_: None,
    on_result: Callable[[list[Record]], None] = lambda _: None,
) -> list[Record]:
    """Benchmark `torch.nn.LayerNorm`, that through torch.compile, and `lntune.LayerNorm` in
    training on this machine's CPU, interleaved, each case for about `seconds`.

    Timings "eager", "compile" and "tuned" are of a forward and a backward that gives the gradients
    of x, weight and bias; "eager forward" and so on of the forward alone, with gradients recorded.
    Everything is allocated at every call, from a heap that keeps its pages. `on_case` and
    `on_result` are told what is under way and what there is; an interrupt ends the run with that.

    Raises:
        InputError: an operator that is no layer norm.
        KeyboardInterrupt: before the first case was measured.
    """
    for case in cases:
        if case.op != layer_norm.NAME:
            remedy = "bench/lnlstm_training.py measures the training of an LN-LSTM."
            raise InputError(got_expected("--training", case.op, layer_norm.NAME, remedy))
    torch.manual_seed(seed)
    measured: list[Record] = []
    with kept_heap():
        try:
            for index, case in enumerate(cases):
                on_case(index, len(cases), case)
                measured.append(_one(case, seconds, with_compile, seed))
                on_result(measured)
        except KeyboardInterrupt:
            if not measured:
                raise
    return measured


def _module(case: Case, kind: type[nn.LayerNorm]) -> nn.LayerNorm:
    return kind(case.hidden, dtype=getattr(torch, case.dtype))


def _forward(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return module(x)


def _step(
    module: Callable[[Tensor], Tensor], x: Tensor, wanted: tuple[Tensor, ...], dy: Tensor
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(module(x), wanted, dy)


def _one(case: Case, seconds: float, with_compile: bool, seed: int) -> Record:
    given = ops.get(case.op).inputs(case, case.rows, "normal", seed)
    x, dy = given["x"].requires_grad_(), torch.randn_like(given["x"])
    eager, tuned = _module(case, nn.LayerNorm), _module(case, LayerNorm)
    modules: dict[str, tuple[Callable[[Tensor], Tensor], nn.LayerNorm]] = {
        "eager": (eager, eager),
        "tuned": (tuned, tuned),
    }
    if with_compile:
        torch._dynamo.reset()
        modules["compile"] = torch.compile(eager, dynamic=False, fullgraph=True), eager
    contenders: dict[str, Callable[[], Any]] = {}
    for name, (call, module) in modules.items():
        contenders[name] = functools.partial(_step, call, x, (x, module.weight, module.bias), dy)
        contenders[name + FORWARD] = functools.partial(_forward, call, x)
    device = device_module.current()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dispatch.UntunedWarning)
        # the first backward may compile the node of autograd's graph, the next ones learn kernels
        for _ in range(3):
            contenders["tuned"]()
        choice = dispatch.choose(msgspec.structs.replace(case, variant=_VARIANT), device)
        measured = timing.quietest(
            lambda: timing.measure(contenders, seconds, rounds=ROUNDS, seed=seed)
        )
    return Record(
        role=ROLE,
        case=case,
        device=device,
        threads=torch.get_num_threads(),
        schedule=choice.schedule or "eager",
        code=schedule.code_of(choice.schedule),
        knobs=choice.knobs,
        status="ok",
        message=f"{choice.tier}: {knobs.describe(choice.knobs)}",
        timings=measured.timings,
        busy=measured.busy,
        versions=toolchain.versions(),
        time=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )
