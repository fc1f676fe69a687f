"""Whether kernels can take a call, and that the reason reaches who asks: in the log and from
`lntune.explain`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lntune
from lntune.case import MAX_HIDDEN, Case
from lntune.ops.lnlstm_step import TENSORS
from lntune.torch import dispatch
from lntune.torch.lnlstm import lnlstm_step, lnlstm_step_op
from lntune.torch.lnlstm_arguments import SequenceOptions, SequenceTensors, StepTensors
from lntune.torch.lnlstm_sequence import lnlstm_sequence, lnlstm_sequence_op
from lntune.torch.lnlstm_steps import by_steps
from lntune.torch.support import YES, Support, kernel_support, size_support

HIDDEN = 8


@pytest.fixture(autouse=True)
def debug(caplog: pytest.LogCaptureFixture) -> None:
    """Everything is logged, as if for the first time."""
    caplog.set_level(logging.DEBUG, "lntune")
    lntune.reload()


def reasons(caplog: pytest.LogCaptureFixture, name: str) -> list[str]:
    """Why calls of `lntune.<name>` in this file were PyTorch's."""
    begin = f"PyTorch serves lntune.{name} at {__file__}:"
    texts = [r.getMessage() for r in caplog.records if r.levelno == logging.DEBUG]
    return [t.removeprefix(begin).partition(": ")[2] for t in texts if t.startswith(begin)]


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Subclass(torch.Tensor):
    pass


