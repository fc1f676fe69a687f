"""The time loops of an LN-LSTM layer in one direction, forward and backward: one matrix product and
one kernel a step.

The gradient of the recurrent matrix is a product over many time steps at once, the gradients of
gains and biases are summed inside the kernels, outputs are written where they belong, and of the
gates only what enters a layer norm is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lntune.ops import lnlstm_step_backward
from lntune.ops.lnlstm_step import NAME, statistics
from lntune.torch import dispatch
from lntune.torch.lnlstm_backward import case_of, zero_sums
from lntune.torch.products import product, repeated

_VECTORS = ("weight_x", "weight_h", "weight_c", "bias", "bias_c")
"""The vectors of a step, in the order of the kernels' arguments."""
Step = tuple[int, int | None]
"""A step, and the one computed before it, if there is one."""


def _steps(sizes: Sequence[int], reverse: bool) -> Iterator[Step]:
    """The steps that have sequences, in the order of computing."""
    order = [t for t in range(len(sizes)) if sizes[t]][:: -1 if reverse else 1]
    return zip(order, (None, *order), strict=False)


def _before(t: int | None, n: int, rows: Sequence[Tensor], first: Tensor) -> Tensor:
    """The state of n sequences after step t, those which have no such step from the initial
    state.
    """
    last = first if t is None else rows[t]
    return _first(last, n) if n <= last.shape[0] else torch.cat((last, first[last.shape[0] : n]))


def _first(rows: Tensor, n: int) -> Tensor:
    """The first n rows; a view of all of them would cost more than asking."""
    return rows if n == rows.shape[0] else rows[:n]


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


def moments(weight_x: Tensor | None) -> int:
    """How many statistics a step keeps of a row."""
    return len(statistics(() if weight_x is None else ("raw",)))


def forward(
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
) -> tuple[Tensor, ...]:
    """(h, h_n, c_n, gates_h, c, statistics) as lnlstm_sequence_op gives them, step by step."""
    gates_x, h_0, c_0 = (t.contiguous() for t in (gates_x, h_0, c_0))
    rows, hidden, most = gates_x.shape[0], h_0.shape[1], max(sizes)
    out = gates_x.new_empty(rows, hidden)
    every = rows if keep else 0
    gates_h, cells = gates_x.new_empty(every, 4 * hidden), gates_x.new_empty(every, hidden)
    stats = h_0.new_empty(moments(weight_x), every, dtype=torch.float32)
    outs, inputs = out.split(sizes), gates_x.split(sizes)
    if keep:
        gates, states, kept = (
            gates_h.split(sizes),
            cells.split(sizes),
            list(zip(*(s.split(sizes) for s in stats), strict=True)),
        )
    else:  # two cells take turns, and only the ends of sequences are kept
        pair = [gates_x.new_empty(most, hidden) for _ in range(2)]
        gates, kept = [None] * len(sizes), [()] * len(sizes)
        states = (
            [pair[t % 2][:n] for t, n in enumerate(sizes)]
            if len(set(sizes)) == 1
            else gates_x.new_empty(rows, hidden).split(sizes)
        )
    given = {
        "c": c_0,
        "weight_x": weight_x,
        "weight_h": weight_h,
        "weight_c": weight_c,
        "bias": bias,
        "bias_c": bias_c,
    }
    there = {name: t.contiguous() for name, t in given.items() if t is not None}
    vectors = [there[name] for name in _VECTORS if name in there]
    kernels = {
        n: dispatch.serve(case_of(NAME, there, n, carried, keep), (gates_x, *there.values()))
        for n in set(sizes)
        if n
    }
    recur = repeated(matrix, most, len(sizes))
    for t, before in _steps(sizes, reverse):
        n = sizes[t]
        its = recur(_before(before, n, outs, h_0), None, gates[t])
        kernels[n](
            inputs[t],
            its,
            _before(before, n, states, c_0),
            *vectors,
            eps,
            outs[t],
            states[t],
            *kept[t],
        )
    return out, _ends(outs, most, reverse), _ends(states, most, reverse), gates_h, cells, stats


def backward(
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
) -> tuple[Tensor, ...]:
    """The gradients of the tensors from gates_x on that are there, in order, step by step."""
    vectors_given = {
        "weight_x": weight_x,
        "weight_h": weight_h,
        "weight_c": weight_c,
        "bias": bias,
        "bias_c": bias_c,
    }
    given = {"gates_x": gates_x, "gates_h": gates_h, "c": c_0, **vectors_given}
    there = {name: t.contiguous() for name, t in given.items() if t is not None}
    h_0, c_0, dout = h_0.contiguous(), c_0.contiguous(), dout.contiguous()
    outs, states, douts, gates, inputs = (
        t.split(sizes) for t in (out, cells, dout, gates_h, there["gates_x"])
    )
    kept = list(zip(*(s.split(sizes) for s in stats), strict=True))
    dgates_x, dgates_h = torch.empty_like(there["gates_x"]), torch.empty_like(gates_h)
    dinputs, dgates = dgates_x.split(sizes), dgates_h.split(sizes)
    vectors = [there[name] for name in _VECTORS if name in there]
    cases = {n: case_of(lnlstm_step_backward.NAME, there, n, carried) for n in set(sizes) if n}
    kernels = {n: dispatch.serve(case, (dout, *there.values())) for n, case in cases.items()}
    sums = {case.bucket: zero_sums(case, out) for case in cases.values()}
    recur = repeated(matrix.t(), sizes[0], len(sizes))

    # What reaches each sequence's steps from behind: at first what comes to its last, in the end
    # what leaves its first.
    dh_0, dc_0 = (t.clone(memory_format=torch.contiguous_format) for t in (dh_n, dc_n))
    dh, dc, spare = None, dc_0, torch.empty_like(dc_0)
    steps = list(_steps(sizes, reverse))
    for t, before in reversed(steps):
        n = sizes[t]
        dh = douts[t] + _first(dh_0, n) if dh is None else dh
        values = (
            *vectors,
            *kept[t],
            dinputs[t],
            dgates[t],
            _first(spare, n),
            *sums[cases[n].bucket].values(),
        )
        kernels[n](dh, _first(dc, n), inputs[t], gates[t], _before(before, n, states, c_0), *values)
        dc, spare = spare, dc
        if before is not None and sizes[before] == n:
            dh = recur(dgates[t], douts[before], None)
        # the step before has other sequences; what comes from behind has to be in one place for all
        # of them
        else:
            recur(dgates[t], None, _first(dh_0, n))
            dh = None
            if dc is not dc_0:
                spare[:n] = dc[:n]
                dc, spare = spare, dc
    del recur  # with the packed matrix, as large as what is made here
    its_h = torch.cat(
        [h_0[:0], *(_before(before, sizes[t], outs, h_0) for t, before in sorted(steps))]
    ).to(matrix.dtype)
    dmatrix = product(dgates_h.to(matrix.dtype).t(), its_h.t())

    grads = {"gates_x": dgates_x, "h_0": dh_0, "c_0": dc_0, "matrix": dmatrix}
    for name in _VECTORS:
        if name in there:
            total = sum(
                (its[f"d{name}"].sum(0) for its in sums.values()),
                there[name].new_zeros(there[name].shape, dtype=torch.float32),
            )
            grads[name] = total.to(there[name].dtype)
    return tuple(grads.values())
