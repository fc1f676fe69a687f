"""Deliberately wrong kernels, each wrong in a way that a check of two row counts on one kind of
memory lets through: none is accepted as what serves calls.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grids import exhaustive, thinned
from torch.overrides import TorchFunctionMode

from lntune import backends, check, ops
from lntune import device as device_module
from lntune.case import Case
from lntune.check import Verdict, problems, surroundings
from lntune.ops import saturation

DEVICE = device_module.current()
Named = dict[str, Any]
Harm = Callable[[Named], None]
"""Done to the arguments, by name, of a kernel that has been right."""
CASES = {
    "layer_norm": Case("layer_norm", 96, "float32", 2000, "weight+bias+stats"),
    "layer_norm_backward": Case(
        "layer_norm_backward", 96, "float32", 2000, "weight+dx+dgamma+dbeta"
    ),
    "lnlstm_step": Case("lnlstm_step", 32, "float32", 300, "raw+bias+bias_c+stats"),
    "lnlstm_step_backward": Case("lnlstm_step_backward", 32, "float32", 300, "raw+bias+bias_c"),
}
MAIN = {"layer_norm": "y", "layer_norm_backward": "dx", "lnlstm_step": "h"}
"""An output of rows; of the backward of the step it is the first."""


def right(op: str, named: Named, case: Case | None = None) -> None:
    """An operator's float64 reference, rounded once, in the place of a kernel."""
    case = case or CASES[op]
    given = {n: v for n, v in named.items()}
    with torch.inference_mode(False):
        plain = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in given.items()}
        made = ops.get(op).reference(case, plain)
    for arg in ops.get(op).arguments(case):
        if arg.role == "out":
            named[arg.name].copy_(made[arg.name].reshape(named[arg.name].shape))
        elif arg.role == "sum":
            named[arg.name][0].add_(made[arg.name].reshape(named[arg.name][0].shape))


def kernel_of(
    op: str, harm: Harm, before: Harm = lambda _: None, case: Case | None = None
) -> Callable[..., None]:
    """A right kernel that does harm, when it is done or before it begins."""
    names = [a.name for a in ops.get(op).arguments(case or CASES[op])]

    def kernel(*values: Any) -> None:
        named = dict(zip(names, values, strict=True))
        before(named)
        right(op, named, case)
        harm(named)

    return kernel


def judged(op: str, kernel: Callable[..., None]) -> Verdict:
    """What the check of what is to serve calls says."""
    return backends.of(DEVICE).verify(CASES[op], DEVICE, kernel, thoroughly=True)


def main_of(op: str) -> str:
    """The name of an output of rows."""
    arguments = ops.get(op).arguments(CASES[op])
    return MAIN.get(op) or next(a.name for a in arguments if a.role == "out")


def inputs_of(op: str) -> list[str]:
    """The names of the tensors that are read."""
    return [a.name for a in ops.get(op).arguments(CASES[op]) if a.role == "in"]


def around(tensor: Any, elements: int) -> Any:
    """A flat view of a tensor and of as many elements before and behind it."""
    start = tensor.storage_offset() - elements
    return tensor.as_strided((tensor.numel() + 2 * elements,), (1,), start)


# --- rows


def from_row(first: int) -> Callable[[Any], None]:
    """Nothing right from a row on."""

    def harm(out: Any) -> None:
        out[first:] = 0

    return harm


