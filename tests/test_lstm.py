"""lntune's LSTMs with layer normalization compute the equations, in the shapes and with the habits
of torch.nn.LSTM.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grids import thinned
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from lntune.torch.lstm import LayerNormLSTM, LayerNormLSTMCell
from lntune.torch.lstm_weights import from_lstm

pytestmark = [
    pytest.mark.filterwarnings("ignore::lntune.UntunedWarning"),
    pytest.mark.usefixtures("one_thread"),
]

FEATURES, HIDDEN = 3, 5
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no bias": {"bias": False},
    "no norm_bias": {"norm_bias": False},
    "no bias at all": {"bias": False, "norm_bias": False},
    "carried": {"carried": True},
    "per_gate": {"per_gate": True},
    "forget_bias": {"forget_bias": 1.5},
    "forget_bias alone": {"forget_bias": 1.5, "bias": False, "norm_bias": False},
    "eps": {"eps": 1e-2},
    "as in TensorFlow": {
        "bias": False,
        "carried": True,
        "per_gate": True,
        "forget_bias": 1.0,
        "norm_bias": False,
    },
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def norm(v: Tensor, gain: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm of the last dimension, written out."""
    centred = v - v.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * gain
    return y if bias is None else y + bias


def reference_step(
    m: nn.Module, p: dict[str, Tensor], suffix: str, x: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """Equations 20-22 for (batch, features), with m's options and the parameters p."""

    def get(name: str) -> Tensor | None:
        return p.get(name + suffix)

    def gates(part: str, v: Tensor) -> Tensor:
        v, gain, bias = (
            v @ get(f"weight_{part}").T,
            get(f"ln_{part}_weight"),
            get(f"ln_{part}_bias"),
        )
        if not m.per_gate:
            return norm(v, gain, bias, m.eps)
        biases = [None] * 4 if bias is None else bias.chunk(4)
        return torch.cat(
            [norm(*vgb, m.eps) for vgb in zip(v.chunk(4, -1), gain.chunk(4), biases, strict=True)],
            -1,
        )

    z = gates("ih", x) + gates("hh", h)
    if get("bias") is not None:
        z = z + get("bias")
    i, f, g, o = z.chunk(4, -1)
    c = torch.sigmoid(f + m.forget_bias) * c + torch.sigmoid(i) * torch.tanh(g)
    normalized = norm(c, get("ln_c_weight"), get("ln_c_bias"), m.eps)
    return torch.sigmoid(o) * torch.tanh(normalized), normalized if m.carried else c


def reference(
    m: LayerNormLSTM, p: dict[str, Tensor], x: Tensor, hx: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, h_n, c_n) for (time, batch, features), one time step after the other."""
    ways = ("", "_reverse") if m.bidirectional else ("",)
    n = m.num_layers * len(ways)
    h_0, c_0 = hx or (x.new_zeros(n, x.shape[1], m.hidden_size),) * 2
    last = []
    for k in range(m.num_layers):
        outs = []
        for way in ways:
            h, c = h_0[len(last)], c_0[len(last)]
            out: dict[int, Tensor] = {}
            for t in range(len(x))[:: -1 if way else 1]:
                h, c = reference_step(m, p, f"_l{k}{way}", x[t], h, c)
                out[t] = h
            last.append((h, c))
            outs.append(torch.stack([out[t] for t in range(len(x))]))
        x = torch.cat(outs, -1)
    return x, torch.stack([h for h, _ in last]), torch.stack([c for _, c in last])


def make(
    kind: type[nn.Module] = LayerNormLSTM,
    *sizes: int,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Any:
    """A model whose gains and biases are not ones and zeros, so that a lost one shows."""
    torch.manual_seed(0)
    model = kind(*(sizes or (FEATURES, HIDDEN)), dtype=dtype, **options)
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=float(name.startswith("ln_") and "_weight" in name), std=0.5)
    return model


def parameters(model: nn.Module, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Leaves of their own with the model's weights."""
    return {
        name: p.detach().to(dtype).clone().requires_grad_() for name, p in model.named_parameters()
    }


def state(n: int, batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """An initial (h, c)."""
    return torch.randn(n, batch, HIDDEN, dtype=dtype), torch.randn(n, batch, HIDDEN, dtype=dtype)


def close(ours: Any, theirs: Any, tolerance: float = 1e-10) -> None:
    """Equal up to the tolerance, whatever the dtypes."""
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance, check_dtype=False)


@pytest.mark.parametrize("hx", [False, True], ids=["zeros", "hx"])
@every_option
def test_cell(options: dict[str, Any], hx: bool) -> None:
    """A step is the equations', batched or not, with and without an initial state."""
    cell = make(LayerNormLSTMCell, **options)
    x, (h, c) = (
        torch.randn(4, FEATURES, dtype=torch.float64),
        (state(1, 4) if hx else (torch.zeros(1, 4, HIDDEN, dtype=torch.float64),) * 2),
    )
    given = (h[0], c[0]) if hx else None
    expected = reference_step(cell, parameters(cell), "", x, h[0], c[0])
    close(cell(x, given), expected)
    close(cell(x[1], (h[0, 1], c[0, 1]) if hx else None), (expected[0][1], expected[1][1]))
    assert [s.shape for s in cell(x[:0])] == [(0, HIDDEN)] * 2


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
@every_option
def test_layers(options: dict[str, Any], layers: int, bidirectional: bool) -> None:
    """Outputs, last states and every gradient are those of the equations run step by step."""
    model = make(num_layers=layers, bidirectional=bidirectional, **options)
    n = layers * (1 + bidirectional)
    x = torch.randn(4, 2, FEATURES, dtype=torch.float64)
    h, c = state(n, 2)
    grads = []
    results = []
    for ours in (True, False):
        p = {"x": x, "h": h, "c": c}
        p = {name: t.clone().requires_grad_() for name, t in p.items()} | (
            dict(model.named_parameters()) if ours else parameters(model)
        )
        hx = (p["h"], p["c"])
        if ours:
            output, (h_n, c_n) = model(p["x"], hx)
        else:
            output, h_n, c_n = reference(model, p, p["x"], hx)
        results.append((output, h_n, c_n))
        loss = output.square().sum() + (h_n * h).sum() + (c_n * c).sin().sum()
        grads.append(dict(zip(p, torch.autograd.grad(loss, list(p.values())), strict=True)))
    close(results[0], results[1])
    close(grads[0], grads[1])
    close(model(x)[0], reference(model, parameters(model), x)[0])


@pytest.mark.parametrize("options", thinned((pytest.param(v, id=k) for k, v in OPTIONS.items()), 5))
def test_float32(options: dict[str, Any]) -> None:
    """In float32 results and gradients stay close to float64's."""
    model = make(num_layers=2, bidirectional=True, dtype=torch.float32, **options)
    x, p = torch.randn(6, 2, FEATURES), parameters(model)
    for _ in range(2):
        output, h_n, c_n = reference(model, p, x.double())
        ours, last = model(x)
        assert ours.dtype == last[0].dtype == last[1].dtype == torch.float32
        close((ours, *last), (output, h_n, c_n), 1e-4)
    expected = torch.autograd.grad(output.sum() + c_n.sum(), list(p.values()))
    close(torch.autograd.grad(ours.sum() + last[1].sum(), list(model.parameters())), expected, 1e-3)
    with torch.inference_mode():
        close(model(x)[0], output.detach(), 1e-4)


@pytest.mark.parametrize(
    "options",
    [{}, {"carried": True, "per_gate": True, "forget_bias": 1.0}],
    ids=["default", "others"],
)
def test_gradcheck(options: dict[str, Any]) -> None:
    """Numerical derivatives agree with the analytical ones, through a packed batch too."""
    model = make(LayerNormLSTM, 2, 2, bidirectional=True, **options)
    names, weights = zip(*model.named_parameters(), strict=True)

    def run(x: Tensor, *ws: Tensor) -> Tensor:
        packed = pack_sequence([x[:3], x[3:5]])
        return torch.func.functional_call(model, dict(zip(names, ws, strict=True)), (packed,))[
            0
        ].data

    torch.autograd.gradcheck(
        run, (torch.randn(5, 2, dtype=torch.float64, requires_grad=True), *weights), fast_mode=True
    )


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("lengths", [(4, 4), (5, 3, 3, 1), (2, 5, 1, 3)], ids=str)
def test_packed(lengths: tuple[int, ...], bidirectional: bool, layers: int) -> None:
    """Each sequence of a packed batch, sorted or not, gives what it gives alone, forwards and
    backwards, and so do its gradients.
    """
    model = make(num_layers=layers, bidirectional=bidirectional)
    sequences = [torch.randn(length, FEATURES, dtype=torch.float64) for length in lengths]
    h, c = state(layers * (1 + bidirectional), len(lengths))
    for hx in (None, (h, c)):
        packed, (h_n, c_n) = model(
            pack_sequence(sequences, enforce_sorted=list(lengths) == sorted(lengths, reverse=True)),
            hx,
        )
        assert isinstance(packed, PackedSequence)
        alone = [
            model(s, None if hx is None else (h[:, b], c[:, b])) for b, s in enumerate(sequences)
        ]
        close(unpack_sequence(packed), [output for output, _ in alone])
        close(h_n, torch.stack([last[0] for _, last in alone], 1))
        close(c_n, torch.stack([last[1] for _, last in alone], 1))
    ours = torch.autograd.grad(packed.data.square().sum() + c_n.sum(), list(model.parameters()))
    theirs = torch.autograd.grad(
        sum(o.square().sum() + last[1].sum() for o, last in alone), list(model.parameters())
    )
    close(ours, theirs)


@pytest.mark.parametrize(
    ("layers", "bidirectional", "batch_first"),
    list(itertools.product((1, 2), (False, True), (False, True))),
)
def test_shapes(layers: int, bidirectional: bool, batch_first: bool) -> None:
    """Every output has the shape nn.LSTM's has: batched, unbatched, packed, of one step and of an
    empty batch.
    """
    arguments = {
        "num_layers": layers,
        "bidirectional": bidirectional,
        "batch_first": batch_first,
        "dtype": torch.float64,
    }
    ours, theirs = (
        LayerNormLSTM(FEATURES, HIDDEN, **arguments),
        nn.LSTM(FEATURES, HIDDEN, **arguments),
    )
    n = layers * (1 + bidirectional)
    h, c = state(n, 2)
    swapped = (
        torch.randn(2, 4, FEATURES, dtype=torch.float64)
        if batch_first
        else torch.randn(4, 2, FEATURES, dtype=torch.float64)
    )
    for x, hx in (
        (swapped, None),
        (swapped, (h, c)),
        (swapped[0], None),
        (swapped[0], (h[:, 0], c[:, 0])),
        (swapped[:1, :1], None),
    ):
        (y, last), (y_theirs, last_theirs) = ours(x, hx), theirs(x, hx)
        assert (y.shape, *(s.shape for s in last)) == (
            y_theirs.shape,
            *(s.shape for s in last_theirs),
        )
    packed = pack_sequence([swapped[0], swapped[1, :1]])
    assert ours(packed)[0].data.shape == theirs(packed)[0].data.shape
    assert torch.equal(ours(packed)[0].batch_sizes, packed.batch_sizes)
    empty = swapped[:0] if batch_first else swapped[:, :0]
    y, last = ours(empty)
    assert (
        y.shape == (*empty.shape[:2], HIDDEN * (1 + bidirectional))
        and [s.shape for s in last] == [(n, 0, HIDDEN)] * 2
    )
    assert last[0].numel() == 0 and ours(swapped)[0].isfinite().all()


def test_batch_first() -> None:
    """batch_first changes the layout of input and output only."""
    model = make(num_layers=2)
    x = torch.randn(4, 2, FEATURES, dtype=torch.float64)
    y, last = model(x)
    model.batch_first = True
    y_first, last_first = model(x.transpose(0, 1))
    close((y_first.transpose(0, 1), last_first), (y, last))
    close(model(x[:, 0])[0], y[:, 0])


def test_layers_are_cells() -> None:
    """A layer is its cell run over the steps, and both take each other's weights but for the names'
    suffix.
    """
    cell, layer = make(LayerNormLSTMCell), make()
    cell.load_state_dict(
        {name.removesuffix("_l0"): value for name, value in layer.state_dict().items()}
    )
    x = torch.randn(4, 2, FEATURES, dtype=torch.float64)
    hx = None
    for t, y in enumerate(layer(x)[0]):
        hx = cell(x[t], hx)
        close(hx[0], y)


def test_parameters() -> None:
    """Names, shapes and initial values are as documented; what an option leaves out is None and not
    in the state_dict.
    """
    model = LayerNormLSTM(FEATURES, HIDDEN, 2, bidirectional=True)
    names = (
        "weight_ih",
        "weight_hh",
        "bias",
        "ln_ih_weight",
        "ln_ih_bias",
        "ln_hh_weight",
        "ln_hh_bias",
        "ln_c_weight",
        "ln_c_bias",
    )
    suffixes = "_l0", "_l0_reverse", "_l1", "_l1_reverse"
    assert list(model.state_dict()) == [name + suffix for suffix in suffixes for name in names]
    assert list(LayerNormLSTMCell(FEATURES, HIDDEN).state_dict()) == list(names)
    assert model.weight_ih_l0.shape == (4 * HIDDEN, FEATURES) and model.weight_ih_l1.shape == (
        4 * HIDDEN,
        2 * HIDDEN,
    )
    for name, p in model.named_parameters():
        if name.startswith("ln_"):
            assert torch.equal(p, torch.ones_like(p) if "weight" in name else torch.zeros_like(p))
        else:
            assert 0.5 < p.abs().max() * HIDDEN**0.5 <= 1
    less = LayerNormLSTM(FEATURES, HIDDEN, bias=False, norm_bias=False)
    assert list(less.state_dict()) == [name + "_l0" for name in names if "bias" not in name]
    assert less.bias_l0 is None and less.ln_c_bias_l0 is None


def test_repr() -> None:
    """extra_repr shows the sizes and what is not the default."""
    assert repr(LayerNormLSTM(3, 5)) == "LayerNormLSTM(3, 5)"
    assert (
        repr(LayerNormLSTM(3, 5, 2, False, True, 0.5, True, eps=1e-3))
        == "LayerNormLSTM(3, 5, num_layers=2, bias=False, batch_first=True, dropout=0.5,"
        " bidirectional=True, eps=0.001)"
    )
    assert (
        repr(LayerNormLSTMCell(3, 5, bias=False, carried=True))
        == "LayerNormLSTMCell(3, 5, bias=False, carried=True)"
    )


def test_a_dropout_without_a_layer_to_follow() -> None:
    """As in PyTorch it is warned of, at the line that makes the layer, whatever of ours or
    PyTorch's makes it for the caller.
    """

    class Own(LayerNormLSTM):
        pass

    theirs = nn.LSTM(FEATURES, HIDDEN)
    theirs.dropout = 0.5
    makers: list[Callable[[], object]] = [
        lambda: LayerNormLSTM(FEATURES, HIDDEN, dropout=0.5),
        lambda: Own(FEATURES, HIDDEN, dropout=0.5),
        lambda: from_lstm(theirs),
        lambda: torch.nn.utils.skip_init(LayerNormLSTM, FEATURES, HIDDEN, dropout=0.5),
    ]
    for make in makers:
        with pytest.warns(
            UserWarning, match=r"num_layers greater than 1, but got dropout=0\.5 and num_layers=1"
        ) as caught:
            make()
        assert [w.filename for w in caught] == [__file__]
