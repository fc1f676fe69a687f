"""LN-LSTM steps over a whole sequence, in one direction: one matrix product and one kernel a time step, forward and backward.

As one operator it spares what autograd would do at every step: the gradient of the recurrent matrix is a product over many time steps
at once, the gradients of gains and biases are summed inside the kernels, outputs are written where they belong, and of the gates only
what enters a layer norm is kept. torch.compile sees one node, `lntune::lnlstm_sequence`, however long the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lntune.case import MAX_HIDDEN
from lntune.errors import InputError
from lntune.ops import lnlstm_step_backward
from lntune.ops.lnlstm_step import NAME, formula
from lntune.torch import dispatch
from lntune.torch.arguments import NAMES, recorded, served
from lntune.torch.lnlstm_backward import case_of, recorded_backward, zero_sums


def lnlstm_sequence(
    gates_x: Tensor,  # (rows of all steps, 4 * hidden), normalized: LN(W_ih x)
    h_0: Tensor,  # (batch, hidden)
    c_0: Tensor,  # (batch, hidden)
    matrix: Tensor,  # (4 * hidden, hidden): W_hh
    weight_h: Tensor,  # (4 * hidden,)
    weight_c: Tensor,  # (hidden,)
    bias: Tensor | None,  # (4 * hidden,)
    bias_c: Tensor | None,  # (hidden,)
    sizes: Sequence[int],
    eps: float,
    carried: bool,
    per_gate: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(h of all steps, laid out as gates_x, h_n and c_n) of `lntune.torch.lnlstm.lnlstm_step` from step to step.

    Step t has the first sizes[t] sequences, sizes never rising, and their rows follow those of the steps before; `reverse` begins at the
    last step. A sequence's state is taken up from h_0 and c_0 at its first step and handed on to h_n and c_n after its last.
    """
    tensors = (gates_x, h_0, c_0, weight_h, weight_c, bias, bias_c)
    there = [t for t in (*tensors, matrix) if t is not None]
    hidden = h_0.shape[-1]
    if (
        per_gate
        or hidden > MAX_HIDDEN // 4
        or h_0.dtype not in NAMES
        or any(t.dtype != h_0.dtype for t in tensors if t is not None)
        or not (torch.compiler.is_dynamo_compiling() or all(served(t, None, None, hidden) for t in there))
        or h_0.device.type != "cpu"
    ):
        return by_steps(gates_x, h_0, c_0, matrix, weight_h, weight_c, bias, bias_c, sizes, eps, carried, per_gate, reverse)
    keep = recorded(*there)
    op = torch.ops.lntune.lnlstm_sequence
    out, h_n, c_n, *_ = op(gates_x, h_0, c_0, matrix, weight_h, weight_c, bias, bias_c, list(sizes), eps, carried, reverse, keep)
    return out, h_n, c_n


