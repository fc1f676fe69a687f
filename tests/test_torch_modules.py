"""lntune.LayerNorm stands in for torch.nn.LayerNorm, and lntune.convert puts it there."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lntune
from lntune.torch import layer_norm as module

pytestmark = pytest.mark.filterwarnings("ignore::lntune.UntunedWarning")

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "plain": {"elementwise_affine": False},
    "no bias": {"bias": False},
    "eps": {"eps": 1e-3},
    "bfloat16": {"dtype": torch.bfloat16},
}


def randomize(model: nn.Module) -> nn.Module:
    """Weights that are not ones and zeros, so that a lost one shows."""
    for p in model.parameters():
        nn.init.normal_(p, mean=0.5)
    return model


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal up to a rounding or two of the dtype."""
    loose = 1e-5 if ours.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(ours, theirs, atol=loose, rtol=loose)


@pytest.mark.parametrize("shape", [64, (64,), (4, 16), [4, 16]], ids=repr)
@pytest.mark.parametrize("options", OPTIONS)
def test_the_module(options: str, shape: Any) -> None:
    """The same constructor, state_dict, repr, initialization and results; weights go over both
    ways.
    """
    theirs, ours = (
        nn.LayerNorm(shape, **OPTIONS[options]),
        lntune.LayerNorm(shape, **OPTIONS[options]),
    )
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours) == repr(theirs)
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )
    ours.load_state_dict(randomize(theirs).state_dict())
    x = torch.randn(3, *theirs.normalized_shape, dtype=OPTIONS[options].get("dtype"))
    for _ in range(2):
        close(ours(x), theirs(x))
        with torch.inference_mode():
            close(ours(x), theirs(x))
    theirs.load_state_dict(randomize(ours).state_dict())
    close(ours(x), theirs(x))


def test_copies_and_files(tmp_path: Path) -> None:
    """deepcopy, pickle and torch.save give a module that computes the same, also after the fast
    path was used.
    """
    ours = randomize(lntune.LayerNorm(64))
    x = torch.randn(3, 64)
    with torch.no_grad():
        y = [ours(x) for _ in range(2)][-1]
        copies = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
        torch.save(ours, tmp_path / "module.pt")
        copies.append(torch.load(tmp_path / "module.pt", weights_only=False))
        file = io.BytesIO()
        torch.save(ours.state_dict(), file)
        file.seek(0)
        copies.append(nn.LayerNorm(64))
        copies[-1].load_state_dict(torch.load(file))
        assert [type(c) for c in copies] == [lntune.LayerNorm] * 3 + [nn.LayerNorm]
        for c in copies:
            close(c(x), y)


def test_moving_and_changing_dtype() -> None:
    """.to(dtype), half of a model and the meta device work as on nn.LayerNorm."""
    ours = randomize(lntune.LayerNorm(64))
    x = torch.randn(3, 64)
    close(
        ours.to(torch.bfloat16)(x.bfloat16()),
        nn.functional.layer_norm(x.bfloat16(), (64,), ours.weight, ours.bias),
    )
    close(
        ours.to(torch.float32)(x.bfloat16()),
        nn.functional.layer_norm(x.bfloat16(), (64,), ours.weight, ours.bias),
    )
    assert ours.to("meta")(x.to("meta")).shape == x.shape


class Own(nn.LayerNorm):
    """Somebody's subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Net(nn.Module):
    """Nested, shared and foreign layer norms."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.LayerNorm(64)
        self.first = nn.Sequential(
            nn.Linear(64, 64), shared, nn.ModuleList([nn.LayerNorm((4, 16), bias=False)])[0]
        )
        self.again = shared
        self.own = Own(64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first[1](self.first[0](x))
        x = self.first[2](x.view(-1, 4, 16)).view(x.shape)
        return self.own(self.again(x))


def test_conversion() -> None:
    """Nested modules are found, sharing, parameters, hooks and flags stay, a subclass is left
    alone, twice is once.
    """
    model = randomize(Net()).eval()
    model.first[1].weight.requires_grad_(False)
    called: list[str] = []
    model.again.register_forward_hook(lambda *_: called.append("forward"))
    model.again.register_full_backward_hook(lambda *_: called.append("backward"))
    parameters, keys = [id(p) for p in model.parameters()], list(model.state_dict())
    x = torch.randn(5, 64)
    y = model(x)
    called.clear()
    for _ in range(2):
        assert lntune.convert(model) is model
        assert [type(m) for m in model.modules() if isinstance(m, nn.LayerNorm)] == [
            lntune.LayerNorm,
            lntune.LayerNorm,
            Own,
        ]
        assert model.first[1] is model.again
        assert [id(p) for p in model.parameters()] == parameters and list(
            model.state_dict()
        ) == keys
        assert not model.again.training and not model.again.weight.requires_grad
    close(model(x), y)
    assert called == ["forward", "forward"]
    model(x).sum().backward()
    assert called.count("backward") == 2


def test_converting_a_layer_norm_itself() -> None:
    """A model that is a LayerNorm becomes one of ours; a model without any stays as it is."""
    assert type(lntune.convert(nn.LayerNorm(64))) is lntune.LayerNorm
    with pytest.warns(UserWarning, match="no torch.nn.LayerNorm"):
        assert type(lntune.convert(nn.Linear(4, 4))) is nn.Linear
    assert isinstance(lntune.LayerNorm(64), nn.LayerNorm)


def test_parametrized_modules_are_left_alone() -> None:
    """A parametrized LayerNorm has a class made for it; converting keeps it and its result."""

    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    model = nn.Sequential(nn.LayerNorm(64))
    parametrize.register_parametrization(model[0], "weight", Double())
    x = torch.randn(3, 64)
    y = model(x)
    with pytest.warns(UserWarning, match="parametrized"):
        close(lntune.convert(model)(x), y)
    assert parametrize.is_parametrized(model[0])


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder(norm_first: bool) -> None:
    """A TransformerEncoderLayer gives the same in training, in eval with gradients, and on its own
    fused inference path.
    """
    torch.manual_seed(0)
    layer = randomize(
        nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=norm_first)
    )
    for p in layer.parameters():
        p.data.mul_(0.1)
    x = torch.randn(2, 5, 64)
    converted = lntune.convert(copy.deepcopy(layer))
    assert sum(type(m) is lntune.LayerNorm for m in converted.modules()) == 2
    for training in (True, False):
        layer.train(training), converted.train(training)
        close(converted(x), layer(x))
        with torch.inference_mode():
            close(converted(x), layer(x))
    layer.train()(x).square().sum().backward()
    converted.train()(x).square().sum().backward()
    for ours, theirs in zip(converted.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-3, rtol=1e-3)


def test_modules_use_the_fast_path() -> None:
    """After a call a module's kernel is remembered: conversion is not undone by a detour through
    eager.
    """
    lntune.reload()
    ours = lntune.LayerNorm(64)
    with torch.no_grad():
        ours(torch.randn(3, 64))
        assert (
            module._direct.call(torch.randn(3, 64), (64,), ours.weight, ours.bias, ours.eps)
            is not None
        )
