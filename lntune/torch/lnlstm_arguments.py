"""The tensors and options of an LSTM with layer normalization, as one value each.

The flat lists of the same arguments stand only where others read them off a function: in the public
functions, the custom operators and what TorchScript compiles. A tuple is in the order of those, so
that `*tensors` passes it on.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class StepTensors(NamedTuple):
    """What one step works on; in the order of the kernels' arguments (lntune.ops.lnlstm_step).

    All are floating-point, those of a kernel's call of one dtype. A row is a sequence of the batch,
    gates are in the order i, f, g, o.
    """

    gates_x: Tensor
    """(rows, 4 * hidden): W_ih x[t], or without `weight_x` what is added to z as it is."""
    gates_h: Tensor
    """(rows, 4 * hidden): W_hh h[t-1]."""
    c: Tensor
    """(rows, hidden): the cell before the step."""
    weight_x: Tensor | None
    """(4 * hidden,): gain of the layer norm of gates_x."""
    weight_h: Tensor
    """(4 * hidden,): gain of the layer norm of gates_h."""
    weight_c: Tensor
    """(hidden,): gain of the layer norm of the new cell."""
    bias: Tensor | None
    """(4 * hidden,): the sum of all vectors that are added to z."""
    bias_c: Tensor | None
    """(hidden,): bias of the layer norm of the new cell."""

    def present(self) -> dict[str, Tensor]:
        """Those that are not None, by name, in order."""
        return {name: t for name, t in zip(self._fields, self, strict=True) if t is not None}


class SequenceTensors(NamedTuple):
    """What a layer works on in one direction; rows are those of all time steps, one step after the
    other.

    The dtype of `h_0` is that of the state and of all the rest but `matrix`, which autocast may
    have in another.
    """

    gates_x: Tensor
    """(rows of all steps, 4 * hidden): W_ih x, or without `weight_x` what is added to z as it
    is.
    """
    h_0: Tensor
    """(batch, hidden)."""
    c_0: Tensor
    """(batch, hidden)."""
    matrix: Tensor
    """(4 * hidden, hidden): W_hh."""
    weight_x: Tensor | None
    """(4 * hidden,), as StepTensors'."""
    weight_h: Tensor
    """(4 * hidden,), as StepTensors'."""
    weight_c: Tensor
    """(hidden,), as StepTensors'."""
    bias: Tensor | None
    """(4 * hidden,), as StepTensors'."""
    bias_c: Tensor | None
    """(hidden,), as StepTensors'."""

    def step(self, gates_h: Tensor) -> StepTensors:
        """The same as of one step: all inputs, the initial cell and other gates of h."""
        return StepTensors(self.gates_x, gates_h, self.c_0, *self[4:])


class SavedSteps(NamedTuple):
    """What the forward of a sequence keeps of all its time steps for the backward; rows as in
    gates_x.
    """

    out: Tensor
    """(rows, hidden): h."""
    gates_h: Tensor
    """(rows, 4 * hidden): W_hh h[t-1]."""
    cells: Tensor
    """(rows, hidden): the cell after each step."""
    statistics: Tensor
    """(number of statistics, rows) float32: see lntune.ops.lnlstm_step.statistics."""


class SequenceOptions(NamedTuple):
    """How a layer computes, beside its tensors."""

    eps: float
    """Added to the variances."""
    normalized_cell: bool
    """Whether the cell is handed on normalized (the public argument `carried`)."""
    per_gate: bool
    """Whether each of the four gates is normalized by itself."""
    reverse: bool
    """Whether the last time step is computed first."""
