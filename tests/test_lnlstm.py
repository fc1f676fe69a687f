"""The LN-LSTM step as a function: its activations, every form of call, gradients, bad arguments."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from grids import exhaustive, product
from kernel_arguments import inputs
from torch import Tensor

import lntune
from lntune import device, ops
from lntune.backends.backend import TVM
from lntune.backends.cpu import llvm
from lntune.case import Case
from lntune.ops.lnlstm_step import VARIANTS, formula, variant
from lntune.torch import dispatch
from lntune.torch import lnlstm as module
from lntune.torch.lnlstm import lnlstm_step
from lntune.transforms.cpu import alignment, polynomials

pytestmark = pytest.mark.filterwarnings("ignore::lntune.UntunedWarning")

NAMES = ("gates_x", "gates_h", "c", "weight_x", "weight_h", "weight_c", "bias", "bias_c")
ROUNDING = {torch.float32: 16 * 2.0**-24, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
HIDDEN = 48
FORMS_HIDDEN = 16
"""Where much is called that has kernels of its own: they are built in half the time without a tail,
which test_kernels.py is about.
"""


@pytest.fixture(scope="module")
def activations() -> Callable[[str, np.ndarray], np.ndarray]:
    """`activations(name, x)`: a function of ops/activations.py, compiled for vectors, of a float32
    array.
    """
    import tvm
    from tvm import s_tir, te, tirx

    from lntune.ops import activations as module

    def run(name: str, x: np.ndarray) -> np.ndarray:
        n = te.var("n", "int64")
        given = te.placeholder((n, tirx.IntImm("int64", 16)), "float32", name="x")
        output = te.compute(given.shape, lambda i, k: getattr(module, name)(given[i, k]), name="y")
        sch = s_tir.Schedule(alignment.element_aligned(te.create_prim_func([given, output])))
        sch.vectorize(sch.get_loops(sch.get_sblock("y"))[1])
        goal = tvm.target.Target(llvm.target(device.current()))
        with TVM:  # the compiler is used by one thread at a time
            kernel = tvm.compile(polynomials.expanded(sch.mod), target=goal)["main"]
        padded = np.resize(x.astype(np.float32), (-(-x.size // 16), 16))
        out = np.empty_like(padded)
        kernel(torch.from_numpy(padded), torch.from_numpy(out))
        return out.reshape(-1)[: x.size]

    return run


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_activations(name: str, activations: Callable[[str, np.ndarray], np.ndarray]) -> None:
    """Within three units in the last place where the result is a normal number, at the ends and for
    the smallest x too; NaN stays.
    """
    x = np.concatenate(
        [
            np.linspace(-87, 88, 40001),
            np.linspace(-1, 1, 20001),
            np.geomspace(1e-30, 1, 5000),
            -np.geomspace(1e-30, 1, 5000),
        ]
    )
    x = x.astype(np.float32)
    wide = x.astype(np.float64)
    truth = {"sigmoid": lambda v: 1 / (1 + np.exp(-v)), "tanh": np.tanh}[name](wide)
    off = np.abs(activations(name, x) - truth) / np.maximum(
        np.spacing(np.abs(truth).astype(np.float32)), np.finfo(np.float32).tiny
    )
    assert off.max() <= 3, x[off.argmax()]
    ends = activations(name, np.array([-np.inf, -1e30, 1e30, np.inf, np.nan], np.float32))
    low, high = {"sigmoid": (0.0, 1.0), "tanh": (-1.0, 1.0)}[name]
    assert np.allclose(ends[:4], [low, low, high, high], atol=1e-37)
    assert np.isnan(ends[4])


def make_arguments(
    batch: tuple[int, ...] = (6,),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    hidden: int = HIDDEN,
) -> dict[str, Any]:
    """Random arguments, all there."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "c": (*batch, hidden),
        "weight_c": (hidden,),
        "bias_c": (hidden,),
        "gates_x": (*batch, 4 * hidden),
        "gates_h": (*batch, 4 * hidden),
    }
    return {
        name: torch.randn(shapes.get(name, (4 * hidden,)), generator=generator).to(dtype)
        for name in NAMES
    }


