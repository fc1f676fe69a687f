"""The time loops of an LSTM layer with layer normalization in one direction, forward and backward:
one matrix product and one kernel a step.

The gradient of the recurrent matrix is a product over many time steps at once, the gradients of
gains and biases are summed inside the kernels, outputs are written where they belong, and of the
gates only what enters a layer norm is kept.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lntune import backends
from lntune.ops import lnlstm_step_backward
from lntune.ops.lnlstm_step import NAME, statistics
from lntune.torch import devices, dispatch
from lntune.torch.lnlstm_arguments import (
    SavedSteps,
    SequenceOptions,
    SequenceTensors,
    StepTensors,
)
from lntune.torch.lnlstm_backward import case_of, zero_sums
from lntune.torch.products import product, repeated

_MATRICES = 3
"""Tensors of a step that are matrices, and come first; vectors follow."""
Step = tuple[int, int | None]
"""A step, and the one computed before it, if there is one."""


def _steps(sizes: Sequence[int], reverse: bool) -> Iterator[Step]:
    """The steps that have sequences, in the order of computing."""
    order = [t for t in range(len(sizes)) if sizes[t]][:: -1 if reverse else 1]
    return zip(order, (None, *order), strict=False)


def starts_early() -> bool:
    """Whether kernels of steps may begin early, see _overlapping: LNTUNE_EARLY_START=0 says no."""
    return os.environ.get("LNTUNE_EARLY_START", "1") != "0"


def _overlapping(tensor: Tensor, early: bool) -> contextlib.AbstractContextManager[None]:
    """In the block a step's kernel may begin before the product before it has ended, see
    Backend.overlapping: for all steps but a loop's first, which is behind what came before the
    loop.

    What a kernel reads before it waits for the product is written by no step: gains and biases,
    gates_x and, in the backward, gates_h and statistics. The state, which steps write and hand on,
    and what `_before` puts together of it, it reads behind the wait.
    """
    device = devices.of(tensor.device) if early else None
    return contextlib.nullcontext() if device is None else backends.of(device).overlapping()


def _before(t: int | None, n: int, rows: Sequence[Tensor], first: Tensor) -> Tensor:
    """The state of n sequences after step t, those which have no such step from the initial
    state.
    """
    last = first if t is None else rows[t]
    return _first(last, n) if n <= last.shape[0] else torch.cat((last, first[last.shape[0] : n]))


def _first(rows: Tensor, n: int) -> Tensor:
    """The first n rows; a view of all of them would cost more than asking."""
    return rows if n == rows.shape[0] else rows[:n]


def _ends(rows: Sequence[Tensor], into: Tensor, reverse: bool) -> Tensor:
    """The state after each sequence's last step, (batch, hidden), in `into`."""
    batch = into.shape[0]
    if reverse or not batch:
        return into.copy_(rows[0])
    ends, have = [], 0
    for t in range(len(rows))[::-1]:
        if rows[t].shape[0] > have:
            ends.append(rows[t][have:])
            have = rows[t].shape[0]
        if have == batch:
            break
    return torch.cat(ends, out=into)


def _copied(t: Tensor, into: Tensor | None) -> Tensor:
    """A contiguous copy, in `into` or in a new tensor."""
    return t.clone(memory_format=torch.contiguous_format) if into is None else into.copy_(t)


def _contiguous(tensors: SequenceTensors) -> SequenceTensors:
    """The same tensors as kernels take them; the matrix, which products take in any layout, as it
    is.
    """
    matrix = tensors.matrix
    flat = (t if t is None or t is matrix else t.contiguous() for t in tensors)
    return SequenceTensors(*flat)  # type: ignore[arg-type]


def _vectors(step: StepTensors) -> list[Tensor]:
    """The vectors of a step that are not None, in the order of the kernels' arguments."""
    return [v for v in step[_MATRICES:] if v is not None]


