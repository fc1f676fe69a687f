"""LSTMs with layer normalization as modules: the cell, which does one step, and layers over whole
sequences.

    z = LN(W_ih x[t]; ln_ih) + LN(W_hh h[t-1]; ln_hh) + b                in the order i, f, g, o
    c[t] = sigmoid(f) c[t-1] + sigmoid(i) tanh(g)
    h[t] = sigmoid(o) tanh(LN(c[t]; ln_c))

Ba, Kiros, Hinton: *Layer Normalization*, 2016, arXiv:1607.06450, supplement, eqs. 20-22. The
options are the forms other libraries gave this cell, so that their weights can be used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from lntune.errors import InputError, got_expected
from lntune.system import callers
from lntune.torch.argument_checks import checked_count, checked_flag, checked_number
from lntune.torch.constants import constant
from lntune.torch.layer_norm import layer_norm
from lntune.torch.lnlstm import lnlstm_step
from lntune.torch.lnlstm_arguments import SequenceOptions, SequenceTensors
from lntune.torch.lnlstm_sequence import lnlstm_sequence
from lntune.torch.lstm_base import LayerNormRNNBase
from lntune.torch.products import linear

# A constant to dynamo, which cannot trace the question before PyTorch 2.13 or so. A function of our
# own, since it is marked.
_castable: Callable[[str], bool] = constant(
    lambda kind: bool(torch.amp.is_autocast_available(kind))
)
_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]
_SHARED_WITH_LSTM = (
    "input_size",
    "hidden_size",
    "num_layers",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
)
"""Arguments of torch.nn.LSTM that LayerNormLSTM has too."""


class LayerNormLSTMCell(LayerNormRNNBase):
    """One step of an LSTM with layer normalization; used as torch.nn.LSTMCell is (Ba, Kiros, Hinton
    2016, eqs. 20-22).

    Parameters, all of `dtype`: weight_ih (4 * hidden_size, input_size), weight_hh (4 * hidden_size,
    hidden_size), bias, ln_ih_weight, ln_ih_bias, ln_hh_weight, ln_hh_bias (4 * hidden_size,),
    ln_c_weight, ln_c_bias (hidden_size,); gates in the order i, f, g, o.

    Args:
        input_size: features of the input.
        hidden_size: features of h and c.
        bias: whether the bias b exists.
        device: of the parameters.
        dtype: of the parameters, any floating-point one.
        eps: added to the variances.
        norm_bias: whether ln_ih_bias, ln_hh_bias and ln_c_bias exist; without them this is the cell
            of haste.
        carried: carry the normalized cell, c[t] = LN(...), as PyTorch's custom_lstms.py and
            TensorFlow Addons do.
        per_gate: normalize each of the four gates by itself, as TensorFlow's LayerNormBasicLSTMCell
            does.
        forget_bias: a constant added to the forget gate, which is not a parameter.

    Raises:
        InputError: an argument of a wrong type or value.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor | None
    ln_ih_weight: Tensor
    ln_ih_bias: Tensor | None
    ln_hh_weight: Tensor
    ln_hh_bias: Tensor | None
    ln_c_weight: Tensor
    ln_c_bias: Tensor | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        eps: float = 1e-5,
        norm_bias: bool = True,
        carried: bool = False,
        per_gate: bool = False,
        forget_bias: float = 0.0,
    ) -> None:
        options = {
            "eps": eps,
            "norm_bias": norm_bias,
            "carried": carried,
            "per_gate": per_gate,
            "forget_bias": forget_bias,
        }
        super().__init__(input_size, hidden_size, options)
        self._add("", self.input_size, checked_flag("bias", bias), device, dtype)
        self.reset_parameters()

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(h, c) after one step.

        Args:
            input: (batch, input_size) or (input_size,), in the parameters' dtype (any under
                autocast).
            hx: (h, c) before it, each (batch, hidden_size) or (hidden_size,); zeros where it is
                left out.

        Raises:
            InputError: a shape, dtype or device that does not fit, naming the argument.
        """
        if isinstance(input, Proxy):
            return self._kept_whole(input, hx)
        self._check_input(input, "input", (1, 2), self.weight_ih)
        h, c = self._state(hx, (*input.shape[:-1], self.hidden_size), self.weight_ih)
        batched = input.dim() == 2  # noqa: PLR2004 (batch, features)
        if not batched:
            input, h, c = input.unsqueeze(0), h.unsqueeze(0), c.unsqueeze(0)
        gates_x, gates_h = linear(input, self.weight_ih), linear(h, self.weight_hh)
        gains = self.ln_ih_weight, self.ln_hh_weight, self.ln_c_weight
        bias = self._shared(self.ln_ih_bias, self.ln_hh_bias, self.bias, like=self.weight_ih)
        h, c = lnlstm_step(
            gates_x, gates_h, c, *gains, bias, self.ln_c_bias, self.eps, self.carried, self.per_gate
        )
        return (h, c) if batched else (h.squeeze(0), c.squeeze(0))

    def extra_repr(self) -> str:
        """Sizes, and what is not the default."""
        return self._repr(bias=(self.bias is not None, True))


class LayerNormLSTM(LayerNormRNNBase):
    """Layers of LayerNormLSTMCell over sequences; used as torch.nn.LSTM is (Ba, Kiros, Hinton 2016,
    eqs. 20-22).

    Parameters are the cell's, each with _l{k} for layer k and _l{k}_reverse for its other
    direction. The input's part of all time steps is one matrix product; a time step is one matrix
    product and one kernel, forward and backward. torch.compile takes a direction of a layer as one
    operator, however long the sequence; on a GPU its steps become a CUDA graph when shapes repeat.

    Args:
        input_size: features of the input.
        hidden_size: features of h and c.
        num_layers: layers on top of each other.
        bias: as in the cell, like device, dtype and the keyword-only arguments.
        batch_first: whether input and output are (batch, time, features) instead of (time, batch,
            features).
        dropout: probability of dropout on the output of every layer but the last, in training.
        bidirectional: whether every layer also runs backwards; its outputs are concatenated.

    Raises:
        InputError: an argument of a wrong type or value.
    """

    weight_ih_l0: Tensor

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        eps: float = 1e-5,
        norm_bias: bool = True,
        carried: bool = False,
        per_gate: bool = False,
        forget_bias: float = 0.0,
    ) -> None:
        options = {
            "eps": eps,
            "norm_bias": norm_bias,
            "carried": carried,
            "per_gate": per_gate,
            "forget_bias": forget_bias,
        }
        super().__init__(input_size, hidden_size, options)
        self.num_layers, self.bias = (
            checked_count("num_layers", num_layers),
            checked_flag("bias", bias),
        )
        self.batch_first, self.bidirectional = (
            checked_flag("batch_first", batch_first),
            checked_flag("bidirectional", bidirectional),
        )
        self.dropout = checked_number("dropout", dropout, 0, 1, "a probability from 0 to 1")
        if self.dropout > 0 and self.num_layers == 1:
            rule = (
                "dropout option adds dropout after all but last recurrent layer, so non-zero"
                " dropout expects num_layers greater than 1, "
            )
            callers.warn(
                f"{rule}but got dropout={dropout} and num_layers={num_layers}", UserWarning
            )
        for k, suffix in self.suffixes():
            self._add(
                suffix,
                self.input_size if k == 0 else self.hidden_size * (1 + self.bidirectional),
                self.bias,
                device,
                dtype,
            )
        self.reset_parameters()

    @classmethod
    def from_lstm(cls, lstm: nn.LSTM, **options: Any) -> LayerNormLSTM:
        """A layer-normalized LSTM to go on training from a torch.nn.LSTM: its sizes, options and
        matrices, b = bias_ih + bias_hh, gains 1, biases of the layer norms 0; device, dtype and
        mode are the LSTM's. It does not compute the same, since it normalizes.

        Args:
            lstm: the LSTM, which stays as it is; without proj_size.
            options: the keyword-only arguments of LayerNormLSTM.

        Raises:
            InputError: not an LSTM, or one with projections.
        """
        if not isinstance(lstm, nn.LSTM):
            raise InputError(got_expected("lstm", type(lstm).__name__, "a torch.nn.LSTM"))
        if lstm.proj_size:
            remedy = "LayerNormLSTM has no projections."
            raise InputError(got_expected("lstm.proj_size", lstm.proj_size, "0", remedy))
        weight = next(lstm.parameters())
        module = cls(
            **{name: getattr(lstm, name) for name in _SHARED_WITH_LSTM},
            device=weight.device,
            dtype=weight.dtype,
            **options,
        )
        with torch.no_grad():
            for _, suffix in module.suffixes():
                for name in ("weight_ih", "weight_hh"):
                    getattr(module, name + suffix).copy_(getattr(lstm, name + suffix))
                if lstm.bias:
                    getattr(module, "bias" + suffix).copy_(
                        getattr(lstm, "bias_ih" + suffix) + getattr(lstm, "bias_hh" + suffix)
                    )
        return module.train(lstm.training)

    def suffixes(self) -> list[tuple[int, str]]:
        """(layer, suffix of its parameters' names) in the order of h_n."""
        return [
            (k, f"_l{k}{way}")
            for k in range(self.num_layers)
            for way in (("", "_reverse") if self.bidirectional else ("",))
        ]

    def flatten_parameters(self) -> None:
        """Nothing to do; there for code that calls it on every recurrent module."""

    def forward(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """(output, (h_n, c_n)), shaped as torch.nn.LSTM's. Below, n is num_layers * (2 if
        bidirectional else 1).

        Args:
            input: (time, batch, input_size), (batch, time, input_size) with batch_first, (time,
                input_size) for one sequence, or a PackedSequence, which is computed without
                padding; in the parameters' dtype (any under autocast).
            hx: (h_0, c_0), each (n, batch, hidden_size), or (n, hidden_size) for one sequence;
                zeros where it is left out.

        Returns:
            output, laid out as the input, of hidden_size features per direction, and h_n and c_n,
            shaped as h_0 and c_0. All have the parameters' dtype: autocast lowers the matrix
            products and their layer norms, not the state.

        Raises:
            InputError: a shape, dtype or device that does not fit, naming the argument; a sequence
                of no steps.
        """
        if isinstance(input, Proxy):
            return self._kept_whole(input, hx)
        like, many = self.weight_ih_l0, len(self.suffixes())
        if isinstance(input, PackedSequence):
            self._check_input(input.data, "input.data", (2,), like)
            # a list is a constant to torch.jit.trace
            sizes: Any = input.batch_sizes if _tracing() else input.batch_sizes.tolist()
            h_0, c_0 = self._state(hx, (many, sizes[0], self.hidden_size), like)
            if input.sorted_indices is not None:
                h_0, c_0 = (
                    h_0.index_select(1, input.sorted_indices),
                    c_0.index_select(1, input.sorted_indices),
                )
            flat, h_n, c_n = self._layers(input.data, sizes, h_0, c_0)
            if input.unsorted_indices is not None:
                h_n, c_n = (
                    h_n.index_select(1, input.unsorted_indices),
                    c_n.index_select(1, input.unsorted_indices),
                )
            return PackedSequence(
                flat, input.batch_sizes, input.sorted_indices, input.unsorted_indices
            ), (h_n, c_n)
        self._check_input(input, "input", (2, 3), like)
        batched = input.dim() == 3  # noqa: PLR2004 (time, batch, features)
        steps = input if batched else input.unsqueeze(1)
        if batched and self.batch_first:
            steps = steps.transpose(0, 1)
        time, batch = steps.shape[:2]
        if time == 0:
            raise InputError(
                got_expected("input", f"shape {tuple(input.shape)}", "at least one time step")
            )
        h_0, c_0 = self._state(
            hx, (many, batch, self.hidden_size) if batched else (many, self.hidden_size), like
        )
        if not batched:
            h_0, c_0 = h_0.unsqueeze(1), c_0.unsqueeze(1)
        flat, h_n, c_n = self._layers(steps.flatten(0, 1), [], h_0, c_0)
        output = flat.unflatten(0, (time, batch))
        if not batched:
            return output.squeeze(1), (h_n.squeeze(1), c_n.squeeze(1))
        return output.transpose(0, 1) if self.batch_first else output, (h_n, c_n)

    def _layers(
        self, flat: Tensor, sizes: list[int] | Tensor, h_0: Tensor, c_0: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All layers over the rows of all time steps, sizes[t] of them at t, without sizes one a
        sequence: (rows of the output, h_n, c_n).
        """
        last: list[tuple[Tensor, Tensor]] = []
        ways: list[Tensor] = []
        for k, suffix in self.suffixes():
            if not ways and k > 0:
                flat = functional.dropout(flat, self.dropout, self.training)
            out, h, c = self._direction(flat, sizes, h_0[len(last)], c_0[len(last)], suffix)
            last.append((h, c))
            ways.append(out)
            if len(ways) == 1 + self.bidirectional:
                flat, ways = torch.cat(ways, -1) if self.bidirectional else out, []
        return flat, torch.stack([h for h, _ in last]), torch.stack([c for _, c in last])

    def _direction(
        self, flat: Tensor, sizes: list[int] | Tensor, h_0: Tensor, c_0: Tensor, suffix: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer in one direction. Sequences are sorted by length, so that those with a step t
        are the first sizes[t].
        """
        names = ("weight_hh", "bias", "ln_hh_weight", "ln_hh_bias", "ln_c_weight", "ln_c_bias")
        matrix, b, weight_h, bias_h, weight_c, bias_c = (
            getattr(self, name + suffix) for name in names
        )
        gates_x, weight_x, bias_x = self._input_part(flat, suffix)
        bias = self._shared(bias_x, bias_h, b, like=matrix)
        if _castable(matrix.device.type) and torch.is_autocast_enabled(matrix.device.type):
            matrix = matrix.to(torch.get_autocast_dtype(matrix.device.type))
        tensors = SequenceTensors(
            gates_x=gates_x.to(h_0.dtype),
            h_0=h_0,
            c_0=c_0,
            matrix=matrix,
            weight_x=weight_x,
            weight_h=weight_h,
            weight_c=weight_c,
            bias=bias,
            bias_c=bias_c,
        )
        options = SequenceOptions(
            self.eps, self.carried, self.per_gate, suffix.endswith("_reverse")
        )
        return lnlstm_sequence(*tensors, sizes, *options)

    def _input_part(self, flat: Tensor, suffix: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """W_ih x of all rows at once, with the gain and bias of its layer norm, which each step
        makes for itself: so the normalized gates need not be kept for the backward. With a layer
        norm for each gate, what is added to z, and None.
        """
        matrix, gain, bias = (
            getattr(self, name + suffix) for name in ("weight_ih", "ln_ih_weight", "ln_ih_bias")
        )
        gates, hidden = linear(flat, matrix), self.hidden_size
        if not self.per_gate:
            return gates, gain, bias
        normalized = layer_norm(
            gates.unflatten(-1, (4, hidden)), (hidden,), None, None, self.eps
        ).flatten(-2)
        return (
            (
                torch.mul(normalized, gain)
                if bias is None
                else torch.addcmul(bias, normalized, gain)
            ),
            None,
            None,
        )

    def extra_repr(self) -> str:
        """Sizes, and what is not the default."""
        return self._repr(
            num_layers=(self.num_layers, 1),
            bias=(self.bias, True),
            batch_first=(self.batch_first, False),
            dropout=(self.dropout, 0.0),
            bidirectional=(self.bidirectional, False),
        )


__all__ = ["LayerNormLSTM", "LayerNormLSTMCell"]
