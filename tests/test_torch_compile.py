"""lntune.layer_norm under torch.compile and torch.export, and the custom op beneath."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from grids import exhaustive
from torch import Tensor
from torch.nn import functional

import lntune
from lntune.torch.constants import constant
from lntune.torch.layer_norm import layer_norm_op

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

HIDDEN = 64


@pytest.fixture(autouse=True)
def fresh() -> None:
    """No compiled code of an earlier test."""
    torch._dynamo.reset()


def make(
    *shape: int, dtype: torch.dtype = torch.float32, grad: bool = False, seed: int = 0
) -> Tensor:
    """Random numbers."""
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        .to(dtype)
        .requires_grad_(grad)
    )


def model(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    """Something on either side for a compiler to fuse."""
    return lntune.layer_norm(x * 2, (HIDDEN,), w, b).relu()


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_forward_and_training(backend: str) -> None:
    """One graph, whose results are those of the same code uncompiled, with gradients and, where
    that takes no C++ compiler, without.
    """
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    plain = (make(5, HIDDEN), make(HIDDEN, seed=1), make(HIDDEN, seed=2))
    if backend != "inductor":
        with torch.no_grad():
            torch.testing.assert_close(compiled(*plain), model(*plain))
    grads = []
    for f in (compiled, model):
        given = [t.detach().clone().requires_grad_() for t in plain]
        f(*given).square().sum().backward()
        grads.append([t.grad for t in given])
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, exhaustive(torch.float16)], ids=str)
def test_mixed_dtypes_in_training(dtype: torch.dtype) -> None:
    """Mixtures of a low-precision input and its affine train under compile as they do without."""
    for w, b in (
        (None, None),
        (dtype, dtype),
        (torch.float32, dtype),
        (None, torch.float32),
    ):
        torch._dynamo.reset()
        grads = []
        for f in (torch.compile(model, fullgraph=True, backend="aot_eager"), model):
            x = make(5, HIDDEN, dtype=dtype, grad=True)
            affine = [
                None if d is None else make(HIDDEN, dtype=d, grad=True, seed=s)
                for s, d in enumerate((w, b), 1)
            ]
            f(x, *affine).float().square().sum().backward()
            grads.append([t.grad for t in (x, *affine) if t is not None])
        torch.testing.assert_close(*grads, atol=5e-2, rtol=5e-2)


def test_dynamic_rows() -> None:
    """dynamic=True compiles once for every number of rows, and 2-D and 3-D input give what eager
    gives.
    """
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    w, b = make(HIDDEN, seed=1), make(HIDDEN, seed=2)
    for rows in (3, 5, 40, 200):
        x = make(rows, HIDDEN)
        torch.testing.assert_close(compiled(x, w, b), model(x, w, b))
    assert counter.frame_count == 1
    torch.testing.assert_close(compiled(make(2, 3, HIDDEN), w, b), model(make(2, 3, HIDDEN), w, b))
    traced = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5):
        x = make(rows, HIDDEN, grad=True)
        traced(x, w, b).sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("eps", [-0.5, -2.0, float("nan"), float("inf")], ids=repr)
def test_any_eps_of_pytorchs(eps: Any) -> None:
    """An eps that PyTorch takes compiles to what it gives uncompiled, with gradients."""
    results = []
    for f in (
        torch.compile(lntune.layer_norm, fullgraph=True, backend="aot_eager"),
        functional.layer_norm,
    ):
        x, w = make(5, HIDDEN, grad=True), make(HIDDEN, grad=True, seed=1)
        y = f(x, (HIDDEN,), w, None, eps)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, w])])
    torch.testing.assert_close(*results, equal_nan=True, atol=1e-4, rtol=1e-4)


def test_what_pytorch_serves_compiles_too() -> None:
    """float64, a list as shape, several dimensions, no rows: one graph each, eager's result."""

    def f(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return lntune.layer_norm(x, [HIDDEN]), lntune.layer_norm(y, y.shape[1:])

    for x, y in (
        (make(3, HIDDEN, dtype=torch.float64), make(3, 4, 16)),
        (make(0, HIDDEN), make(2, 4, 16)),
    ):
        torch.testing.assert_close(
            torch.compile(f, fullgraph=True, backend="aot_eager")(x, y), f(x, y)
        )


def test_a_constant_is_one_to_pytorch() -> None:
    """`constant` marks a function as PyTorch's own way does, which imports all that compiling
    needs; and what it says is asked while tracing.
    """

    def ours() -> bool:
        return len([1]) > 0

    def theirs() -> bool:
        return len([1]) > 0

    assert (
        constant(ours) is ours
        and vars(torch.compiler.assume_constant_result(theirs)) == vars(ours) != {}
    )
    asked = []
    answer = constant(lambda: bool(asked.append(torch.compiler.is_compiling()) or True))
    compiled = torch.compile(lambda x: x + 1 if answer() else x, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == 1 and asked


def test_bad_arguments_name_themselves() -> None:
    """A wrong argument is refused while compiling, with the message of the uncompiled call in the
    error.
    """
    for given, argument in (
        ((make(3, 32), None, None), "input: got"),
        ((make(3, HIDDEN), make(32), None), "weight: got"),
    ):
        with pytest.raises(Exception, match=argument):
            torch.compile(model, fullgraph=True, backend="aot_eager")(*given)


@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_transforms_inside_compiled_code(transform: str) -> None:
    """torch.func's transforms compile as they do with eager's layer norm."""
    w, b, x = make(HIDDEN, seed=1), make(HIDDEN, seed=2), make(3, HIDDEN)

    def run(f: Any) -> Any:
        def of(t: Tensor) -> Any:
            if transform == "vmap":
                return torch.vmap(lambda row: f(row, (HIDDEN,), w, b))(t)
            return torch.func.grad(lambda t: f(t, (HIDDEN,), w, b).sin().sum())(t)

        return of

    compiled = torch.compile(run(lntune.layer_norm), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), run(functional.layer_norm)(x), atol=1e-5, rtol=1e-4)


JVP = """
import torch, lntune
x = torch.randn(3, 64)
def jvp(f):
    return lambda t: torch.func.jvp(lambda t: f(t, (64,)), (t,), (t.cos(),))
wanted = jvp(torch.nn.functional.layer_norm)(x)
try:
    got = torch.compile(jvp(lntune.layer_norm), backend="aot_eager", fullgraph=True)(x)
except Exception as e:
    print("refused", type(e).__name__)
else:
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    print("right")
"""


def test_forward_mode_inside_compiled_code() -> None:
    """A compiled jvp is right where PyTorch can compile it, and an error where it cannot; never a
    tangent of zeros.

    In a process of its own, since PyTorch 2.13 leaves its forward-mode level open when it fails.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", JVP],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout.startswith(("refused", "right")), done.stderr


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export(strict: bool) -> None:
    """An exported module holds PyTorch's norm, so that it runs where lntune is not, and takes any
    number of rows.
    """
    net = torch.nn.Sequential(torch.nn.Linear(HIDDEN, HIDDEN), lntune.LayerNorm(HIDDEN)).eval()
    rows = torch.export.Dim("rows", min=2, max=1024)
    with torch.no_grad():
        net[1](make(5, HIDDEN))  # the fast path is ready, and must not be taken
        program = torch.export.export(
            net, (make(5, HIDDEN),), dynamic_shapes=({0: rows},), strict=strict
        )
        assert (
            "torch.ops.aten.layer_norm" in program.graph_module.code
            and "lntune" not in program.graph_module.code
        )
        for x in (make(5, HIDDEN), make(9, HIDDEN)):
            torch.testing.assert_close(program.module()(x), net(x))


def test_compiled_module_in_inference() -> None:
    """A converted, compiled model under inference_mode and autocast gives what it gives
    uncompiled.
    """
    net = lntune.convert(
        torch.nn.Sequential(torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.LayerNorm(HIDDEN))
    ).eval()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = make(5, HIDDEN)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), net(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours, theirs = compiled(x), net(x)
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs)


SAMPLES: dict[str, tuple[Any, ...]] = {
    "training": (
        make(5, HIDDEN, grad=True),
        [HIDDEN],
        make(HIDDEN, grad=True, seed=1),
        make(HIDDEN, grad=True, seed=2),
        1e-5,
        True,
    ),
    "inference": (
        make(5, HIDDEN),
        [HIDDEN],
        make(HIDDEN, seed=1),
        make(HIDDEN, seed=2),
        1e-5,
        False,
    ),
    "plain 3d": (make(2, 3, HIDDEN, grad=True), [HIDDEN], None, None, 1e-5, True),
    "two dimensions": (make(5, 4, 16), [4, 16], make(4, 16, seed=1), None, 1e-5, True),
    "bfloat16": (
        make(5, HIDDEN, dtype=torch.bfloat16),
        [HIDDEN],
        make(HIDDEN, seed=1),
        make(HIDDEN, seed=2, dtype=torch.bfloat16),
        1e-5,
        True,
    ),
    "strided": (make(HIDDEN, 5).t(), [HIDDEN], make(2 * HIDDEN, seed=1)[::2], None, 1e-5, True),
    "no rows": (make(0, HIDDEN), [HIDDEN], None, None, 1e-5, True),
    "nothing": (make(3, 0), [0], None, None, 1e-5, True),
    "one row": (make(HIDDEN), [HIDDEN], None, make(HIDDEN, seed=2), 1e-5, True),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(sample: str) -> None:
    """PyTorch's own checks of a custom op: schema, fake result, autograd registration, and AOT
    dispatch with dynamic shapes.
    """
    # The rstd of a row of nothing is NaN, which opcheck's comparison of AOT with eager takes for a
    # difference.
    utilities = (
        ("test_schema", "test_autograd_registration", "test_faketensor")
        if sample == "nothing"
        else "ALL"
    )
    torch.library.opcheck(layer_norm_op, SAMPLES[sample], test_utils=utilities)


def test_the_op_keeps_float32_statistics() -> None:
    """mean and rstd are float32, one per row, with `stats`, and empty without; for a gradient they
    are made then.
    """
    x = make(2, 3, HIDDEN, dtype=torch.bfloat16)
    _, mean, rstd = torch.ops.lntune.layer_norm(x, [HIDDEN], None, None, 1e-5, True)
    assert mean.dtype == rstd.dtype == torch.float32
    torch.testing.assert_close(mean, x.double().mean(-1).flatten().float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        rstd,
        (x.double().var(-1, correction=0) + 1e-5).rsqrt().flatten().float(),
        atol=1e-5,
        rtol=1e-5,
    )
    assert [
        t.numel() for t in torch.ops.lntune.layer_norm(x, [HIDDEN], None, None, 1e-5, False)[1:]
    ] == [0, 0]
    y, _, _ = torch.ops.lntune.layer_norm(x.requires_grad_(), [HIDDEN], None, None, 1e-5, False)
    y.float().square().sum().backward()
    got, x.grad = x.grad, None
    torch.nn.functional.layer_norm(x, [HIDDEN]).float().square().sum().backward()
    torch.testing.assert_close(got, x.grad, atol=0.02, rtol=0.02)