def norm(x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """The call all cases make."""
    return lntune.layer_norm(x, (x.shape[-1],), None, None, eps)


def watched(mode: Any) -> torch.Tensor:
    """The call under a mode."""
    with mode:
        return norm(torch.ones(2, HIDDEN))


def dual() -> torch.Tensor:
    """The call with a forward-mode derivative."""
    with torch.autograd.forward_ad.dual_level():
        return norm(torch.autograd.forward_ad.make_dual(torch.ones(2, HIDDEN), torch.ones(2, 8)))


CALLS: dict[str, Callable[[], Any]] = {
    "float64 is not built": lambda: norm(torch.ones(2, HIDDEN, dtype=torch.float64)),
    f"hidden {MAX_HIDDEN + 1}, above {MAX_HIDDEN}, is not built": lambda: norm(
        torch.ones(1, MAX_HIDDEN + 1)
    ),
    "kernels do not run on meta": lambda: norm(torch.ones(2, HIDDEN, device="meta")),
    "eps -1.0 is not a finite number, 0 or more": lambda: norm(torch.ones(2, HIDDEN), -1.0),
    "it has no rows": lambda: norm(torch.ones(0, HIDDEN)),
    "an argument has a __torch_function__ of its own": lambda: norm(
        torch.ones(2, HIDDEN).as_subclass(_Subclass)
    ),
    "the call is transformed by torch.func or a tensor is a batch of vmap": lambda: torch.func.vmap(
        norm
    )(torch.ones(3, 2, HIDDEN)),
    "a dispatch mode watches the call": lambda: watched(_Mode()),
    "a TorchFunctionMode watches the call": lambda: watched(_FunctionMode()),
    "forward-mode derivatives flow through a tensor": dual,
}


@pytest.mark.parametrize("reason", CALLS)
def test_the_reason_is_logged(reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """A call that no kernel can take is PyTorch's, and the log says at which line and why."""
    CALLS[reason]()
    assert reasons(caplog, "layer_norm") == [reason]


def test_a_reason_is_logged_once_for_each_line(caplog: pytest.LogCaptureFixture) -> None:
    """A loop says it once, another line again, and so does the same after a reload."""
    x = torch.ones(2, HIDDEN, dtype=torch.float64)
    for _ in range(3):
        for _ in range(3):
            lntune.layer_norm(x, (HIDDEN,))
        lntune.layer_norm(x, (HIDDEN,))
    assert reasons(caplog, "layer_norm") == ["float64 is not built"] * 2
    lntune.reload()
    lntune.layer_norm(x, (HIDDEN,))
    assert len(reasons(caplog, "layer_norm")) == 3


def test_nothing_is_noted_without_the_level(caplog: pytest.LogCaptureFixture) -> None:
    """Where DEBUG is off nothing is said, and nothing is taken for said when it is on."""
    x = torch.ones(2, HIDDEN, dtype=torch.float64)
    for level in (logging.INFO, logging.DEBUG):
        caplog.set_level(level, "lntune")
        lntune.layer_norm(x, (HIDDEN,))
    assert len(reasons(caplog, "layer_norm")) == 1


def test_other_functions(caplog: pytest.LogCaptureFixture) -> None:
    """The norm with statistics, its backward, the LSTM's step and the layers say theirs."""
    x = torch.ones(2, HIDDEN, dtype=torch.float64)
    y, mean, rstd = lntune.layer_norm_forward(x, (HIDDEN,))
    assert reasons(caplog, "layer_norm_forward") == ["float64 is not built"]
    with torch.no_grad():
        lntune.layer_norm_backward(y, x, (HIDDEN,), mean, rstd)
    assert reasons(caplog, "layer_norm_backward") == ["float64 is not built"]
    with torch.enable_grad():
        lntune.layer_norm_backward(y, x, (HIDDEN,), mean, rstd)
    assert reasons(caplog, "layer_norm_backward")[1:] == ["its own gradients are recorded"]

    gates, c, gain = torch.ones(2, 4 * HIDDEN), torch.ones(2, HIDDEN), torch.ones(4 * HIDDEN)
    lnlstm_step(gates, gates, c, None, gain, c[0], per_gate=True)
    lnlstm_step(*(t.double() for t in (gates, gates, c, gain, gain, c[0])))
    assert reasons(caplog, "lnlstm_step") == [
        "per_gate is served by PyTorch's operators",
        "float64 is not built",
    ]
    lntune.LayerNormLSTM(3, HIDDEN, dtype=torch.float64)(x[:, None, :3])
    (reason,) = reasons(caplog, "LayerNormLSTM")
    assert reason.startswith("its dtype is none of float32")


def test_strict_mode_leaves_what_no_kernel_takes(caplog: pytest.LogCaptureFixture) -> None:
    """In strict mode a call that no measurement could serve is PyTorch's as before, and logged."""
    x = torch.randn(2, HIDDEN, dtype=torch.float64)
    with lntune.strict():
        y = lntune.layer_norm(x, (HIDDEN,))
    assert torch.equal(y, functional.layer_norm(x, (HIDDEN,)))
    assert reasons(caplog, "layer_norm") == ["float64 is not built"]


def test_a_decision_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """What serves a case is logged with all that was looked at, once."""
    case = Case("layer_norm", 1003, "float32", 5)
    choice = dispatch.choose(case)
    assert dispatch.choose(case) is choice
    texts = [t for r in caplog.records if "hidden 1003" in (t := r.getMessage())]
    assert len(texts) == 1 and texts[0].endswith("; ".join(choice.steps))


@pytest.mark.parametrize(
    ("dtype", "hidden", "expected"),
    [
        ("float64", 64, "float64 is not built"),
        ("float32", MAX_HIDDEN + 1, f"hidden {MAX_HIDDEN + 1}, above {MAX_HIDDEN}, is not built"),
    ],
)
def test_explain_gives_the_same_reason(dtype: str, hidden: int, expected: str) -> None:
    """`lntune.explain` says of a size that is not built what a call of it logs."""
    assert size_support(getattr(torch, dtype), hidden).reason == expected
    explanation = lntune.explain("layer_norm", hidden, dtype)
    assert explanation.tier == "eager"
    assert explanation.steps == (f"eager: {expected}; PyTorch serves it",)


def test_support_is_true_or_says_why() -> None:
    """It is true without a reason, and false with one."""
    assert YES and not YES.reason
    no = Support.no("because")
    assert not no and no.reason == "because"
    x = torch.ones(2, HIDDEN)
    assert kernel_support((x, x[0], x[1]), HIDDEN)
    assert not kernel_support((x, x[0].double()), HIDDEN)
    assert not kernel_support((x.to_sparse(),), HIDDEN)
    assert "several devices" in kernel_support((x, x[0].to("meta")), HIDDEN).reason


def test_symbols_for_sizes() -> None:
    """A tensor whose sizes are symbols is refused for its class, whatever its dtype."""
    asked = []

    def function(x: torch.Tensor) -> torch.Tensor:
        asked.append(kernel_support((x,), x.shape[-1], watched=True))
        return x * 2

    for dtype in (torch.float64, torch.float32):
        make_fx(function, tracing_mode="symbolic")(torch.randn(3, HIDDEN, dtype=dtype))
    assert len(asked) == 2
    assert all("of the class FakeTensor" in support.reason for support in asked)


def names_of(function: Callable[..., Any]) -> list[str]:
    """The names of a function's parameters, in the words of the named tuples."""
    return [
        "normalized_cell" if name == "carried" else name
        for name in inspect.signature(function).parameters
    ]


def test_named_tuples_have_the_order_of_flat_lists() -> None:
    """`*tensors` and `*options` are what functions, operators and kernels take one by one."""
    step, sequence = [*StepTensors._fields], [*SequenceTensors._fields]
    options = [*SequenceOptions._fields]
    assert step == [*TENSORS]
    assert names_of(lnlstm_step) == [*step, "eps", "normalized_cell", "per_gate"]
    assert names_of(by_steps) == names_of(lnlstm_sequence) == [*sequence, "sizes", *options]
    for op, fields in ((lnlstm_step_op, step), (lnlstm_sequence_op, sequence)):
        arguments = [a.name for a in op._opoverload._schema.arguments]
        assert arguments[: len(fields)] == fields
