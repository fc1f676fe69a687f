"""An LSTM with layer normalization over a whole sequence, in one direction: one matrix product and
one kernel a time step, forward and backward.

As one operator it spares what autograd would do at every step: the gradient of the recurrent matrix
is a product over many time steps at once, the gradients of gains and biases are summed inside the
kernels, outputs are written where they belong, and of the gates only what enters a layer norm is
kept. torch.compile sees one node, `lntune::lnlstm_sequence`, however long the sequence. On a GPU
the time loop becomes a CUDA graph when its shapes repeat (see graphs.py).
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lntune.case import MAX_HIDDEN
from lntune.log.cases import Tally, What
from lntune.ops.lnlstm_step import NAME
from lntune.ops.lnlstm_step import variant as step_variant
from lntune.torch import devices, dispatch, graphs, lnlstm_loops, recording
from lntune.torch.constants import constant
from lntune.torch.lnlstm_arguments import SavedSteps, SequenceOptions, SequenceTensors
from lntune.torch.lnlstm_backward import case_of, recorded_backward
from lntune.torch.lnlstm_steps import WHOLE_BATCH, by_steps, scripted_by_steps, step_sizes
from lntune.torch.support import (
    DTYPE_NAMES,
    PER_GATE,
    YES,
    Support,
    are_plain,
    graph_recording,
    in_transform,
    is_batched,
    is_checkpointed,
    is_kernel_eps,
    kernel_support,
    log_unsupported,
    needs_gradients,
    present,
)

_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]
_to_onnx: Callable[[], bool] = constant(lambda: bool(torch.onnx.is_in_onnx_export()))
"""True while a model is exported to ONNX, which has no such operator and no such loop."""
_TENSORS = len(SequenceTensors._fields)  # the operator's arguments that are tensors, and come first
_SAVED = len(SavedSteps._fields)
_FIRST = 3 + _SAVED  # where they begin among the arguments of its backward
_PROGRAM = Support.no("a program for elsewhere is written")
_DTYPES = Support.no("its tensors are of several dtypes")
_DTYPE = Support.no(f"its dtype is none of {', '.join(DTYPE_NAMES.values())}")
_TOO_LARGE = Support.no(f"hidden sizes above {MAX_HIDDEN // 4} are not built")
_EPS = Support.no("eps is not a finite number, 0 or more")


def lnlstm_sequence(
    # (rows of all steps, 4 * hidden): W_ih x, or with weight_x None what is added to z as it is
    gates_x: Tensor,
    h_0: Tensor,  # (batch, hidden)
    c_0: Tensor,  # (batch, hidden)
    matrix: Tensor,  # (4 * hidden, hidden): W_hh
    weight_x: Tensor | None,  # (4 * hidden,)
    weight_h: Tensor,  # (4 * hidden,)
    weight_c: Tensor,  # (hidden,)
    bias: Tensor | None,  # (4 * hidden,)
    bias_c: Tensor | None,  # (hidden,)
    sizes: Sequence[int] | Tensor,
    eps: float,
    carried: bool,
    per_gate: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(h of all steps, laid out as gates_x, h_n and c_n) of `lntune.torch.lnlstm.lnlstm_step` from
    step to step.

    Step t has the first sizes[t] sequences, sizes never rising, and their rows follow those of the
    steps before; without sizes every step has all of them, so that a compiled graph is one for
    sequences of any length. `reverse` begins at the last step. A sequence's state is taken up from
    h_0 and c_0 at its first step and handed on to h_n and c_n after its last. `sizes` is a tensor
    where torch.jit.trace shall not take it for a constant. Dtypes and devices are those of
    SequenceTensors; nothing is checked.

    Raises:
        NotTunedError: in strict mode only, see `lntune.strict`.
    """
    tensors = SequenceTensors(gates_x, h_0, c_0, matrix, weight_x, weight_h, weight_c, bias, bias_c)
    options = SequenceOptions(eps, carried, per_gate, reverse)
    if _tracing() and are_plain(*tensors) and not in_transform() and not _to_onnx():
        traced = sizes if isinstance(sizes, Tensor) else torch.tensor(sizes) if sizes else None
        return scripted_by_steps()(*tensors, traced, *options)
    sizes = sizes.tolist() if isinstance(sizes, Tensor) else list(sizes)
    support = _support(tensors, options)
    if not support:
        if not torch.compiler.is_compiling():
            log_unsupported("LayerNormLSTM", support)
            _count_steps(tensors, sizes, options, reason=support.reason)
        return by_steps(*tensors, sizes, *options)
    keep = needs_gradients(*tensors)
    if not torch.compiler.is_compiling() and _eager_is_faster(tensors, options, keep):
        _count_steps(tensors, sizes, options, keep)
        return by_steps(*tensors, sizes, *options)
    op = torch.ops.lntune.lnlstm_sequence
    out, h_n, c_n, *_ = op(*tensors, sizes or WHOLE_BATCH, eps, carried, reverse, keep)
    return out, h_n, c_n