def where(rows: Callable[[int], bool], wrong: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrong for some numbers of rows."""

    def harm(out: Any) -> None:
        if rows(out.shape[0]):
            wrong(out)

    return harm


def last_row(out: Any) -> None:
    """The last row is left out."""
    out[-1] = 0


def index_of_a_byte(out: Any) -> None:
    """Rows are counted in eight bits."""
    out[256:] = out[: max(0, out.shape[0] - 256)].clone() * 1.5


ROWS: dict[str, Callable[[Any], None]] = {
    "wrong from row 21 on": from_row(21),
    "wrong from row 64 on": from_row(64),
    "wrong from row 1000 on": from_row(1000),
    "rows counted in a byte": index_of_a_byte,
    "the last of 4 n + 3 rows left out": where(lambda n: n % 4 == 3, last_row),
    "the last of 4 n + 2 rows left out": where(lambda n: n % 4 == 2, last_row),
    "the last of an even number of rows left out": where(lambda n: n % 2 == 0, last_row),
    "the last of three rows left out": where(lambda n: n == 3, last_row),
    "a second row like the first": where(lambda n: n > 1, lambda out: out[1].copy_(out[0])),
}


@pytest.mark.parametrize("how", ROWS)
@pytest.mark.parametrize("op", CASES)
def test_rows_that_are_wrong(op: str, how: str) -> None:
    """What is wrong for some rows, or numbers of rows, is rejected; for every operator."""
    if "1000" in how and CASES[op].rows < 1000:
        pytest.skip("the case has fewer rows")
    name = main_of(op)
    verdict = judged(op, kernel_of(op, lambda named: ROWS[how](named[name])))
    assert not verdict.ok
    assert name in verdict.message


@pytest.mark.parametrize("rows", [*range(2, 17), 260])
def test_a_number_of_rows(rows: int) -> None:
    """A kernel whose last row is wrong for one remainder of sixteen is rejected."""

    def harm(named: Named) -> None:
        if named["y"].shape[0] % 16 == rows % 16:
            named["y"][-1] = 0

    assert not judged("layer_norm", kernel_of("layer_norm", harm)).ok


@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("op", CASES)
def test_what_is_left_over_by_wide_blocks(op: str, block: int) -> None:
    """A kernel that leaves out the last row where its blocks lack one is rejected, of outputs with
    rows; the same of sums over rows.
    """
    name = main_of(op)

    def harm(named: Named) -> None:
        if named[name].shape[0] % block == block - 1:
            last_row(named[name])

    assert name in judged(op, kernel_of(op, harm)).message


@pytest.mark.parametrize("left", [1, 17, 31])
def test_rows_that_are_not_summed(left: int) -> None:
    """A sum over rows that lacks the last row where blocks of 32 have some left is rejected."""

    def harm(named: Named) -> None:
        if named["x"].shape[0] % 32 == left:
            named["dbeta"] -= named["dy"][-1]

    assert "dbeta" in judged("layer_norm_backward", kernel_of("layer_norm_backward", harm)).message


def of_many(harm: Harm) -> Harm:
    """Done where there are many rows."""

    def harm_of_many(named: Named) -> None:
        if named["x"].shape[0] > 100:
            harm(named)

    return harm_of_many


def one_pass(named: Named) -> None:
    """The variance as the mean square without the square of the mean."""
    x = named["x"]
    mean = x.mean(1, keepdim=True)
    variance = (x * x).mean(1, keepdim=True) - mean * mean
    xhat = (x - mean) * torch.rsqrt(variance.clamp(min=0) + named["eps"])
    named["y"].copy_(xhat * named["weight"] + named["bias"])


@pytest.mark.parametrize("how", ["one pass", "another eps", "NaN taken for 0"])
def test_many_rows_by_another_way(how: str) -> None:
    """Code of its own for many rows is held to what that for few rows is."""
    before: Harm = {
        "one pass": lambda _: None,
        "another eps": with_eps(1e-5),
        "NaN taken for 0": without(math.nan, 0.0),
    }[how]
    harm: Harm = one_pass if how == "one pass" else lambda _: None
    kernel = kernel_of("layer_norm", of_many(harm), of_many(before))
    assert not judged("layer_norm", kernel).ok


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("first", [21, 1000])
def test_inputs_changed_far_down(op: str, first: int) -> None:
    """An input that is changed from a row on is seen."""
    if CASES[op].rows < first:
        pytest.skip("the case has fewer rows")

    def harm(named: Named) -> None:
        named[inputs_of(op)[0]][first:] += 1

    assert "changed its input" in judged(op, kernel_of(op, harm)).message


# --- memory


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize(
    "name",
    [
        "aligned output",
        "misaligned output",
        "aligned input",
        "output aligned to 16",
        "input aligned to 16",
    ],
)
def test_alignment(op: str, name: str) -> None:
    """A kernel that is wrong only when an output, or an input, is aligned to 64 bytes, or to 16 and
    no more, or only when it is not.
    """
    seen = inputs_of(op)[0] if "input" in name else main_of(op)

    def harm(named: Named) -> None:
        if "16" in name:
            wrong = named[seen].data_ptr() % 64 == 16
        else:
            wrong = (named[seen].data_ptr() % 64 == 0) == ("misaligned" not in name)
        if wrong:
            named[main_of(op)] *= 1.5

    assert not judged(op, kernel_of(op, harm)).ok


def moved() -> list[Any]:
    """(operator, tensor, bytes off): in every run each offset and each tensor of some operator."""
    every = [
        (op, arg.name, off)
        for op in CASES
        for arg in ops.get(op).arguments(CASES[op])
        if arg.role != "scalar"
        for off in (4, 8, 16, 32, 48)
    ]
    return thinned(every, 9)


@pytest.mark.parametrize(("op", "name", "off"), moved())
def test_each_tensor_off_a_boundary(op: str, name: str, off: int) -> None:
    """A kernel that is wrong only where one of its tensors, whichever, is so many bytes off a
    boundary while others are aligned is rejected.
    """
    names = [a.name for a in ops.get(op).arguments(CASES[op]) if a.role != "scalar"]

    def harm(named: Named) -> None:
        places = {n: named[n].data_ptr() % 64 for n in names}
        if places.pop(name) == off and not any(places.values()):
            named[main_of(op)] *= 1.5

    assert not judged(op, kernel_of(op, harm)).ok


@pytest.mark.parametrize("name", ["x", "y", "bias"])
def test_the_only_aligned_tensor(name: str) -> None:
    """A kernel that is wrong only where a single tensor is aligned is rejected."""
    names = [a.name for a in ops.get("layer_norm").arguments(CASES["layer_norm"])]

    def harm(named: Named) -> None:
        aligned = [n for n in names if n != "eps" and named[n].data_ptr() % 64 == 0]
        if aligned == [name]:
            named["y"] *= 1.5

    assert not judged("layer_norm", kernel_of("layer_norm", harm)).ok


def places() -> list[Any]:
    """(operator, side, distance): in every run one distance of each side of each operator."""
    sides = [(op, side) for op in CASES for side in ("before", "behind")]
    return [
        (*one, distance) if at == number % 3 else exhaustive((*one, distance))
        for number, one in enumerate(sides)
        for at, distance in enumerate((1, 70, 900))
    ]


@pytest.mark.parametrize(("op", "side", "distance"), places())
def test_writes_outside(op: str, side: str, distance: int) -> None:
    """A write before or behind any tensor, near or far, is seen; inputs' surroundings too."""
    for arg in ops.get(op).arguments(CASES[op]):
        if arg.role == "scalar":
            continue

        def harm(named: Named, name: str = arg.name) -> None:
            wide = around(named[name], distance)
            wide[0 if side == "before" else -1] = 3.0

        assert f"wrote outside {arg.name}" in judged(op, kernel_of(op, harm)).message


@pytest.mark.parametrize("distance", [1, 70])
@pytest.mark.parametrize("side", [0, -1])
def test_reads_outside(side: int, distance: int) -> None:
    """A value read outside an input is seen, also when it only counts if it is the largest: there a
    NaN is lost, and a large number is not.
    """
    for name in inputs_of("layer_norm"):

        def harm(named: Named, name: str = name) -> None:
            stray = around(named[name], distance)[side].float()
            named["y"][:1] += torch.fmax(stray, torch.tensor(0.0)) * 1e-3

        assert not judged("layer_norm", kernel_of("layer_norm", harm)).ok


# --- values


def with_eps(eps: float) -> Harm:
    """Another eps than the one given."""

    def before(named: Named) -> None:
        named["eps"] = eps

    return before


def clamped(limit: float) -> Harm:
    """Weights beyond a limit are cut off."""

    def before(named: Named) -> None:
        named["weight"] = named["weight"].clamp(-limit, limit)

    return before


def without(element: float, instead: float) -> Harm:
    """What is not finite in x is taken for a number."""

    def before(named: Named) -> None:
        x = named["x"]
        same = x.isnan() if math.isnan(element) else x == element
        named["x"] = torch.where(same, torch.tensor(instead), x)

    return before


def last_column(named: Named) -> None:
    """An infinity in the last column is taken for 0."""
    named["x"] = named["x"].clone()
    named["x"][:, -1] = named["x"][:, -1].nan_to_num(0.0, 0.0, 0.0)


def denormals(named: Named) -> None:
    """Numbers below the normal ones are 0."""
    for name in ("x", "weight"):
        tiny = named[name].abs() < 1e-35
        named[name] = torch.where(tiny, torch.tensor(0.0), named[name])


VALUES: dict[str, Harm] = {
    "eps of 1e-5, whatever is given": with_eps(1e-5),
    "eps of 1e-6, whatever is given": with_eps(1e-6),
    "eps of 0": with_eps(0.0),
    "weights beyond 4 cut off": clamped(4.0),
    "infinity taken for the largest number": without(math.inf, 3e38),
    "minus infinity taken for 0": without(-math.inf, 0.0),
    "NaN taken for 0": without(math.nan, 0.0),
    "infinity in the last column taken for 0": last_column,
    "tiny numbers taken for 0": denormals,
}


@pytest.mark.parametrize("how", VALUES)
def test_values_that_are_not_taken_as_they_are(how: str) -> None:
    """Inputs that are replaced before they are used are seen."""
    assert not judged("layer_norm", kernel_of("layer_norm", lambda _: None, VALUES[how])).ok


def taken(name: str, change: Callable[[Any], Any]) -> Harm:
    """An input is changed before it is used."""

    def before(named: Named) -> None:
        named[name] = change(named[name].clone())

    return before


def without_nan(values: Any) -> Any:
    """NaN is 0."""
    return values.nan_to_num(0.0, math.inf, -math.inf)


def without_infinity(values: Any) -> Any:
    """Infinities are the largest numbers."""
    return values.nan_to_num(math.nan)


def without_last_nan(values: Any) -> Any:
    """NaN in the last column is 0."""
    values[..., -1] = without_nan(values[..., -1])
    return values


def cut_at(limit: float) -> Callable[[Any], Any]:
    """Beyond a limit there is nothing."""
    return lambda values: values.clamp(-limit, limit)


def without_denormals(values: Any) -> Any:
    """Denormal numbers are 0."""
    return values.where(~(values.abs() < torch.finfo(values.dtype).tiny), 0.0)


TAKEN: dict[str, Callable[[Any], Any]] = {
    "NaN": without_nan,
    "last NaN": without_last_nan,
    "infinity": without_infinity,
    "9": cut_at(9.0),
    "1000": cut_at(1000.0),
}


def takings() -> list[Any]:
    """(operator, input, how): in every run each way of taking each operator's inputs, and every
    input once.
    """
    every = [
        (op, arg.name, how)
        for op in CASES
        for arg in ops.get(op).arguments(CASES[op])
        if arg.role == "in"
        for how in TAKEN
        if not (how == "1000" and (op.startswith("lnlstm") or arg.name == "x"))
        and not (how == "last NaN" and arg.shape == ("rows",))
        # a sigmoid, or tanh, is the same of both
        and not (how == "infinity" and op.startswith("lnlstm") and len(arg.shape) == 1)
    ]
    return thinned(every, 4)


@pytest.mark.parametrize(("op", "name", "how"), takings())
def test_each_input_is_taken_as_it_is(op: str, name: str, how: str) -> None:
    """A NaN, an infinity or a large number in any input alone, of any operator, that is taken for
    another is seen.
    """
    verdict = judged(op, kernel_of(op, lambda _: None, taken(name, TAKEN[how])))
    assert not verdict.ok


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in CASES for name in ops.get(op).linear]
)
def test_denormals_are_not_flushed(op: str, name: str) -> None:
    """Denormal numbers in an input that outputs shrink with are not taken for 0."""
    kernel = kernel_of(op, lambda _: None, taken(name, without_denormals))
    assert f"tiny {name}" in judged(op, kernel).message


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", ["gates_x", "c"])
def test_large_inputs_of_a_step_without_its_own_norm(name: str, dtype: str) -> None:
    """gates_x that come normalized, and the cell, are taken as they are, however large."""
    case = Case("lnlstm_step", 32, dtype, 64, "bias+bias_c")
    for how in ("NaN", "infinity", "9"):
        if name == "gates_x" and (how == "infinity" or (how == "9" and dtype != "float32")):
            continue  # the sigmoid is the same within what is allowed
        kernel = kernel_of(case.op, lambda _: None, taken(name, TAKEN[how]), case)
        assert not backends.of(DEVICE).verify(case, DEVICE, kernel, thoroughly=True).ok