def by_steps(
    gates_x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    matrix: Tensor,
    weight_h: Tensor,
    weight_c: Tensor,
    bias: Tensor | None,
    bias_c: Tensor | None,
    sizes: Sequence[int],
    eps: float,
    carried: bool,
    per_gate: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in PyTorch's operators, in any dtype and on any device, differentiable as often as those are."""
    gates = gates_x.split(list(sizes))
    order = range(len(sizes))[:: -1 if reverse else 1]
    out, ended = list(gates), []
    h, c = h_0[: sizes[order[0]]], c_0[: sizes[order[0]]]
    for t in order:
        now, n = h.shape[0], sizes[t]
        if n < now:  # forwards, the shorter sequences end
            ended.append((h[n:], c[n:]))
            h, c = h[:n], c[:n]
        elif n > now:  # backwards, they begin
            h, c = torch.cat((h, h_0[now:n])), torch.cat((c, c_0[now:n]))
        gates_h = torch.nn.functional.linear(h, matrix).to(c.dtype)
        h, c = formula(gates[t].to(c.dtype), gates_h, c, None, weight_h, weight_c, bias, bias_c, eps, carried, per_gate)
        out[t] = h
    if ended:
        h, c = (torch.cat((last, *(e[i] for e in reversed(ended)))) for i, last in enumerate((h, c)))
    return torch.cat(out), h, c


_VECTORS = ("weight_h", "weight_c", "bias", "bias_c")
"""The vectors of a step, in the order of the kernels' arguments."""
Step = tuple[int, int | None]
"""A step, and the one computed before it, if there is one."""
_CHUNK_ROWS = 256
"""Rows to a product for the recurrent matrix's gradient: as fast as all rows at once, and their gates' gradients need not all be kept."""
_PACKED_FROM = {True: (32, 1 << 19), False: (8, 0)}
"""By whether the matrix is float32: steps and elements from which on packing it pays. It costs two or three products; a small float32
matrix is in the cache and multiplied as fast as it is, low precision may have no other fast way.
"""


def _times(matrix: Tensor, rows: int, steps: int) -> Callable[[Tensor, Tensor], Any]:
    """f(a, out): a @ matrix.T, computed in the dtype of `matrix`, into `out`; for up to `rows` rows of a, about `steps` times.

    For a few rows a product mostly reads and rearranges its matrix. oneDNN, which PyTorch brings, can have it rearranged once
    (torch.compile does the same for inference): 1.1 to 1.5 times as fast at 32 rows, depending on the CPU.
    """
    single = matrix.dtype == torch.float32
    least_steps, least = _PACKED_FROM[single]
    if not single:
        matrix = matrix.contiguous()  # a plain loop multiplies by matrices in any other order, on CPUs without instructions for it
    if steps >= least_steps and matrix.numel() >= least and torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled():
        op = torch.ops.mkldnn
        try:
            packed = op._reorder_linear_weight(matrix.contiguous(), rows)
        except (AttributeError, RuntimeError):  # another PyTorch, or a CPU without instructions for the dtype
            pass
        else:
            return lambda a, out: out.copy_(op._linear_pointwise(a.to(matrix.dtype), packed, None, "none", [], ""))
    transposed = matrix.t()
    return lambda a, out: torch.mm(a, transposed, out=out) if a.dtype == matrix.dtype else out.copy_(torch.mm(a.to(matrix.dtype), transposed))


def _steps(sizes: Sequence[int], reverse: bool) -> Iterator[Step]:
    """The steps that have sequences, in the order of computing."""
    order = [t for t in range(len(sizes)) if sizes[t]][:: -1 if reverse else 1]
    return zip(order, (None, *order), strict=False)


def _chunks(steps: Iterable[Step], sizes: Sequence[int]) -> Iterator[list[Step]]:
    """The steps in order, in lists of about _CHUNK_ROWS rows."""
    chunk: list[Step] = []
    rows = 0
    for step in steps:
        chunk.append(step)
        rows += sizes[step[0]]
        if rows >= _CHUNK_ROWS:
            yield chunk
            chunk, rows = [], 0
    if chunk:
        yield chunk


def _before(t: int | None, n: int, rows: Sequence[Tensor], first: Tensor) -> Tensor:
    """The state of n sequences after step t, those which have no such step from the initial state."""
    if t is None:
        return first[:n]
    last = rows[t]
    return last[:n] if n <= last.shape[0] else torch.cat((last, first[last.shape[0] : n]))


def _ends(rows: Sequence[Tensor], batch: int, reverse: bool) -> Tensor:
    """The state after each sequence's last step, (batch, hidden)."""
    if reverse or not batch:
        return rows[0].clone()
    ends, have = [], 0
    for t in range(len(rows))[::-1]:
        if rows[t].shape[0] > have:
            ends.append(rows[t][have:])
            have = rows[t].shape[0]
        if have == batch:
            break
    return torch.cat(ends)


@torch.library.custom_op("lntune::lnlstm_sequence", mutates_args=(), device_types="cpu")
def lnlstm_sequence_op(
    gates_x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    matrix: Tensor,
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
    """(h, h_n, c_n, gates_h, c, statistics); the last three, empty without `keep`, are of all steps and for the backward."""
    gates_x, h_0, c_0 = (t.contiguous() for t in (gates_x, h_0, c_0))
    rows, hidden, most = gates_x.shape[0], h_0.shape[1], max(sizes)
    out = gates_x.new_empty(rows, hidden)
    every = rows if keep else 0
    gates_h, cells, stats = gates_x.new_empty(every, 4 * hidden), gates_x.new_empty(every, hidden), h_0.new_empty(4, every, dtype=torch.float32)
    outs, inputs = out.split(sizes), gates_x.split(sizes)
    if keep:
        gates, states, moments = gates_h.split(sizes), cells.split(sizes), list(zip(*(s.split(sizes) for s in stats), strict=True))
    else:  # two cells take turns, and only the ends of sequences are kept
        scratch, pair = gates_x.new_empty(most, 4 * hidden), [gates_x.new_empty(most, hidden) for _ in range(2)]
        gates, moments = [scratch[:n] for n in sizes], [()] * len(sizes)
        states = [pair[t % 2][:n] for t, n in enumerate(sizes)] if len(set(sizes)) == 1 else gates_x.new_empty(rows, hidden).split(sizes)
    given = {"c": c_0, "weight_h": weight_h, "weight_c": weight_c, "bias": bias, "bias_c": bias_c}
    there = {name: t.contiguous() for name, t in given.items() if t is not None}
    vectors = [there[name] for name in _VECTORS if name in there]
    kernels = {n: dispatch.serve(case_of(NAME, there, n, carried, keep)) for n in set(sizes) if n}
    recur = _times(matrix, most, len(sizes))
    for t, before in _steps(sizes, reverse):
        n = sizes[t]
        recur(_before(before, n, outs, h_0), gates[t])
        kernels[n](inputs[t], gates[t], _before(before, n, states, c_0), *vectors, eps, outs[t], states[t], *moments[t])
    return out, _ends(outs, most, reverse), _ends(states, most, reverse), gates_h, cells, stats


@lnlstm_sequence_op.register_fake
def _fake(
    gates_x: Tensor, h_0: Tensor, c_0: Tensor, matrix: Tensor, weight_h: Tensor, weight_c: Tensor, bias: Any, bias_c: Any, sizes: Any, *rest: Any
) -> tuple[Tensor, ...]:
    *_, keep = rest
    (rows, gates), hidden = gates_x.shape, h_0.shape[1]
    every = rows if keep else 0
    kept = gates_x.new_empty(every, gates), gates_x.new_empty(every, hidden), gates_x.new_empty(4, every, dtype=torch.float32)
    return gates_x.new_empty(rows, hidden), torch.empty_like(h_0), torch.empty_like(c_0), *kept


@torch.library.custom_op("lntune::lnlstm_sequence_backward", mutates_args=(), device_types="cpu")
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
    weight_h: Tensor,
    weight_c: Tensor,
    bias: Tensor | None,
    bias_c: Tensor | None,
    sizes: list[int],
    carried: bool,
    reverse: bool,
) -> list[Tensor]:
    """The gradients of the tensors from gates_x on that are there, in order."""
    given = {"gates_x": gates_x, "gates_h": gates_h, "c": c_0, "weight_h": weight_h, "weight_c": weight_c, "bias": bias, "bias_c": bias_c}
    there = {name: t.contiguous() for name, t in given.items() if t is not None}
    h_0, c_0, dout = h_0.contiguous(), c_0.contiguous(), dout.contiguous()
    outs, states, douts, gates, inputs = (t.split(sizes) for t in (out, cells, dout, gates_h, there["gates_x"]))
    moments = list(zip(*(s.split(sizes) for s in stats), strict=True))
    dgates_x, dmatrix = torch.empty_like(there["gates_x"]), torch.zeros_like(matrix, dtype=torch.float32)
    dinputs = dgates_x.split(sizes)
    vectors = [there[name] for name in _VECTORS if name in there]
    cases = {n: case_of(lnlstm_step_backward.NAME, there, n, carried) for n in set(sizes) if n}
    kernels = {n: dispatch.serve(case) for n, case in cases.items()}
    sums = {case.bucket: zero_sums(case, out) for case in cases.values()}
    recur = _times(matrix.t(), sizes[0], len(sizes))

    # Of each sequence: what comes from behind its last step, and in the end what leaves its first.
    dh_0, dc_0 = (t.clone(memory_format=torch.contiguous_format) for t in (dh_n, dc_n))
    for steps in _chunks(reversed(list(_steps(sizes, reverse))), sizes):
        dgates = gates_h.new_empty(sum(sizes[t] for t, _ in steps), gates_h.shape[1])
        for (t, before), its in zip(steps, dgates.split([sizes[t] for t, _ in steps]), strict=True):
            n = sizes[t]
            dh = torch.add(douts[t], dh_0[:n])
            values = (*vectors, *moments[t], dinputs[t], its, dc_0[:n], *sums[cases[n].bucket].values())
            kernels[n](dh, dc_0[:n].clone(), inputs[t], gates[t], _before(before, n, states, c_0), *values)
            recur(its, dh_0[:n])
        its_h = torch.cat([_before(before, sizes[t], outs, h_0) for t, before in steps]).to(matrix.dtype)
        if matrix.dtype == dmatrix.dtype:
            dmatrix.addmm_(dgates.to(matrix.dtype).t(), its_h)
        else:
            dmatrix += torch.mm(dgates.to(matrix.dtype).t(), its_h)
    dmatrix = dmatrix.to(matrix.dtype)

    grads = {"gates_x": dgates_x, "h_0": dh_0, "c_0": dc_0, "matrix": dmatrix}
    for name in _VECTORS:
        if name in there:
            total = sum((its[f"d{name}"].sum(0) for its in sums.values()), there[name].new_zeros(there[name].shape, dtype=torch.float32))
            grads[name] = total.to(there[name].dtype)
    return list(grads.values())


@lnlstm_sequence_backward_op.register_fake
def _fake_backward(*arguments: Any) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in arguments[7:15] if t is not None]


