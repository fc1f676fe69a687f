"""What lntune.convert and lntune.revert say and do to models that others have wrapped, hooked or
subclassed.
"""

from __future__ import annotations

import copy
import functools
import logging
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
from torch.nn.utils import parametrize, prune

import lntune
from lntune.errors import InputError
from lntune.torch import layer_norm as layer_norm_module
from lntune.torch import modules

pytestmark = pytest.mark.filterwarnings("ignore::lntune.UntunedWarning")

HIDDEN = 64
X = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    """A layer norm, named 1, between two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, HIDDEN))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A list that grows by each call of lntune's forward."""
    recorded: list[bool] = []
    plain = modules.layer_norm
    monkeypatch.setattr(
        modules, "layer_norm", lambda *given: recorded.append(True) or plain(*given)
    )
    return recorded


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of this one process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


class Own(nn.LayerNorm):
    """Somebody's subclass."""


class OwnOfOurs(lntune.LayerNorm):
    """A subclass of ours, with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def test_conversion_says_what_and_why() -> None:
    """Each norm is listed once: those that run on lntune, and for each other the reason; shared
    modules count once; nothing is changed.
    """
    model = nn.ModuleDict(
        {
            "plain": nn.LayerNorm(4),
            "own": Own(4),
            "ours": lntune.LayerNorm(4),
            "of_ours": OwnOfOurs(4),
        }
    )
    model["again"], model["set"], model["parametrized"] = (
        model["plain"],
        nn.LayerNorm(4),
        nn.LayerNorm(4),
    )
    model["set"].forward = functools.partial(torch.mul, 2)
    parametrize.register_parametrization(model["parametrized"], "weight", nn.Identity())
    before = [type(m) for m in model.modules()]
    conversion = lntune.conversion(model)
    assert conversion.converted == ("ours",) and list(conversion.left) == [
        "plain",
        "own",
        "of_ours",
        "set",
        "parametrized",
    ]
    reasons = {
        "plain": "not converted",
        "own": f"{__name__}.Own is another class",
        "of_ours": f"{__name__}.OwnOfOurs is another class",
        "parametrized": "it is parametrized",
    }
    assert {name: conversion.left[name] for name in reasons} == reasons
    assert conversion.left["set"].startswith("a forward was set on the module")
    assert str(conversion).startswith(
        "1 of 6 layer norms are lntune's; left: plain (not converted); own ("
    )
    assert [type(m) for m in model.modules()] == before
    assert (
        str(lntune.conversion(nn.LayerNorm(4)))
        == "0 of 1 layer norm is lntune's; left: the model itself (not converted)"
    )
    assert str(lntune.conversion(lntune.LayerNorm(4))) == "1 of 1 layer norm is lntune's"
    assert (
        str(lntune.conversion(nn.Linear(1, 1)))
        == "no torch.nn.LayerNorm among its modules and no call of one in a graph"
    )
    many = str(lntune.conversion(nn.Sequential(*(Own(4) for _ in range(9)))))
    assert f"left: 0, 1, 2, 3, 4 and 4 more ({__name__}.Own is another class)" in many


def test_convert_logs_and_warns(
    caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    """What was changed is information, what was left a warning in the log; a model without a norm
    to convert is a warning at its caller.
    """
    caplog.set_level(logging.INFO, "lntune")
    whole, part = network(), nn.Sequential(network(), Own(4))
    lntune.convert(whole), lntune.convert(part), lntune.convert(whole)
    assert [(r.name, r.levelname) for r in caplog.records] == [
        ("lntune", "INFO"),
        ("lntune", "WARNING"),
        ("lntune", "INFO"),
    ]
    messages = [r.getMessage() for r in caplog.records]
    assert (
        messages[0]
        == "lntune.convert changed 1 layer norm of Sequential: 1 of 1 layer norm is lntune's"
    )
    assert messages[1].startswith(
        "lntune.convert changed 1 layer norm of Sequential: 1 of 2 layer norms are lntune's;"
        " left: 1 ("
    )
    assert messages[2].startswith("lntune.convert changed 0 layer norms")
    assert not recwarn
    for model, why in (
        (nn.Linear(4, 4), "no torch.nn.LayerNorm among its modules and no call of one in a graph"),
        (nn.Sequential(Own(4)), "left: 0 ("),
    ):
        with pytest.warns(UserWarning, match="changed nothing") as caught:
            lntune.convert(model)
        assert why in str(caught[0].message) and caught[0].filename == __file__


def test_revert_is_the_way_back() -> None:
    """Converted and reverted, a model has the classes, parameters, hooks and results it had; a
    subclass of ours stays.
    """
    model = nn.Sequential(network(), Own(HIDDEN), OwnOfOurs(HIDDEN))
    seen: list[str] = []
    model[0][1].register_forward_hook(lambda *_: seen.append("hook"))
    before, parameters, y = (
        [type(m) for m in model.modules()],
        list(map(id, model.parameters())),
        model(X),
    )
    assert lntune.revert(lntune.convert(model)) is model
    assert [type(m) for m in model.modules()] == before and list(
        map(id, model.parameters())
    ) == parameters
    assert torch.equal(model(X), y) and seen == ["hook"] * 2
    assert type(lntune.revert(lntune.LayerNorm(4))) is nn.LayerNorm


def check(model: nn.Module, calls: list[bool], reverts: bool = True) -> None:
    """The model, converted, calls lntune with the result and gradients of the network as it was;
    reverted, it does not.
    """
    wanted = network()
    y = wanted(X)
    y.sum().backward()
    calls.clear()
    got = model(X)
    got.sum().backward()
    assert (
        calls == [True]
        and len(lntune.conversion(model).converted) == 1
        and not lntune.conversion(model).left
    )
    torch.testing.assert_close(got, y)
    for ours, theirs in zip(model.parameters(), wanted.parameters(), strict=True):
        grad = ours.grad.full_tensor() if hasattr(ours.grad, "full_tensor") else ours.grad
        torch.testing.assert_close(grad, theirs.grad, atol=1e-4, rtol=1e-4)
    lntune.revert(model)
    torch.testing.assert_close(model(X), y)
    assert calls == [True] and not lntune.conversion(model).converted


@pytest.mark.parametrize("first", ["shard", "convert"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm sharded", "model sharded"])
def test_fsdp2(norm: bool, first: str, mesh: DeviceMesh, calls: list[bool]) -> None:
    """Norms that fully_shard has given a class of its own are converted beneath it, before or
    after, and stay sharded.
    """
    model: Any = network()
    if first == "convert":
        lntune.convert(model)
    for part in [*([model[1]] if norm else []), model]:
        fully_shard(part, mesh=mesh)
    if first == "shard":
        lntune.convert(model)
    assert isinstance(model[1], FSDPModule) is norm and isinstance(model[1], lntune.LayerNorm)
    assert type(model[1].weight).__name__ == "DTensor"
    if norm:
        assert type(model[1]).__name__.startswith("FSDP")
        with pytest.raises(AssertionError, match="deepcopy"):
            copy.deepcopy(model[1])
        assert type(lntune.convert(fully_shard(nn.LayerNorm(HIDDEN), mesh=mesh))) is type(
            lntune.convert(fully_shard(nn.LayerNorm(3), mesh=mesh))
        )
    check(model, calls)
    assert isinstance(model[1], FSDPModule) is norm


def test_tensor_parallel(mesh: DeviceMesh, calls: list[bool]) -> None:
    """A converted norm whose input and weights are DTensors is PyTorch's, which knows how to shard
    it, compiled too.
    """
    norm = lntune.convert(
        parallelize_module(nn.LayerNorm(HIDDEN), mesh, SequenceParallel(sequence_dim=0))
    )
    whole = distribute_tensor(X, mesh, [Shard(0)])
    wanted = nn.functional.layer_norm(X, (HIDDEN,))
    y = norm(whole)
    assert type(y) is DTensor and calls == [True] and torch.equal(y.full_tensor(), wanted)
    torch._dynamo.reset()
    compiled = torch.compile(lntune.layer_norm, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(whole, (HIDDEN,), norm.weight, norm.bias).full_tensor(), wanted
    )


WRAPPERS: dict[str, Callable[[nn.Module, Any], nn.Module]] = {
    "DDP": lambda model, mesh: nn.parallel.DistributedDataParallel(model),
    "data parallel": lambda model, mesh: nn.DataParallel(model),
    "forward removed": lambda model, mesh: _unhooked(model),
    "hooked": lambda model, mesh: _hooked(model),
}


def _hooked(model: Any) -> nn.Module:
    """A model as accelerate.hooks.add_hook_to_module leaves it."""

    def new_forward(module: Any, *args: Any) -> Any:
        return module._hf_hook(module._old_forward(*args))

    for module in model:
        module._old_forward = module.forward
        module._hf_hook = lambda y: y
        module.forward = functools.update_wrapper(
            functools.partial(new_forward, module), module._old_forward
        )
    return model


def _unhooked(model: Any) -> nn.Module:
    """A model as accelerate.hooks.remove_hook_from_module leaves it."""
    for module in _hooked(model).children():
        module.forward = module._old_forward
        del module._old_forward, module._hf_hook
    return model


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models(wrapper: str, mesh: DeviceMesh, calls: list[bool]) -> None:
    """Norms are found and changed inside what PyTorch's and accelerate's wrappers make of a
    model.
    """
    check(lntune.convert(WRAPPERS[wrapper](network(), mesh)), calls)


@pytest.mark.slow
@pytest.mark.xfail(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12),
    reason="dynamo of PyTorch 2.11 does not look whether a module has another class",
)
def test_compiled_models() -> None:
    """A model that was compiled, and has run, is compiled again with our operator once it is
    converted, and without it when reverted.
    """
    graphs: list[bool] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append("lntune.layer_norm" in graph.code)
        return graph.forward

    torch._dynamo.reset()
    plain = network()
    model = torch.compile(plain, backend=backend)
    y = model(X)
    for change in (lntune.convert, lntune.revert):
        torch.testing.assert_close(change(model)(X), y)  # type: ignore[operator]
    assert graphs == [False, True]  # and then the first again


def test_accelerate_itself(calls: list[bool]) -> None:
    """A model offloaded by accelerate is converted beneath its hooks."""
    accelerate = pytest.importorskip(
        "accelerate",
        reason="accelerate is no dependency of the tests, whose stand-in is its protocol",
    )
    model = lntune.convert(accelerate.cpu_offload(network(), execution_device=torch.device("cpu")))
    with torch.no_grad():
        torch.testing.assert_close(model(X), network()(X))
    assert calls == [True]


def test_a_forward_of_the_users_is_kept() -> None:
    """A module whose forward somebody has set keeps it and its class, and is said to; hooks over
    such a forward too.
    """
    for hooked in (False, True):
        model = network()
        model[1].forward = lambda x: x + 1
        if hooked:
            _hooked(model)
        y = model(X)
        with pytest.warns(UserWarning, match="a forward was set on the module"):
            lntune.convert(model)
        assert type(model[1]) is nn.LayerNorm and torch.equal(model(X), y)


def test_pruned_norms(calls: list[bool]) -> None:
    """torch.nn.utils.prune before or after conversion: the masked weight is what is used."""
    for first in (True, False):
        model: Any = network()
        for step in (lntune.convert, lambda m: prune.l1_unstructured(m[1], "weight", 0.5))[
            :: 1 if first else -1
        ]:
            step(model)
        with torch.no_grad():
            model[1].weight_orig.fill_(3.0)
        y = model(X)
        assert calls.pop() and len(lntune.conversion(model).converted) == 1
        weight = 3.0 * model[1].weight_mask
        torch.testing.assert_close(
            y, model[2](nn.functional.layer_norm(model[0](X), (HIDDEN,), weight, model[1].bias))
        )


def test_functional_call_and_stacked_models() -> None:
    """torch.func.functional_call and vmap over a stack of converted models give what they give
    unconverted.
    """
    nets = [network() for _ in range(2)]
    for net in nets:
        nn.init.normal_(net[1].weight)
    parameters, _ = torch.func.stack_module_state(nets)
    results = []
    for model in (nets[0], lntune.convert(copy.deepcopy(nets[0]))):
        results.append(
            torch.vmap(lambda p, model=model: torch.func.functional_call(model, p, (X,)))(
                parameters
            )
        )
        results.append(
            torch.stack(
                [
                    torch.func.functional_call(
                        model, {k: v[i] for k, v in parameters.items()}, (X,)
                    )
                    for i in range(2)
                ]
            )
        )
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_shared_memory_and_lazy_devices() -> None:
    """share_memory, to_empty from the meta device and skip_init leave a converted model what it
    is.
    """
    model = lntune.convert(network())
    model.share_memory()
    assert model[1].weight.is_shared()
    with torch.device("meta"):
        empty = lntune.convert(network())
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    torch.testing.assert_close(empty(X), model(X))
    skipped = torch.nn.utils.skip_init(lntune.LayerNorm, HIDDEN)
    skipped.load_state_dict(model[1].state_dict())
    torch.testing.assert_close(skipped(X), model[1](X))


def test_the_fused_encoder_path_calls_no_norm(calls: list[bool]) -> None:
    """In inference nn.TransformerEncoderLayer reads its norms' parameters and calls neither kind,
    unless its fast path is switched off.
    """
    layer = lntune.convert(
        nn.TransformerEncoderLayer(HIDDEN, 2, 32, dropout=0.0, batch_first=True)
    ).eval()
    with torch.no_grad():
        fused = layer(X[None])
        assert not calls
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            plain = layer(X[None])
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    assert calls == [True, True]
    torch.testing.assert_close(plain, fused, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["symbolic_trace", "export", "functional", "operator"])
def test_graphs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of layer norm in a graph of torch.fx or of an exported program are converted and
    reverted, in submodules too, with the same result; a graph with them is pickled, and written
    without lntune when it is exported again.
    """

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            net: Any = self.net
            if kind == "functional":
                return net[2](
                    nn.functional.layer_norm(
                        net[0](x), [HIDDEN], bias=net[1].bias, weight=net[1].weight, eps=1e-5
                    )
                )
            if kind == "operator":
                return net[2](
                    torch.layer_norm(
                        net[0](x), [HIDDEN], net[1].weight, net[1].bias, 1e-5, cudnn_enable=False
                    )
                )
            return net(x)

    Calls.forward.__annotations__.clear()  # torch.fx does not pickle those that are strings
    plain: Any = Calls()
    if kind == "symbolic_trace":
        plain = lntune.convert(plain)  # through whose norms torch.fx traces
    graph: Any = (
        torch.export.export(plain, (X,)).module()
        if kind == "export"
        else torch.fx.symbolic_trace(plain)
    )
    outer = nn.Sequential(graph)
    (name,) = lntune.conversion(outer).left
    assert (
        name.startswith("0.")
        and "norm" in name
        and lntune.conversion(outer).left[name] == "not converted"
    )
    y = graph(X)
    lntune.convert(outer)
    assert lntune.conversion(outer).converted == (name,)
    seen: list[Any] = []
    direct = layer_norm_module._direct.call
    monkeypatch.setattr(
        layer_norm_module._direct, "call", lambda *given: seen.append(given) or direct(*given)
    )
    torch.testing.assert_close(graph(X), y)
    torch.testing.assert_close(pickle.loads(pickle.dumps(graph))(X) if kind != "export" else y, y)
    assert seen
    again = torch.export.export(graph, (X,))
    assert "aten.layer_norm.default" in str(again.graph) and "lntune" not in str(again.graph)
    torch.testing.assert_close(torch.jit.script(graph)(X) if kind != "export" else y, y)
    decomposed = again.run_decompositions().module()
    assert list(lntune.conversion(decomposed).left.values()) == [
        "the operator gives statistics as well"
    ]
    seen.clear()
    assert not lntune.conversion(lntune.revert(outer)).converted
    torch.testing.assert_close(graph(X), y)
    assert not seen


@pytest.mark.parametrize("function", [lntune.convert, lntune.conversion, lntune.revert])
def test_what_is_no_model_is_refused(function: Callable[[Any], Any]) -> None:
    """Anything but a module is an error that names the argument."""
    with pytest.raises(InputError, match="model: got int, expected"):
        function(3)