def check(
    given: dict[str, Any], carried: bool = False, per_gate: bool = False, calls: int = 2
) -> list[tuple[Tensor, Tensor]]:
    """Several calls, each as near to float64 as eager; the same bits every time."""
    wide = {name: None if t is None else t.double() for name, t in given.items()}
    truth = formula(**wide, eps=1e-5, carried=carried, per_gate=per_gate)
    eager = formula(**given, eps=1e-5, carried=carried, per_gate=per_gate)
    results = [lnlstm_step(**given, carried=carried, per_gate=per_gate) for _ in range(calls)]
    for result in results:
        for ours, theirs, true in zip(result, eager, truth, strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            if ours.numel():
                error, eager_error = (
                    float((t.double() - true).abs().max()) for t in (ours, theirs)
                )
                assert error <= 2 * eager_error + ROUNDING[ours.dtype] * max(
                    1.0, float(true.abs().max())
                )
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    return results


@pytest.mark.parametrize(
    "dtype", [torch.float32, *map(exhaustive, (torch.float16, torch.bfloat16))], ids=str
)
def test_every_form(dtype: torch.dtype) -> None:
    """gates_x raw or normalized, with and without either bias, the cell carried as it is or
    normalized.

    Float32 takes those with an even number of options, the others those with an odd one; among
    either any three options have all their combinations. Every variant's kernel is checked with the
    other schedules'.
    """
    for raw, bias, bias_c, carried in itertools.product((True, False), repeat=4):
        if (raw + bias + bias_c + carried) % 2 == (dtype == torch.float32):
            continue
        given = make_arguments(dtype=dtype, hidden=FORMS_HIDDEN)
        for name, present in (("weight_x", raw), ("bias", bias), ("bias_c", bias_c)):
            if not present:
                given[name] = None
        check(given, carried)
        assert variant(raw, bias, bias_c, carried) in VARIANTS


@pytest.mark.parametrize(
    "batch", [(), exhaustive((1,)), (0,), (33,), (2, 3), exhaustive((130,))], ids=str
)
def test_batches(batch: tuple[int, ...]) -> None:
    """A single sequence without a batch, none, an odd number, more leading dimensions."""
    check(make_arguments(batch))


@pytest.mark.parametrize("view", ["strided", "transposed", "misaligned", "expanded"])
def test_layouts(view: str) -> None:
    """Any view is taken as its values are, also after a plain call made the direct one ready."""
    given = make_arguments()
    check(given)
    if view == "strided":
        given["gates_h"] = torch.randn(6, 8 * HIDDEN)[:, ::2]
    elif view == "transposed":
        given["c"] = torch.randn(HIDDEN, 6).t()
    elif view == "misaligned":
        given["gates_x"] = torch.randn(6 * 4 * HIDDEN + 3)[3:].view(6, 4 * HIDDEN)
    else:
        given["weight_h"] = torch.ones(1).expand(4 * HIDDEN)
    check(given)


def test_a_row_depends_on_itself_alone() -> None:
    """A sequence gives the same bits alone and among others, and whatever the number of threads."""
    # no log has it, so one set of knobs serves all
    given, threads = make_arguments((40,), torch.float16, hidden=256), torch.get_num_threads()
    together = lnlstm_step(**given)
    for row in (0, 17, 39):
        alone = lnlstm_step(
            **{
                name: t[row : row + 1] if name in ("gates_x", "gates_h", "c") else t
                for name, t in given.items()
            }
        )
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, together, strict=True))
    try:
        torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(lnlstm_step(**given), together, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_per_gate_is_the_formula() -> None:
    """One layer norm for each gate is PyTorch's to the bit, and differs from one over the four."""
    given = make_arguments()
    ours, joint = lnlstm_step(**given, per_gate=True), lnlstm_step(**given)
    assert all(
        torch.equal(a, b)
        for a, b in zip(ours, formula(**given, eps=1e-5, carried=False, per_gate=True), strict=True)
    )
    assert not torch.allclose(ours[0], joint[0])


def gradients(
    function: Callable[..., tuple[Tensor, Tensor]], given: dict[str, Any], **options: Any
) -> dict[str, Tensor]:
    """The gradients of a function of h and c that has both, by argument."""
    given = {
        name: t if t is None else t.detach().clone().requires_grad_() for name, t in given.items()
    }
    h, c = function(**given, **options)
    (h * 2 + c.sin()).sum().backward()
    return {name: t.grad for name, t in given.items() if t is not None}


def check_gradients(given: dict[str, Any], carried: bool = False) -> None:
    """Every gradient is as near to float64 autograd's as eager mode's is, and the same bits every
    time.
    """
    wide = {name: None if t is None else t.double() for name, t in given.items()}
    truth, eager = (gradients(formula, g, eps=1e-5, carried=carried) for g in (wide, given))
    ours, again = (gradients(lnlstm_step, given, carried=carried) for _ in range(2))
    assert set(ours) == set(truth)
    for name, grad in ours.items():
        assert (grad.shape, grad.dtype) == (given[name].shape, given[name].dtype)
        assert torch.equal(grad, again[name])
        error, eager_error = (
            float((g.double() - truth[name]).abs().max()) if g.numel() else 0.0
            for g in (grad, eager[name])
        )
        scale = max(1.0, float(truth[name].abs().max())) if grad.numel() else 1.0
        assert error <= 2 * eager_error + ROUNDING[grad.dtype] * scale, name


@pytest.mark.parametrize(
    ("dtype", "form"),
    product(
        (torch.float32, torch.bfloat16), ((1, 1, 1, 0), (0, 1, 1, 1), (1, 0, 0, 1), (0, 0, 1, 0))
    ),
    ids=str,
)
def test_gradients_of_forms(dtype: torch.dtype, form: tuple[int, ...]) -> None:
    """gates_x raw or normalized, with and without either bias, the cell carried as it is or
    normalized.

    The kernels of every combination are checked with the other schedules'.
    """
    *raw_and_biases, carried = form
    given = {name: t for name, t in make_arguments(dtype=dtype, hidden=FORMS_HIDDEN).items()}
    for name, present in zip(("weight_x", "bias", "bias_c"), raw_and_biases, strict=True):
        given[name] = given[name] if present else None
    check_gradients(given, bool(carried))


@pytest.mark.parametrize(
    "batch", [(), exhaustive((1,)), (0,), exhaustive((33,)), (2, 3), exhaustive((130,))], ids=str
)
def test_gradients_of_batches(batch: tuple[int, ...]) -> None:
    """A single sequence without a batch, none, an odd number, more leading dimensions."""
    check_gradients(make_arguments(batch, hidden=FORMS_HIDDEN))


@pytest.mark.parametrize("style", ["normal", "shifted", "constant", "tiny", "huge"])
def test_the_reference_is_autograd(style: str) -> None:
    """In float64 the backward's reference, which kernels are checked against, is what autograd
    makes of the forward's, in every variant.
    """
    for name in ops.get("lnlstm_step_backward").variants:
        case, tokens = Case("lnlstm_step_backward", 6, "float32", 5, name), name.split("+")
        given = {n: t.double() for n, t in inputs(case, 5, style, 3).items()}
        leaves = {n: given[n].requires_grad_() for n in NAMES if n in given}
        h, c = formula(**{n: leaves.get(n) for n in NAMES}, eps=1e-5, carried="carried" in tokens)
        truth = torch.autograd.grad((h, c), list(leaves.values()), (given["dh"], given["dc_new"]))
        forward = Case("lnlstm_step", 6, "float32", 5, f"{name}+stats".removeprefix("plain+"))
        with torch.no_grad():
            exact = {**given, **ops.get("lnlstm_step").reference(forward, {**leaves, "eps": 1e-5})}
            grads = ops.get(case.op).reference(case, exact)
        for n, grad in zip(leaves, truth, strict=True):
            scale = max(
                float(grad.abs().max()), float(exact["rstd_c"].max()) if n != "weight_x" else 1.0
            )
            assert float((grads[f"d{n}"] - grad).abs().max()) <= 4e-9 * max(scale, 1.0), (name, n)


def test_a_subset_of_gradients() -> None:
    """Only what is asked for is returned, and it is the same as with all the others; h or c alone
    may have a gradient.
    """
    given = make_arguments()
    whole = gradients(lnlstm_step, given)
    for wanted in (("gates_h",), ("c", "bias"), ("weight_c",), ("weight_x", "gates_x", "bias_c")):
        some = {name: t.clone().requires_grad_(name in wanted) for name, t in given.items()}
        h, c = lnlstm_step(**some)
        (h * 2 + c.sin()).sum().backward()
        assert all(
            torch.equal(some[name].grad, whole[name]) if name in wanted else some[name].grad is None
            for name in NAMES
        )
    for index in (0, 1):
        ours, theirs = (
            torch.autograd.grad(
                function(**given_grad)[index].sum(),
                list(given_grad.values()),
                allow_unused=True,
                materialize_grads=True,
            )
            for function, given_grad in (
                (lnlstm_step, {name: t.clone().requires_grad_() for name, t in given.items()}),
                (
                    lambda **k: formula(**k, eps=1e-5, carried=False),
                    {name: t.clone().requires_grad_() for name, t in given.items()},
                ),
            )
        )
        torch.testing.assert_close(ours, theirs)


def test_double_backward() -> None:
    """gradcheck and gradgradcheck pass in float64; in float32 the gradient of a gradient is the
    formula's.
    """
    small = {
        name: t.double().requires_grad_() for name, t in make_arguments((2,), hidden=3).items()
    }
    assert torch.autograd.gradcheck(lnlstm_step, tuple(small[name] for name in NAMES))
    assert torch.autograd.gradgradcheck(
        lnlstm_step, tuple(small[name] for name in NAMES), atol=1e-4
    )
    results = []
    for function in (lnlstm_step, lambda **k: formula(**k, eps=1e-5, carried=False)):
        given = {name: t.clone().requires_grad_() for name, t in make_arguments().items()}
        (first,) = torch.autograd.grad(
            function(**given)[0].square().sum(), given["gates_h"], create_graph=True
        )
        results.append(
            torch.autograd.grad(first.square().sum(), [given["gates_h"], given["weight_c"]])
        )
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_double_backward_over_steps() -> None:
    """Where the arguments of a step are made from one another, or are one tensor twice, a gradient
    that is recorded is still the formula's, and so is its own gradient: each way from a gain to the
    result counts once.
    """
    results = []
    for function in (lnlstm_step, lambda *given: formula(*given, 1e-5, False)):
        given = {
            name: t.clone().requires_grad_() for name, t in make_arguments((2,), hidden=8).items()
        }
        gates, rest, c = given["gates_x"], [given[name] for name in NAMES[3:]], given["c"]
        rest[1] = rest[0]  # one gain for both norms
        for _ in range(3):
            h, c = function(gates, gates, c, *rest)
            gates = gates + h.repeat(1, 4)
        wanted = [given["gates_x"], given["c"], *rest]
        first = torch.autograd.grad(h.sin().sum(), wanted, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), wanted)])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_eager_serves_gradients_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where eager mode serves the backward's case, PyTorch's operators stand in for its kernel,
    with the same arguments.
    """
    given, kernel_for = make_arguments(), dispatch.kernel_for
    whole = gradients(lnlstm_step, given)
    monkeypatch.setattr(
        dispatch,
        "kernel_for",
        lambda case, *rest: None if case.op == "lnlstm_step_backward" else kernel_for(case, *rest),
    )
    for name, grad in gradients(lnlstm_step, given).items():
        torch.testing.assert_close(grad, whole[name])


def test_mixed_dtypes() -> None:
    """Arguments of several dtypes, as autocast makes them, are taken in the widest, and the result
    is in it.
    """
    given = make_arguments()
    given["gates_x"], given["gates_h"] = given["gates_x"].bfloat16(), given["gates_h"].bfloat16()
    h, c = lnlstm_step(**given)
    wide = formula(**{name: t.float() for name, t in given.items()}, eps=1e-5, carried=False)
    assert h.dtype == c.dtype == torch.float32
    torch.testing.assert_close((h, c), wide)


def test_direct_after_the_first() -> None:
    """A call like one before needs no more Python than the look-up, and a reload forgets."""
    lntune.reload()
    given = make_arguments()
    values = tuple(given[name] for name in NAMES)
    assert not module._direct[False].ready
    check(given)
    with torch.inference_mode():
        assert module._direct[False].call(*values, 1e-5) is not None
        assert module._direct[True].call(*values, 1e-5) is None
    lntune.reload()
    assert module._direct[False].call(*values, 1e-5) is None


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "gates_x too narrow": ("gates_x", {"gates_x": torch.zeros(6, 4 * HIDDEN - 1)}),
    "gates_h of another batch": ("gates_h", {"gates_h": torch.zeros(5, 4 * HIDDEN)}),
    "weight_h of the cell": ("weight_h", {"weight_h": torch.zeros(HIDDEN)}),
    "weight_c missing": ("weight_c", {"weight_c": None}),
    "bias of integers": ("bias", {"bias": torch.zeros(4 * HIDDEN, dtype=torch.int32)}),
    "bias_c a number": ("bias_c", {"bias_c": 0.5}),
    "c without elements": ("c", {"c": torch.zeros(6, 0)}),
    "eps a word": ("eps", {"eps": "small"}),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments(what: str) -> None:
    """Each wrong argument is an error that begins with its name, before and after a good call."""
    argument, change = BAD[what]
    for _ in range(2):
        with pytest.raises(lntune.LntuneError, match=f"^{argument}: got"):
            lnlstm_step(**{**make_arguments(), **change})
        check(make_arguments())


@pytest.mark.parametrize(
    "eps", [-0.01, -9.0, float("nan"), float("inf"), torch.tensor(0.5)], ids=repr
)
def test_any_eps_is_pytorchs(eps: Any) -> None:
    """An eps that PyTorch's layer norm takes gives the formula's result and gradients, NaN where a
    variance and eps are below zero.
    """
    check(make_arguments())
    for _ in range(2):
        results = []
        for f in (lnlstm_step, formula):
            given = {
                name: t.clone().requires_grad_()
                for name, t in make_arguments().items()
                if isinstance(t, Tensor)
            }
            values = [given.get(name) for name in NAMES]
            with torch.no_grad():
                plain = f(*values, eps, False)
            h, c = f(*values, eps, False)
            results.append(
                [
                    *plain,
                    h.detach(),
                    c.detach(),
                    *torch.autograd.grad((h + c).sum(), list(given.values())),
                ]
            )
        torch.testing.assert_close(*results, equal_nan=True, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("module", "rows"), [exhaustive((lntune.LayerNormLSTMCell, 5)), (lntune.LayerNormLSTM, 1)]
)
def test_a_module_with_a_negative_eps(module: Any, rows: int) -> None:
    """A module takes one too, and computes the same compiled."""
    lstm, x, state = (
        module(3, 8, eps=-1e-9),
        torch.randn(5, 3),
        (torch.randn(rows, 8), torch.randn(rows, 8)),
    )
    usual = module(3, 8, eps=1e-9)
    usual.load_state_dict(lstm.state_dict())
    compiled = torch.compile(lstm, backend="aot_eager", fullgraph=True)
    for f in (usual, compiled):
        torch.testing.assert_close(lstm(x, state)[0], f(x, state)[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_compiled(grad: bool) -> None:
    """torch.compile takes a loop over steps in one graph, and gives what eager gives, gradients
    too.
    """

    def three(given: dict[str, Any]) -> Tensor:
        h = given["c"]
        for _ in range(3):
            h, c = lnlstm_step(**given)
            given = {**given, "c": c}
        return h

    compiled = torch.compile(three, fullgraph=True, backend="aot_eager")
    given = {name: t.requires_grad_(grad) for name, t in make_arguments().items()}
    with torch.set_grad_enabled(grad):
        ours, theirs = compiled(given), three(given)
    torch.testing.assert_close(ours, theirs)
    if grad:
        mine, other = (
            torch.autograd.grad(y.sum(), [given[name] for name in NAMES]) for y in (ours, theirs)
        )
        torch.testing.assert_close(mine, other)


def test_the_custom_op() -> None:
    """What torch.compile puts into a graph passes PyTorch's own checks of custom operators."""
    given = make_arguments()
    values = tuple(given[name] for name in NAMES)
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.lntune.lnlstm_step,
            (*values, 1e-5, False, False),
            test_utils=("test_schema", "test_faketensor"),
        )
    recorded = tuple(t.requires_grad_() for t in values)
    torch.library.opcheck(torch.ops.lntune.lnlstm_step, (*recorded, 1e-5, False, True))


def test_why_and_limits() -> None:
    """The choice for a case is explained; gates longer than any row of a kernel are PyTorch's."""
    choice = lntune.explain("lnlstm_step", 400, "float16", 32)
    assert choice.tier == "default" and choice.schedule == "fused_step"
    given = make_arguments((1,), hidden=16_400)
    check(given, calls=1)