_TENSORS = 8  # arguments of the operator that are tensors, and come first


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *ctx.sizes_and_options, keep = inputs[_TENSORS:]
    out, _, _, *kept = output
    ctx.keep = keep
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # zeros for what is kept would be as large as that
    ctx.save_for_backward(*inputs[:_TENSORS], out, *kept)


def _op_backward(ctx: Any, *grads_out: Tensor | None) -> tuple[Any, ...]:
    saved: Any = ctx.saved_tensors
    tensors, kept = saved[:_TENSORS], saved[_TENSORS:]
    like = (kept[0], tensors[1], tensors[2])
    dout, dh_n, dc_n = (torch.zeros_like(t) if g is None else g for g, t in zip(grads_out, like, strict=False))
    sizes, eps, carried, reverse = ctx.sizes_and_options
    if not ctx.keep:
        raise InputError("keep: got False, expected True where a gradient is wanted; what the backward needs was not kept.")
    wanted = ctx.needs_input_grad[:_TENSORS]
    if torch.is_grad_enabled():

        def function(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
            return by_steps(*(*given, sizes, eps, carried, False, reverse))

        return *recorded_backward(function, tensors, (dout, dh_n, dc_n), wanted), *[None] * 5
    op = torch.ops.lntune.lnlstm_sequence_backward
    made = iter(op(dout, dh_n, dc_n, *kept, *tensors, sizes, carried, reverse))
    grads = [None if t is None else next(made) for t in tensors]
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *[None] * 5


lnlstm_sequence_op.register_autograd(_op_backward, setup_context=_setup_context)
