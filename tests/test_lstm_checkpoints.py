"""lntune's LSTMs as modules: copies, files, dtypes, autocast, torch.compile, dropout, weights of
other LSTMs, and bad input.
"""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings
from typing import Any

import pytest
import torch
from grids import exhaustive
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from lntune.errors import InputError
from lntune.torch.lstm import LayerNormLSTM, LayerNormLSTMCell
from lntune.torch.lstm_weights import from_lstm, load_custom_lstm

pytestmark = [
    pytest.mark.filterwarnings("ignore::lntune.UntunedWarning"),
    pytest.mark.usefixtures("one_thread"),
]

FEATURES, HIDDEN = 3, 5


def randomize(model: Any) -> Any:
    """Weights that are not ones and zeros, so that a lost one shows."""
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, mean=0.2, std=0.5)
    return model


def close(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    """Equal up to the tolerance, whatever the dtypes."""
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance, check_dtype=False)


@pytest.mark.parametrize("kind", [LayerNormLSTM, LayerNormLSTMCell])
def test_copies_and_files(kind: Any) -> None:
    """A state_dict, deepcopy, pickle and torch.save give a module that computes the same, with its
    options.
    """
    model = randomize(kind(FEATURES, HIDDEN, carried=True, forget_bias=1.0, dtype=torch.float64))
    x = torch.randn(4, FEATURES, dtype=torch.float64)
    y = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ]
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    copies.append(kind(FEATURES, HIDDEN, carried=True, forget_bias=1.0, dtype=torch.float64))
    copies[-1].load_state_dict(torch.load(file))
    for c in copies:
        assert repr(c) == repr(model)
        close(c(x), y, 0)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*ln_c_bias"):
        kind(FEATURES, HIDDEN, norm_bias=False).load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, LayerNormLSTMCell),
        ({"per_gate": True, "carried": True}, LayerNormLSTM),
        exhaustive(({}, LayerNormLSTM)),
        exhaustive(({"per_gate": True, "carried": True}, LayerNormLSTMCell)),
        exhaustive(({"bias": False, "norm_bias": False}, LayerNormLSTM)),
        exhaustive(({"bias": False, "norm_bias": False}, LayerNormLSTMCell)),
    ],
)
def test_dtypes_and_autocast(kind: Any, options: dict[str, Any]) -> None:
    """.to(bfloat16) computes in bfloat16; autocast lowers the products and keeps the state in the
    parameters' dtype.
    """
    model = randomize(kind(FEATURES, HIDDEN, **options))
    x = torch.randn(4, 2, FEATURES) if kind is LayerNormLSTM else torch.randn(2, FEATURES)
    y, last = model(x)
    # a cell returns its state alone
    state = (lambda h, c: c) if kind is LayerNormLSTM else (lambda h, c: (h, c))
    with torch.autocast("cpu", torch.bfloat16):
        for given in (x, x.bfloat16()):
            low, low_last = model(given)
            assert low.dtype == torch.float32
            assert all(s.dtype == torch.float32 for s in low_last)
            close(low, y, 0.1)
            hx = [s.bfloat16() for s in state(low, low_last)]
            again = model(given, hx)[0]
            assert again.dtype == torch.float32
            close(again, model(x, state(y, last))[0], 0.1)
    assert not torch.equal(low, y)
    torch.autograd.backward(low.sum())
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all()
        for p in model.parameters()
    )
    low, low_last = model.to(torch.bfloat16)(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert all(s.dtype == torch.bfloat16 for s in low_last)
    close(low, y, 0.15)
    assert model.to("meta")(x.bfloat16().to("meta"))[0].shape == y.shape


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compile(backend: str) -> None:
    """A short sequence of a fixed length is one graph, whose results and gradients are those of the
    module.
    """
    torch._dynamo.reset()
    model = randomize(
        LayerNormLSTM(FEATURES, HIDDEN, bidirectional=backend == "aot_eager", forget_bias=1.0)
    )
    x = torch.randn(3, 2, FEATURES)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        close(compiled(x), model(x))
    if backend == "inductor":
        return
    grads = [
        torch.autograd.grad(m(x)[0].square().sum(), list(model.parameters()))
        for m in (compiled, model)
    ]
    close(*grads)
    cell = randomize(LayerNormLSTMCell(FEATURES, HIDDEN, per_gate=True))
    close(torch.compile(cell, fullgraph=True, backend=backend)(x[0]), cell(x[0]))
    with torch.autocast("cpu", torch.bfloat16):
        close(compiled(x.bfloat16())[0], model(x.bfloat16())[0], 0.05)


def test_dropout() -> None:
    """Dropout is between layers, in training only, of the given share, and repeats under a seed."""
    model = LayerNormLSTM(FEATURES, 64, 2, dropout=0.25)
    x = torch.randn(20, 8, FEATURES)
    seen: list[Tensor] = []
    original = model._input_part
    model._input_part = lambda flat, suffix: (seen.append(flat), original(flat, suffix))[1]
    torch.manual_seed(1)
    y, _ = model(x)
    torch.manual_seed(1)
    close(model(x)[0], y, 0)
    assert not torch.equal(model(x)[0], y)
    share = (seen[1] == 0).double().mean()
    assert 0.22 < share < 0.28  # 10,240 elements: seven deviations
    assert (seen[0] == 0).sum() == 0 and (y == 0).sum() == 0
    model.eval()
    undropped = model(x)[0]
    close(model(x)[0], undropped, 0)
    kept = seen[1] != 0
    close(seen[1][kept] * 0.75, seen[-1][kept])
    model.dropout = 0.0
    close(model.train()(x)[0], undropped, 0)


def test_dropout_of_one_layer_warns() -> None:
    """As in nn.LSTM, and in its words."""
    with pytest.warns(UserWarning, match="dropout option adds dropout") as theirs:
        nn.LSTM(FEATURES, HIDDEN, dropout=0.5)
    with pytest.warns(UserWarning, match="dropout option adds dropout") as ours:
        LayerNormLSTM(FEATURES, HIDDEN, dropout=0.5)
    assert str(ours[0].message) == str(theirs[0].message)
    assert ours[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LayerNormLSTM(FEATURES, HIDDEN, 2, dropout=0.5)


@pytest.mark.parametrize("bias", [True, False])
def test_from_lstm(bias: bool) -> None:
    """Sizes, options, mode, dtype and weights are the LSTM's; without its layer norms the cell
    would compute the same.
    """
    lstm = randomize(
        nn.LSTM(FEATURES, HIDDEN, 2, bias, True, 0.5, True, dtype=torch.float64)
    ).eval()
    ours = LayerNormLSTM.from_lstm(lstm, carried=True, eps=1e-3)
    assert (
        repr(ours)
        == "LayerNormLSTM"
        + repr(lstm).removeprefix("LSTM").removesuffix(")")
        + ", carried=True, eps=0.001)"
    )
    assert not ours.training and ours.weight_ih_l0.dtype == torch.float64
    for suffix in ("_l0", "_l0_reverse", "_l1", "_l1_reverse"):
        weight = getattr(ours, "weight_ih" + suffix)
        assert torch.equal(weight, getattr(lstm, "weight_ih" + suffix)) and weight is not getattr(
            lstm, "weight_ih" + suffix
        )
        assert torch.equal(getattr(ours, "weight_hh" + suffix), getattr(lstm, "weight_hh" + suffix))
        if bias:
            assert torch.equal(
                getattr(ours, "bias" + suffix),
                getattr(lstm, "bias_ih" + suffix) + getattr(lstm, "bias_hh" + suffix),
            )
        assert (getattr(ours, "ln_hh_weight" + suffix) == 1).all() and (
            getattr(ours, "ln_c_bias" + suffix) == 0
        ).all()
    assert ours(torch.randn(2, 4, FEATURES, dtype=torch.float64))[0].shape == (2, 4, 2 * HIDDEN)


class CustomCell(nn.Module):
    """The cell of PyTorch's custom_lstms.py, in plain PyTorch."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.randn(4 * HIDDEN, features))
        self.weight_hh = nn.Parameter(torch.randn(4 * HIDDEN, HIDDEN))
        self.layernorm_i, self.layernorm_h, self.layernorm_c = (
            nn.LayerNorm(4 * HIDDEN),
            nn.LayerNorm(4 * HIDDEN),
            nn.LayerNorm(HIDDEN),
        )

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.layernorm_i(x @ self.weight_ih.T) + self.layernorm_h(h @ self.weight_hh.T)
        enter, forget, cell, leave = gates.chunk(4, 1)
        c = self.layernorm_c(forget.sigmoid() * c + enter.sigmoid() * cell.tanh())
        return leave.sigmoid() * c.tanh(), c


class Way(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.cell = CustomCell(features)


class Both(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.directions = nn.ModuleList([Way(features), Way(features)])


class Custom(nn.Module):
    """Its layers, with the same names in the state_dict."""

    def __init__(self, layers: int, bidirectional: bool) -> None:
        super().__init__()
        wide = HIDDEN * (1 + bidirectional)
        self.layers = nn.ModuleList(
            [(Both if bidirectional else Way)(wide if k else FEATURES) for k in range(layers)]
        )

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        last = []
        for layer in self.layers:
            outs = []
            for d, way in enumerate(getattr(layer, "directions", [layer])):
                now, out = (h[len(last)], c[len(last)]), []
                for step in x.flip(0) if d else x:
                    now = way.cell(step, *now)
                    out.append(now[0])
                last.append(now)
                outs.append(torch.stack(out).flip(0) if d else torch.stack(out))
            x = torch.cat(outs, -1)
        return x, torch.stack([n[0] for n in last]), torch.stack([n[1] for n in last])


@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("bias", [True, False])
def test_load_custom_lstm(bias: bool, bidirectional: bool) -> None:
    """The state_dict of the custom LSTM is taken key by key, and gives its results; b becomes 0."""
    theirs = randomize(Custom(2, bidirectional))
    ours = randomize(
        LayerNormLSTM(FEATURES, HIDDEN, 2, bias, bidirectional=bidirectional, carried=True)
    )
    assert load_custom_lstm(ours, theirs.state_dict()) is ours
    n = 2 * (1 + bidirectional)
    x, h, c = torch.randn(6, 2, FEATURES), torch.randn(n, 2, HIDDEN), torch.randn(n, 2, HIDDEN)
    y, last = ours(x, (h, c))
    close((y, *last), theirs(x, h, c), 1e-4)


def test_bad_state_dicts() -> None:
    """What cannot give the same results is refused by name, before anything is loaded."""
    good = Custom(1, False).state_dict()
    ours = randomize(LayerNormLSTM(FEATURES, HIDDEN, carried=True))
    before = copy.deepcopy(ours.state_dict())
    key = "layers.0.cell.layernorm_h.weight"
    for state_dict, message in (
        (
            {k: v for k, v in good.items() if k != key},
            f"state_dict: got no {key}, expected one of shape (20,)",
        ),
        (
            {**good, "layers.1.cell.weight_ih": good[key]},
            "state_dict: got layers.1.cell.weight_ih, expected no such key",
        ),
        (
            {**good, key: torch.ones(5)},
            f"state_dict['{key}']: got shape (5,), expected shape (20,)",
        ),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            load_custom_lstm(ours, state_dict)
    close(ours.state_dict(), before, 0)
    for options, message in (
        ({}, "module.carried: got False, expected True. Make the module with carried=True"),
        ({"carried": True, "norm_bias": False}, "module.norm_bias: got False"),
        ({"carried": True, "per_gate": True}, "module.per_gate: got True"),
        ({"carried": True, "forget_bias": 1.0}, "module.forget_bias: got 1.0"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            load_custom_lstm(LayerNormLSTM(FEATURES, HIDDEN, **options), good)
    with pytest.raises(InputError, match="module: got LSTM, expected a LayerNormLSTM"):
        load_custom_lstm(nn.LSTM(FEATURES, HIDDEN), good)
    with pytest.raises(InputError, match=re.escape("lstm.proj_size: got 2, expected 0")):
        from_lstm(nn.LSTM(FEATURES, HIDDEN, proj_size=2))
    with pytest.raises(InputError, match="lstm: got GRU"):
        from_lstm(nn.GRU(FEATURES, HIDDEN))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_size": 0}, "input_size: got 0, expected an integer, 1 or more"),
        ({"hidden_size": 2.0}, "hidden_size: got 2.0"),
        ({"num_layers": 0}, "num_layers: got 0"),
        ({"bias": 1}, "bias: got 1, expected True or False"),
        ({"batch_first": None}, "batch_first: got None"),
        ({"bidirectional": 2}, "bidirectional: got 2"),
        ({"dropout": 1.5}, "dropout: got 1.5, expected a probability from 0 to 1"),
        ({"dropout": True}, "dropout: got True"),
        ({"eps": float("inf")}, "eps: got inf, expected a finite number"),
        ({"forget_bias": float("nan")}, "forget_bias: got nan, expected a finite number"),
        ({"carried": "yes"}, "carried: got 'yes'"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    """A constructor's error names the argument."""
    with pytest.raises(InputError, match=re.escape(message)):
        LayerNormLSTM(**{"input_size": FEATURES, "hidden_size": HIDDEN, **arguments})


def test_bad_input() -> None:
    """A call's error names the argument, what it is and what was expected."""
    model, cell = LayerNormLSTM(FEATURES, HIDDEN, 2), LayerNormLSTMCell(FEATURES, HIDDEN)
    x, h = torch.zeros(4, 2, FEATURES), torch.zeros(2, 2, HIDDEN)
    for module, given, message in (
        (model, ([1.0],), "input: got list, expected a torch.Tensor"),
        (model, (x[0, 0],), "input: got shape (3,), expected 2 or 3 dimensions"),
        (
            model,
            (x[..., :2],),
            "input: got shape (4, 2, 2), expected a last dimension of input_size 3",
        ),
        (model, (x[:0],), "input: got shape (0, 2, 3), expected at least one time step"),
        (
            model,
            (x.double(),),
            (
                "input: got torch.float64, expected the parameters' torch.float32. Convert it:"
                " input.to(torch.float32)."
            ),
        ),
        (model, (x.to("meta"),), "input: got device meta, expected the parameters' cpu"),
        (model, (x, h), "hx: got Tensor, expected a pair of tensors (h_0, c_0)"),
        (model, (x, (h, h[:1])), "hx[1]: got shape (1, 2, 5), expected shape (2, 2, 5)"),
        (model, (x[:, 0], (h, h)), "hx[0]: got shape (2, 2, 5), expected shape (2, 5)"),
        (model, (x, (h, h.double())), "hx[1]: got torch.float64"),
        (
            model,
            (pack_sequence([x[:, 0], x[:2, 1]]), (h[:, :1], h)),
            "hx[0]: got shape (2, 1, 5), expected shape (2, 2, 5)",
        ),
        (model, (pack_sequence([x[:, 0, :2]]),), "input.data: got shape (4, 2)"),
        (cell, (x,), "input: got shape (4, 2, 3), expected 1 or 2 dimensions"),
        (cell, (x[0], (h[0, 0], h[0, 0])), "hx[0]: got shape (5,), expected shape (2, 5)"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            module(*given)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(InputError, match=re.escape("input: got torch.int64")),
    ):
        model(x.long())