def statistics_count(weight_x: Tensor | None) -> int:
    """How many statistics a step keeps of a row."""
    return len(statistics(() if weight_x is None else ("raw",)))


def _new_outputs(tensors: SequenceTensors, batch: int, keep: bool) -> tuple[Tensor, ...]:
    """Memory for what `forward` gives."""
    gates_x, h_0 = tensors.gates_x, tensors.h_0
    rows, hidden = gates_x.shape[0], h_0.shape[1]
    kept_rows = rows if keep else 0
    return (
        gates_x.new_empty(rows, hidden),
        gates_x.new_empty(batch, hidden),
        gates_x.new_empty(batch, hidden),
        gates_x.new_empty(kept_rows, 4 * hidden),
        gates_x.new_empty(kept_rows, hidden),
        h_0.new_empty(statistics_count(tensors.weight_x), kept_rows, dtype=torch.float32),
    )


def forward(
    tensors: SequenceTensors,
    sizes: list[int],
    options: SequenceOptions,
    keep: bool,
    early: bool = True,
    *,
    into: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """(h, h_n, c_n, gates_h, c, statistics) as lnlstm_sequence_op gives them, step by step, with
    the first sizes[t] sequences at t; in `into`, contiguous tensors of their shapes, or in new
    ones. `early`: steps' kernels may begin early.
    """
    tensors = _contiguous(tensors)
    gates_x, h_0, c_0 = tensors.gates_x, tensors.h_0, tensors.c_0
    rows, hidden, most = gates_x.shape[0], h_0.shape[1], max(sizes)
    out, h_n, c_n, *kept = into or _new_outputs(tensors, most, keep)
    saved = SavedSteps(out, *kept)
    outs, inputs = out.split(sizes), gates_x.split(sizes)
    if keep:
        gates, states = saved.gates_h.split(sizes), saved.cells.split(sizes)
        moments = list(zip(*(s.split(sizes) for s in saved.statistics), strict=True))
    else:  # two cells take turns, and only the ends of sequences are kept
        pair = [gates_x.new_empty(most, hidden) for _ in range(2)]
        gates, moments = [None] * len(sizes), [()] * len(sizes)
        states = (
            [pair[t % 2][:n] for t, n in enumerate(sizes)]
            if len(set(sizes)) == 1
            else gates_x.new_empty(rows, hidden).split(sizes)
        )
    step = tensors.step(gates_x)
    vectors = _vectors(step)
    kernels = {
        n: dispatch.serve(
            case_of(NAME, step, n, options.normalized_cell, keep), (gates_x, c_0, *vectors)
        )
        for n in set(sizes)
        if n
    }
    recur = repeated(tensors.matrix, most, len(sizes))
    with contextlib.ExitStack() as behind_the_first:
        for number, (t, before) in enumerate(_steps(sizes, options.reverse)):
            if number == 1:
                behind_the_first.enter_context(_overlapping(gates_x, early))
            n = sizes[t]
            gates_h = recur(_before(before, n, outs, h_0), None, gates[t])
            kernels[n](
                inputs[t],
                gates_h,
                _before(before, n, states, c_0),
                *vectors,
                options.eps,
                outs[t],
                states[t],
                *moments[t],
            )
    _ends(outs, h_n, options.reverse)
    _ends(states, c_n, options.reverse)
    return out, h_n, c_n, *kept


def backward(
    dout: Tensor,
    dh_n: Tensor,
    dc_n: Tensor,
    saved: SavedSteps,
    tensors: SequenceTensors,
    sizes: list[int],
    normalized_cell: bool,
    reverse: bool,
    early: bool = True,
    *,
    into: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of `tensors` that are not None, in order, step by step.

    Args:
        dout: (rows of all steps, hidden), gradient of h.
        dh_n: (batch, hidden), gradient of h_n.
        dc_n: (batch, hidden), gradient of c_n.
        saved: what the forward kept.
        tensors: the forward's.
        sizes: how many sequences each step has.
        normalized_cell: as SequenceOptions'.
        reverse: as SequenceOptions'.
        early: steps' kernels may begin early.
        into: where the gradients shall be, contiguous tensors of their shapes; else in new ones.
    """
    names = [name for name, t in zip(tensors._fields, tensors, strict=True) if t is not None]
    given = dict(zip(names, into, strict=True)) if into else {}
    tensors, dout = _contiguous(tensors), dout.contiguous()
    # who packs and unpacks saved tensors may give them back in another layout
    saved = SavedSteps(*(t.contiguous() for t in saved))
    h_0, c_0, matrix = tensors.h_0, tensors.c_0, tensors.matrix
    outs, gates, states = (t.split(sizes) for t in (saved.out, saved.gates_h, saved.cells))
    douts, inputs = dout.split(sizes), tensors.gates_x.split(sizes)
    moments = list(zip(*(s.split(sizes) for s in saved.statistics), strict=True))
    dgates_x = given["gates_x"] if given else torch.empty_like(tensors.gates_x)
    dgates_h = torch.empty_like(saved.gates_h)
    dinputs, dgates = dgates_x.split(sizes), dgates_h.split(sizes)
    step = tensors.step(saved.gates_h)
    vectors = _vectors(step)
    cases = {
        n: case_of(lnlstm_step_backward.NAME, step, n, normalized_cell) for n in set(sizes) if n
    }
    kernels = {
        n: dispatch.serve(case, (dout, *step.present().values())) for n, case in cases.items()
    }
    sums = {case.bucket: zero_sums(case, saved.out) for case in cases.values()}
    recur = repeated(matrix.t(), sizes[0], len(sizes))

    # What reaches each sequence's steps from behind: at first what comes to its last, in the end
    # what leaves its first.
    dh_0, dc_0 = _copied(dh_n, given.get("h_0")), _copied(dc_n, given.get("c_0"))
    dh, dc, spare = None, dc_0, torch.empty_like(dc_0)
    steps = list(_steps(sizes, reverse))
    with contextlib.ExitStack() as behind_the_first:
        for number, (t, before) in enumerate(reversed(steps)):
            if number == 1:
                behind_the_first.enter_context(_overlapping(dout, early))
            n = sizes[t]
            dh = douts[t] + _first(dh_0, n) if dh is None else dh
            values = (
                *vectors,
                *moments[t],
                dinputs[t],
                dgates[t],
                _first(spare, n),
                *sums[cases[n].bucket].values(),
            )
            c = _before(before, n, states, c_0)
            kernels[n](dh, _first(dc, n), inputs[t], gates[t], c, *values)
            dc, spare = spare, dc
            if before is not None and sizes[before] == n:
                dh = recur(dgates[t], douts[before], None)
            # the step before has other sequences; what comes from behind has to be in one place for
            # all of them
            else:
                recur(dgates[t], None, _first(dh_0, n))
                dh = None
                if dc is not dc_0:
                    spare[:n] = dc[:n]
                    dc, spare = spare, dc
    del recur  # with the packed matrix, as large as what is made here
    h_before = torch.cat(
        [h_0[:0], *(_before(before, sizes[t], outs, h_0) for t, before in sorted(steps))]
    ).to(matrix.dtype)
    dmatrix = product(dgates_h.to(matrix.dtype).t(), h_before.t(), given.get("matrix"))

    grads = {"gates_x": dgates_x, "h_0": dh_0, "c_0": dc_0, "matrix": dmatrix}
    for name, vector in zip(step._fields[_MATRICES:], step[_MATRICES:], strict=True):
        if vector is not None:
            total = sum(
                (by_name[f"d{name}"].sum(0) for by_name in sums.values()),
                vector.new_zeros(vector.shape, dtype=torch.float32),
            )
            grads[name] = given[name].copy_(total) if given else total.to(vector.dtype)
    return tuple(grads.values())
