"""What kernels that were built beforehand take on a GPU, beside eager mode and others."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lntune import backends, ops, timing
from lntune.backends.cuda import timing as gpu_timing
from lntune.backends.cuda.capture import record
from lntune.case import Case
from lntune.commands import bench
from lntune.commands.gpu_pass import checks
from lntune.device import Device
from lntune.errors import BuildError
from lntune.log.records import Timing
from lntune.measure import calls
from lntune.measure.jobs import Candidate
from lntune.ops import lnlstm_step

if TYPE_CHECKING:
    import torch

ROUNDS = 9
EAGER = "eager"
"""What a record has for a schedule where eager mode measured faster."""
IN_TURN = "lntune, no early start"
"""A layer none of whose kernels begins before the one before it has ended."""
OFF = {"float32": 1e-3, "bfloat16": 0.1}
"""How far a sequence's output may be from the eager loop's, which is as far from the truth."""


def copy(device: Device, size: int, seconds: float) -> dict[str, Any]:
    """GB/s, read and written, of a copy of so many bytes."""
    place = backends.of(device).torch_device(device)
    gpu = checks.clock_of(device)
    return {"gbps": gpu_timing.copy_bandwidth(place, seconds, gpu, size) / 1e9}


def _figures(case: Case, timings: dict[str, Timing]) -> dict[str, Any]:
    """Microseconds by contender, and GB/s of the bytes that have to be moved."""
    size = ops.get(case.op).bytes(case)
    us = {name: t.median_us for name, t in timings.items()}
    return {"us": us, "gbps": {name: size / t / 1e3 for name, t in us.items()}}


def as_called(
    case: Case, device: Device, seconds: float, with_compile: bool
) -> tuple[str, dict[str, Any]]:
    """(what is wrong with the kernel, the figures) of a case as a user calls it: what serves it,
    eager mode, others' kernels where they are installed and a copy, interleaved.

    Raises:
        BuildError: eager mode serves it for want of a kernel.
    """
    result = bench.run([case], seconds, with_compile, device=device).records[0]
    if result.schedule != EAGER and not result.errors:  # nothing was checked: there is no kernel
        raise BuildError(f"{case}: it has no kernel, eager mode serves it; {result.message}")
    wrong = result.message if result.status == "wrong" else ""
    figures = _figures(case, result.timings)
    served = {"schedule": result.schedule, "knobs": result.knobs, "note": result.message}
    # JSON has no infinity
    accuracy = {"errors": result.errors, "busy": result.busy, "clocks": result.clocks}
    return wrong, {**figures, **served, **accuracy}


def beside_default(
    case: Case, candidate: Candidate, default: Candidate, device: Device, seconds: float
) -> tuple[str, dict[str, Any]]:
    """(what is wrong with the candidate, the figures) of a candidate and the default knobs,
    interleaved; both allocate their outputs.
    """
    backend = backends.of(device)
    kernel = checks.load(case, candidate, device)
    verdict = backend.verify(case, device, kernel)
    if not verdict.ok:
        return verdict.message, {"knobs": candidate.knobs}
    copies = backend.inputs(case, device)
    bind = functools.partial(calls.bind, case, copies=copies, allocate=True, directly=False)
    contenders = {
        "candidate": bind(kernel),
        "default": bind(checks.load(case, default, device)),
    }
    measured = backend.measure(contenders, device, seconds, rounds=ROUNDS)
    figures = _figures(case, measured.timings)
    return "", {
        **figures,
        "knobs": candidate.knobs,
        "faster": timing.ratio(measured.timings["default"], measured.timings["candidate"]),
        "busy": measured.busy,
        "clocks": measured.clocks,
    }


def eager_loop(rnn: Any, x: torch.Tensor) -> torch.Tensor:
    """A LayerNormLSTM of one layer over (steps, batch, features) by PyTorch's operators, a loop in
    Python; the input's part of all steps is one product.
    """
    import torch
    from torch.nn.functional import layer_norm, linear

    named = {name.removesuffix("_l0"): value for name, value in rnn.named_parameters()}
    bias = named["bias"] + named["ln_ih_bias"] + named["ln_hh_bias"]
    shape = (4 * rnn.hidden_size,)
    gates = layer_norm(linear(x, named["weight_ih"]), shape, named["ln_ih_weight"], bias, rnn.eps)
    h = c = x.new_zeros(x.shape[1], rnn.hidden_size)
    outs = []
    for gates_x in gates.unbind(0):
        h, c = lnlstm_step.formula(
            gates_x,
            linear(h, named["weight_hh"]),
            c,
            None,
            named["ln_hh_weight"],
            named["ln_c_weight"],
            None,
            named["ln_c_bias"],
            rnn.eps,
            carried=False,
        )
        outs.append(h)
    return torch.stack(outs)


def in_turn(rnn: Any, x: torch.Tensor) -> Any:
    """The layer's outputs by kernels each of which begins when the one before it has ended."""
    before = os.environ.get("LNTUNE_EARLY_START")
    os.environ["LNTUNE_EARLY_START"] = "0"
    try:
        return rnn(x)
    finally:
        del os.environ["LNTUNE_EARLY_START"]
        if before is not None:
            os.environ["LNTUNE_EARLY_START"] = before