def _count_steps(
    tensors: SequenceTensors,
    sizes: list[int],
    options: SequenceOptions,
    keep: bool = False,
    reason: str = "",
) -> None:
    """Count the steps of a sequence that PyTorch serves, where cases are recorded; not their time,
    most of which is that of products. `reason` is why no kernel takes them.
    """
    if not recording.SINKS or _tracing() or graph_recording(*present(*tensors)):
        return
    h_0, step = tensors.h_0, tensors.step(tensors.gates_x)
    kind = step_variant(
        step.weight_x is not None,
        step.bias is not None,
        step.bias_c is not None,
        options.normalized_cell,
        keep,
    )
    dtype, device = str(h_0.dtype).removeprefix("torch."), devices.of(h_0.device)
    steps = Counter(step_sizes(sizes, tensors.gates_x.shape[0], h_0.shape[0]))
    for rows, calls in steps.items():
        kept = "" if reason else kind
        what = What(NAME, h_0.shape[1], dtype, rows, kept, device, reason)
        recording.count(what, Tally(calls))


def _support(tensors: SequenceTensors, options: SequenceOptions) -> Support:
    """Whether the operator may have a call, in eager mode or in a graph; for transforms of
    functions in a graph, and for ONNX, PyTorch's own formulas are wanted.
    """
    h_0 = tensors.h_0
    hidden = h_0.shape[-1]
    if options.per_gate:
        return PER_GATE
    if hidden > MAX_HIDDEN // 4:
        return _TOO_LARGE
    if h_0.dtype not in DTYPE_NAMES:
        return _DTYPE
    if not is_kernel_eps(options.eps):
        return _EPS
    if any(t.dtype != h_0.dtype for t in present(*tensors) if t is not tensors.matrix):
        return _DTYPES
    all_tensors = present(*tensors)
    if torch.compiler.is_compiling() or graph_recording(*all_tensors):
        compiled = devices.serves(h_0.device.type) and not in_transform() and not _to_onnx()
        return YES if compiled else _PROGRAM
    if _tracing():
        return _PROGRAM
    return kernel_support(all_tensors, hidden, watched=is_checkpointed(*all_tensors))


def _eager_is_faster(tensors: SequenceTensors, options: SequenceOptions, keep: bool) -> bool:
    """Whether a step of the whole batch was measured to be faster in eager mode, forward alone or,
    with `keep`, in training. Then the sequence is eager mode's throughout: its backward takes what
    its forward kept.
    """
    device = devices.of(tensors.h_0.device)
    if device is None or not tensors.h_0.numel() or graph_recording(*present(*tensors)):
        return False
    step = tensors.step(tensors.gates_x)
    case = case_of(NAME, step, tensors.h_0.shape[0], options.normalized_cell, keep)
    choice = dispatch.choose(case, device)
    return choice.tier == "eager" and choice.record is not None


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Products in the dtypes of their factors, which were chosen before: a backward may run under
    another autocast than its forward.
    """
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _forward(*flat: Any, into: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
    """lnlstm_loops.forward as graphs.run calls it, with its tensors one by one."""
    return lnlstm_loops.forward(SequenceTensors(*flat[:_TENSORS]), *flat[_TENSORS:], into=into)


def _backward(
    dout: Tensor, dh_n: Tensor, dc_n: Tensor, *flat: Any, into: Sequence[Tensor] | None = None
) -> tuple[Tensor, ...]:
    """lnlstm_loops.backward as graphs.run calls it, with its tensors one by one."""
    saved, *rest = SavedSteps(*flat[:_SAVED]), *flat[_SAVED:]
    tensors, options = SequenceTensors(*rest[:_TENSORS]), rest[_TENSORS:]
    return lnlstm_loops.backward(dout, dh_n, dc_n, saved, tensors, *options, into=into)


@torch.library.custom_op("lntune::lnlstm_sequence", mutates_args=(), device_types=devices.TYPES)
def lnlstm_sequence_op(
    gates_x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    matrix: Tensor,
    weight_x: Tensor | None,
    weight_h: Tensor,
    weight_c: Tensor,
    bias: Tensor | None,
    bias_c: Tensor | None,
    sizes: list[int],
    eps: float,
    carried: bool,
    reverse: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(h, h_n, c_n, gates_h, c, statistics); the last three, empty without `keep`, are of all steps
    and for the backward.
    """
    tensors = SequenceTensors(gates_x, h_0, c_0, matrix, weight_x, weight_h, weight_c, bias, bias_c)
    steps = step_sizes(sizes, gates_x.shape[0], h_0.shape[0])
    early = lnlstm_loops.starts_early()
    options = SequenceOptions(eps, carried, False, reverse)
    with _without_autocast(h_0.device):
        return graphs.run(_forward, tensors, (steps, options, keep, early))  # type: ignore[return-value]