def test_infinity_in_place_of_nan() -> None:
    """A NaN that comes out as an infinity is seen."""

    def harm(named: Named) -> None:
        named["y"].copy_(torch.where(named["y"].isnan(), torch.tensor(math.inf), named["y"]))

    assert "another kind" in judged("layer_norm", kernel_of("layer_norm", harm)).message


# --- gates that are as good as fully open or shut


class Otherwise(TorchFunctionMode):
    """In the block the reference computes a saturated activation, or its derivative, otherwise:
    `change(name, number, given, result)` of its functions, the number counting calls of each.
    """

    def __init__(self, change: Callable[[str, int, Any, Any], Any]) -> None:
        super().__init__()
        self._change, self._calls = change, Counter[str]()

    def __torch_function__(self, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        self._calls[operation.__name__] += 1
        return self._change(operation.__name__, self._calls[operation.__name__], args[0], out)


def shut_below(limit: float) -> Any:
    """A sigmoid is 0 below a limit."""
    return lambda name, _, z, out: out.where(z >= limit, 0.0) if name == "sigmoid" else out


def turned(name: str, _: int, __: Any, out: Any) -> Any:
    """tanh is 1, or -1, where less than a millionth is missing."""
    return out.sign().where(1 - out.abs() < 1e-6, out) if name == "tanh" else out


def nothing_left(which: int, limit: float) -> Any:
    """The reference's `which`-th `1 - ...` is 0 below a limit."""
    return lambda name, number, _, out: (
        out.where(out >= limit, 0.0) if (name, number) == ("__rsub__", which) else out
    )


SATURATED: dict[str, Any] = {
    "a gate shut below -12": shut_below(-12),
    "a gate shut below -15": shut_below(-15),
    "a gate shut below -30": shut_below(-30),
    "tanh of 1": turned,
    "1 - tanh(c)^2 of 0": nothing_left(1, 2e-6),
    "1 - i of 0": nothing_left(2, 1e-5),
    "1 - f of 0": nothing_left(3, 1e-5),
    "1 - g^2 of 0": nothing_left(4, 2e-6),
    "1 - o of 0": nothing_left(5, 1e-5),
}
UNSEEN = {("float16", "a gate shut below -15"), ("float16", "a gate shut below -30")}
"""A forward's outputs that are below what its dtype has."""


def saturated(case: Case, change: Any) -> Callable[..., None]:
    """A kernel that is right but where its gates are saturated."""
    correct = kernel_of(case.op, lambda _: None, case=case)

    def kernel(*values: Any) -> None:
        with Otherwise(change):
            correct(*values)

    return kernel


@pytest.mark.parametrize("variant", ["bias+bias_c", "raw+bias+bias_c", "raw+carried", "plain"])
@pytest.mark.parametrize("op", ["lnlstm_step", "lnlstm_step_backward"])
def test_what_is_left_of_saturated_gates(op: str, variant: str) -> None:
    """Of a gate that is all but shut or open, and of its derivative, what is left is held to its
    own size: a kernel that has nothing there is rejected, in every dtype, with gains and biases or
    without.
    """
    for dtype in ("float32", "bfloat16", "float16"):
        case = Case(op, 32, dtype, 64, variant)
        problem = problems.of_style(case, "saturated", saturation.ROWS)
        for how, change in SATURATED.items():
            if op == "lnlstm_step" and ("of" in how or (dtype, how) in UNSEEN):
                continue  # no derivatives, and 1 for its tanh is right to 16 roundings
            kernel = saturated(case, change)
            checked = check._Checked(ops.get(op), case, kernel, check.FENCE, "cpu", DEVICE)
            message, _, _ = check._judge(checked, problem, 0)
            assert "saturated inputs" in message, f"{case}, {how}"


@pytest.mark.parametrize("op", ["lnlstm_step", "lnlstm_step_backward"])
def test_every_check_has_saturated_gates(op: str) -> None:
    """A trial's check has such inputs, and so has the one before a first call."""
    kernel = saturated(CASES[op], SATURATED["a gate shut below -15"])
    backend = backends.of(DEVICE)
    assert "saturated" in backend.verify(CASES[op], DEVICE, kernel).message
    assert "saturated" in backend.verify_shortly(CASES[op], DEVICE, kernel).message


# --- state


def adding() -> Callable[..., None]:
    """A kernel that adds to what its output holds, unless that is no number."""
    names = [a.name for a in ops.get("layer_norm").arguments(CASES["layer_norm"])]

    def kernel(*values: Any) -> None:
        named = dict(zip(names, values, strict=True))
        held = named["y"].nan_to_num(0.0).clone()
        right("layer_norm", named)
        named["y"] += held

    return kernel


def now_and_then(calls: int) -> Harm:
    """Wrong once in so many calls."""
    count = [0]

    def harm(named: Named) -> None:
        count[0] += 1
        if count[0] % calls == 0:
            named["y"][0, 0] += 1

    return harm


def flush(_: Named) -> None:
    """The processor is left flushing denormal numbers to zero."""
    torch.set_flush_denormal(True)


def leak(megabytes: float) -> Harm:
    """Memory is kept at every call."""
    kept: list[Any] = []

    def harm(_: Named) -> None:
        kept.append(torch.ones(int(megabytes * 2**18)))

    return harm


def fork(_: Named) -> None:
    """A child is left behind."""
    if (child := os.fork()) == 0:
        time.sleep(20)
        os._exit(0)
    CHILDREN.append(child)


CHILDREN: list[int] = []


def start_thread(_: Named) -> None:
    """A thread is started at every call."""
    threading.Thread(target=STOP.wait, daemon=True).start()


STOP = threading.Event()


def start_timer(_: Named) -> None:
    """A timer is left running."""
    signal.setitimer(signal.ITIMER_VIRTUAL, 1000)


def on_one_thread(named: Named) -> None:
    """Wrong where there is one thread alone."""
    if torch.get_num_threads() == 1:
        named["y"] *= 1.5


def race(named: Named) -> None:
    """A mean that threads share: now and then a row has that of another."""
    if time.perf_counter_ns() // 1000 % 3 == 0:
        named["y"][0] = named["y"][-1]


def remembering(*names: str) -> Harm:
    """What is made of inputs is kept by their addresses, as they were when first seen."""
    kept: dict[Any, Any] = {}

    def before(named: Named) -> None:
        for name in names:
            tensor = named[name]
            key = name, tensor.data_ptr(), tuple(tensor.shape)
            named[name] = kept.setdefault(key, tensor.clone())

    return before


def remembering_eps() -> Harm:
    """The eps of the first call is used in all."""
    kept: list[float] = []

    def before(named: Named) -> None:
        kept.append(named["eps"])
        named["eps"] = kept[0]

    return before


@pytest.mark.parametrize(
    ("op", "name"),
    thinned(
        [(op, a.name) for op in CASES for a in ops.get(op).arguments(CASES[op]) if a.role == "in"],
        3,
    ),
)
def test_what_is_remembered_by_address(op: str, name: str) -> None:
    """Other contents at the same address are seen, in every input of every operator."""
    assert not judged(op, kernel_of(op, lambda _: None, remembering(name))).ok


def test_an_eps_that_is_remembered() -> None:
    """Another eps in a later call is seen."""
    assert not judged("layer_norm", kernel_of("layer_norm", lambda _: None, remembering_eps())).ok


def round_up(_: Named) -> None:
    """The processor is left rounding upwards."""
    ctypes.CDLL(None).fesetround(0x800 if platform.machine() == "x86_64" else 0x400000)


def other_affinity(_: Named) -> None:
    """This thread is bound to one processor."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def other_handler(_: Named) -> None:
    """A signal is handled otherwise, by way of the C library."""
    ctypes.CDLL(None).signal(signal.SIGUSR2, ctypes.c_void_p(1))


def block_a_signal(_: Named) -> None:
    """A signal is blocked."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])


def open_a_file(_: Named) -> None:
    """A file is left open."""
    os.open(os.devnull, os.O_RDONLY)


def set_variable(_: Named) -> None:
    """An environment variable is set, by way of the C library."""
    ctypes.CDLL(None).setenv(b"LNTUNE_TEST_LEFT", b"1", 1)


def start_one_thread() -> Harm:
    """A single thread is started, once, and runs on."""
    started: list[threading.Thread] = []

    def harm(_: Named) -> None:
        if not started:
            started.append(threading.Thread(target=STOP.wait, daemon=True))
            started[0].start()

    return harm


CHANGES: dict[str, tuple[Callable[[], Harm], str]] = {
    "numbers rounded upwards": (lambda: round_up, "rounded"),
    "fewer threads": (lambda: lambda _: torch.set_num_threads(1), "threads"),
    "one processor": (lambda: other_affinity, "processors"),
    "a signal ignored": (lambda: other_handler, "User defined signal 2"),
    "a signal blocked": (lambda: block_a_signal, "signals"),
    "a file left open": (lambda: open_a_file, "left a file open"),
    "another working folder": (lambda: lambda _: os.chdir("/"), "working folder"),
    "another umask": (lambda: lambda _: os.umask(0o077), "umask"),
    "an environment variable": (lambda: set_variable, "LNTUNE_TEST_LEFT"),
    "a thread left running": (start_one_thread, "thread running"),
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.skipif(sys.platform != "linux", reason="needs what Linux says of a process")
def test_what_is_changed_in_the_process(how: str) -> None:
    """What a kernel changes in its process beside its memory is seen, and put back where that can
    be.
    """
    if how == "one processor" and len(os.sched_getaffinity(0)) == 1:
        pytest.skip("there is one processor alone")
    make, said = CHANGES[how]
    before = surroundings.seen()
    STOP.clear()
    try:
        message = judged("layer_norm", kernel_of("layer_norm", make())).message
    finally:
        STOP.set()
    assert said in message
    assert not surroundings.changed(before, surroundings.seen())


STATES: dict[str, tuple[Callable[[], Harm], str]] = {
    "wrong once in 7 calls": (lambda: now_and_then(7), ""),
    "wrong once in 100 calls": (lambda: now_and_then(100), ""),
    "64 KB kept at every call": (lambda: leak(1 / 16), "keeps memory"),
    "denormal numbers flushed from now on": (lambda: flush, "denormal"),
    "1 MB kept at every call": (lambda: leak(1), "keeps memory"),
    "300 MB kept at every call": (lambda: leak(300), "keeps memory"),
    "a child left behind": (lambda: fork, "process"),
    "a thread at every call": (lambda: start_thread, "thread"),
    "a timer left running": (lambda: start_timer, "timer"),
    "wrong on one thread": (lambda: on_one_thread, "one thread"),
    "a race": (lambda: race, ""),
}


@pytest.mark.parametrize("how", STATES)
def test_what_is_left_behind(how: str) -> None:
    """What only shows on one thread, after several calls, or in the process, is seen."""
    make, said = STATES[how]
    STOP.clear()
    try:
        verdict = judged("layer_norm", kernel_of("layer_norm", make()))
    finally:
        torch.set_flush_denormal(False)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        STOP.set()
        while CHILDREN:
            os.kill(CHILDREN[-1], signal.SIGKILL)
            os.waitpid(CHILDREN.pop(), 0)
    assert not verdict.ok
    assert said in verdict.message


def test_what_is_added_to_an_output() -> None:
    """An output that is added to what was there is seen, also where what was there is no number."""
    assert not judged("layer_norm", adding()).ok


@pytest.mark.parametrize(("hidden", "rows", "first"), [(4096, 512, 1100), (512, 4096, 4200)])
def test_wrong_on_more_rows_than_are_timed(hidden: int, rows: int, first: int) -> None:
    """A record serves more rows than it is measured with, so what is wrong there is seen."""
    case, backend = Case("layer_norm", hidden, "float32", rows), backends.of(DEVICE)

    def kernel(x: Any, weight: Any, bias: Any, eps: float, y: Any) -> None:
        y.copy_(torch.nn.functional.layer_norm(x, (hidden,), weight, bias, eps))
        y[first:] = 0

    names = [a.name for a in ops.get("layer_norm").arguments(case)]

    def called(*values: Any) -> None:
        kernel(**dict(zip(names, values, strict=True)))

    (given,) = backend.inputs(case, DEVICE)
    assert "y: " in backend.compare(case, DEVICE, called, given)


@pytest.mark.parametrize("op", CASES)
def test_a_right_one_is_accepted(op: str) -> None:
    """The kernels above without their harm are right."""
    verdict = judged(op, kernel_of(op, lambda _: None))
    assert verdict.ok, verdict.message