def sequence(
    device: Device, batch: int, hidden: int, dtype: str, steps: int, seconds: float
) -> tuple[str, dict[str, Any]]:
    """(what is wrong, the figures) of an LN-LSTM over a sequence in inference, from an idle device
    to an idle one: lntune's layer, the same without kernels that begin early, which has to come to
    the same bits, the eager loop, that in a graph, and torch.nn.LSTM, which does not normalize.
    `off` is how far lntune's output is from the loop's, in Euclidean norms.

    Raises:
        BuildError: eager mode serves it for want of a kernel.
    """
    import torch

    from lntune.torch import dispatch
    from lntune.torch.lstm import LayerNormLSTM

    dispatch.reload()  # a kernel that is missing is warned of anew
    place = backends.of(device).torch_device(device)
    real = place.startswith(backends.of(device).torch_type)
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    rnn = LayerNormLSTM(hidden, hidden, device=place, dtype=kind)
    plain = torch.nn.LSTM(hidden, hidden, device=place, dtype=kind)
    x = torch.randn(steps, batch, hidden, device=place, dtype=kind)
    with torch.no_grad():
        # with 1 rounding grows from step to step, and no two results would be alike
        rnn.get_parameter("ln_hh_weight_l0").fill_(0.25)

    def settled(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> None:
            with torch.inference_mode():
                call()
            if real:
                torch.cuda.synchronize(place)

        return run

    contenders: dict[str, Callable[[], Any]] = {
        "lntune": lambda: rnn(x),
        IN_TURN: lambda: in_turn(rnn, x),
        "eager loop": lambda: eager_loop(rnn, x),
        "nn.LSTM": lambda: plain(x),
    }
    with warnings.catch_warnings(record=True) as caught, torch.inference_mode():
        warnings.simplefilter("always")
        loop = eager_loop(rnn, x).double()
        # a loop becomes a graph when it comes a second time, and one on its callers' memory when
        # that comes again
        for _ in range(16):
            output = rnn(x)[0]
        for _ in range(16):
            other = in_turn(rnn, x)[0]
    off = float((output.double() - loop).norm() / loop.norm())
    notes = [str(w.message) for w in caught]
    if without := [note for note in notes if "has no kernel" in note]:
        raise BuildError(without[0])
    notes = [str(w.message) for w in caught if w.category is not dispatch.UntunedWarning]
    if real:
        stream = torch.cuda.Stream(place)
        stream.wait_stream(torch.cuda.current_stream(place))
        try:
            with torch.cuda.stream(stream), torch.inference_mode():
                for _ in range(2):
                    eager_loop(rnn, x)
                contenders["eager loop in a graph"] = record(lambda: eager_loop(rnn, x), stream)
        except RuntimeError as e:
            notes.append(f"the eager loop cannot be recorded: {e}")
    measured = timing.measure(
        {name: settled(call) for name, call in contenders.items()}, seconds, ROUNDS
    )
    us = {name: t.median_us for name, t in measured.timings.items()}
    faster = {
        name: timing.ratio(t, measured.timings["lntune"])
        for name, t in measured.timings.items()
        if name != "lntune"
    }
    step = {name: t / steps for name, t in us.items()}
    most = OFF[dtype]
    wrong = "" if off <= most else f"{off:.2g} from the eager loop, more than {most:.2g}"
    if not torch.equal(output, other):
        most_off = float((output.double() - other.double()).abs().max())
        wrong = f"up to {most_off:.2g} from what it is where no kernel begins early; {wrong}"
    return wrong, {"us": us, "us_a_step": step, "faster": faster, "off": off, "notes": notes}