@lnlstm_sequence_op.register_fake
def _fake(*flat: Any) -> tuple[Tensor, ...]:
    tensors, keep = SequenceTensors(*flat[:_TENSORS]), flat[-1]
    gates_x, h_0 = tensors.gates_x, tensors.h_0
    (rows, gates), hidden = gates_x.shape, h_0.shape[1]
    kept_rows = rows if keep else 0
    return (
        gates_x.new_empty(rows, hidden),
        torch.empty_like(h_0),
        torch.empty_like(tensors.c_0),
        gates_x.new_empty(kept_rows, gates),
        gates_x.new_empty(kept_rows, hidden),
        gates_x.new_empty(
            lnlstm_loops.statistics_count(tensors.weight_x), kept_rows, dtype=torch.float32
        ),
    )


@torch.library.custom_op(
    "lntune::lnlstm_sequence_backward", mutates_args=(), device_types=devices.TYPES
)
def lnlstm_sequence_backward_op(
    dout: Tensor,
    dh_n: Tensor,
    dc_n: Tensor,
    out: Tensor,
    gates_h: Tensor,
    cells: Tensor,
    stats: Tensor,
    gates_x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    matrix: Tensor,
    weight_x: Tensor | None,
    weight_h: Tensor,
    weight_c: Tensor,
    bias: Tensor | None,
    bias_c: Tensor | None,
    sizes: list[int],
    carried: bool,
    reverse: bool,
) -> list[Tensor]:
    """The gradients of the tensors from gates_x on that are not None, in order."""
    saved = SavedSteps(out, gates_h, cells, stats)
    tensors = SequenceTensors(gates_x, h_0, c_0, matrix, weight_x, weight_h, weight_c, bias, bias_c)
    steps = step_sizes(sizes, gates_x.shape[0], h_0.shape[0])
    flat = (dout, dh_n, dc_n, *saved, *tensors)
    early = lnlstm_loops.starts_early()
    with _without_autocast(h_0.device):
        return list(graphs.run(_backward, flat, (steps, carried, reverse, early)))


@lnlstm_sequence_backward_op.register_fake
def _fake_backward(*flat: Any) -> list[Tensor]:
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in present(*flat[_FIRST : _FIRST + _TENSORS])
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.sizes, eps, carried, reverse, ctx.keep = inputs[_TENSORS:]
    ctx.options = SequenceOptions(eps, carried, False, reverse)
    out, _, _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # zeros for what is kept would be as large as that
    ctx.save_for_backward(*inputs[:_TENSORS], out, *kept)


def _op_backward(ctx: Any, *grads_out: Tensor | None) -> tuple[Any, ...]:
    flat: Any = ctx.saved_tensors
    tensors, saved = SequenceTensors(*flat[:_TENSORS]), SavedSteps(*flat[_TENSORS:])
    like = (saved.out, tensors.h_0, tensors.c_0)
    dout, dh_n, dc_n = (
        torch.zeros_like(t) if g is None else g for g, t in zip(grads_out, like, strict=False)
    )
    sizes, options = ctx.sizes, ctx.options
    wanted = ctx.needs_input_grad[:_TENSORS]
    if torch.is_grad_enabled() or is_batched(dout, dh_n, dc_n, *tensors):

        def function(*own: Any) -> tuple[Tensor, Tensor, Tensor]:
            return by_steps(*SequenceTensors(*own), sizes, *options)

        return *recorded_backward(function, tensors, (dout, dh_n, dc_n), wanted), *[None] * 5
    # a program that was written without gradients: what the backward takes is made now
    if not ctx.keep:
        *_, gates_h, cells, statistics = torch.ops.lntune.lnlstm_sequence(
            *tensors, sizes, options.eps, options.normalized_cell, options.reverse, True
        )
        saved = SavedSteps(saved.out, gates_h, cells, statistics)
    op = torch.ops.lntune.lnlstm_sequence_backward
    flags = (options.normalized_cell, options.reverse)
    computed = iter(op(dout, dh_n, dc_n, *saved, *tensors, sizes, *flags))
    grads = [None if t is None else next(computed) for t in tensors]
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *[None] * 5


lnlstm_sequence_op.register_autograd(_op_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.lntune.lnlstm_sequence)
def _flops(gates_x: torch.Size, h_0: torch.Size, *_: Any, **__: Any) -> int:
    """What a FlopCounterMode counts: the products with the recurrent matrix, one for each row."""
    return 2 * math.prod(gates_x) * h_0[1]


@register_flop_formula(torch.ops.lntune.lnlstm_sequence_backward)
def _flops_backward(*shapes: Any, **_: Any) -> int:
    """As many for the gradient of the state, and for that of the matrix."""
    return 2 * _flops(*shapes[_FIRST : _FIRST + 2])
