"""Kernels for matrices whose rows lie apart: of every schedule, on CPUs and in the emulator;
through the launcher; in PyTorch's calls.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import on_gpu
import pytest
import torch
from fake_gpu import FakeGpu
from grids import thinned
from kernel_arguments import arguments
from knob_samples import sample
from launches import CASE, PLAN, kernel_of, launches, right, tensors
from test_gpu_kernels import DEVICE, PLANS, SMALL, case_of
from test_lnlstm import check as check_step
from test_lnlstm import make_arguments
from torch import Tensor
from torch.nn import functional

import lntune
from lntune import check, device, ops, schedule
from lntune.backends.cuda import launcher, stored
from lntune.backends.emulated import calls as emulated
from lntune.backends.emulated.emulator import Traffic
from lntune.case import Case
from lntune.errors import BuildError, InputError
from lntune.kernels import cache, compiler
from lntune.torch import dispatch, layer_norm, lnlstm
from lntune.transforms import strides

CPU = device.current()
WHOLE = 8
"""Elements of the widest access of any dtype of a GPU. CPUs do not mind."""
unwarned = pytest.mark.filterwarnings("ignore::lntune.UntunedWarning")


def spread(matrix: Tensor, gap: int) -> Tensor:
    """The same values in rows that lie further apart; between them is NaN, which spoils whatever
    takes it for an element.
    """
    rows, length = matrix.shape
    return functional.pad(matrix, (0, gap), value=torch.nan)[:, :length] if rows else matrix


def with_spread_rows(
    case: Case, kernel: Callable[..., None], step: int = WHOLE
) -> Callable[..., None]:
    """A kernel whose arguments are moved into rows that lie apart, each matrix by another distance;
    of several the first stays where it is.
    """
    listed = ops.get(case.op).arguments(case)
    names = list(strides.names(listed))
    gaps = {name: step * (number + (len(names) == 1)) for number, name in enumerate(names)}

    def run(*values: Any) -> None:
        kernel(
            *(
                spread(v, gaps[a.name]) if a.name in gaps else v
                for a, v in zip(listed, values, strict=True)
            )
        )

    return run


WHERE = [
    (name, dtype, hidden)
    for name in PLANS
    for dtype, hidden in (("float32", 200), ("float16", 97), ("bfloat16", 64))
]


@pytest.mark.parametrize(("name", "dtype", "hidden"), thinned(WHERE))
def test_rows_may_lie_anywhere(name: str, dtype: str, hidden: int) -> None:
    """With the distances of rows as arguments every schedule passes the check that every candidate
    has to pass, whatever the distances.
    """
    case = case_of(PLANS[name].op, hidden, dtype)
    kernel = emulated.kernel(
        case,
        compiler.program(case, PLANS[name], PLANS[name].default(case, SMALL), SMALL, strided=True),
        "shuffled",
    )
    verdict = check.verify(case, with_spread_rows(case, kernel), check.ALIGNED, device=SMALL)
    assert verdict.ok, verdict.message


ON_CPUS = [
    (name, *which)
    for name, s in schedule.all_schedules().items()
    if s.kind == "cpu"
    for which in (("float32", 100), ("bfloat16", 97))
]


@pytest.mark.parametrize(
    ("name", "dtype", "hidden"),
    thinned([one for one in ON_CPUS if one[:2] != ("widened_rows", "float32")], 3),
)
def test_rows_may_lie_anywhere_on_cpus(name: str, dtype: str, hidden: int) -> None:
    """So do the schedules of CPUs, with rows at any element."""
    plan = schedule.get(name)
    case = Case(plan.op, hidden, dtype, 32)
    setting = plan.default(case, CPU)
    kernel = with_spread_rows(
        case, compiler.in_memory(case, plan, setting, CPU, strided=True), step=3
    )
    verdict = check.verify(case, kernel, check.FENCE, device=CPU)
    assert verdict.ok, verdict.message


@pytest.mark.parametrize("name", PLANS)
def test_whatever_the_knobs(name: str) -> None:
    """So it is with other knobs: rows kept in registers, in shared memory, read again."""
    case = case_of(PLANS[name].op, 96, "bfloat16")
    for setting in sample(PLANS[name], case, SMALL)[:1]:
        kernel = emulated.kernel(
            case, compiler.program(case, PLANS[name], setting, SMALL, strided=True), "backward"
        )
        verdict = check.verify(case, with_spread_rows(case, kernel), check.ALIGNED, device=SMALL)
        assert verdict.ok, f"{setting}: {verdict.message}"


@pytest.mark.parametrize("name", thinned(PLANS))
def test_no_more_is_read_and_not_in_narrower_accesses(name: str) -> None:
    """The distance of rows costs no byte and no width: what is read of each argument is what the
    kernel for contiguous rows reads.
    """
    case, plan = case_of(PLANS[name].op, 256, "bfloat16"), PLANS[name]
    rows, accesses = 32, []
    for strided in (False, True):
        seen = list[Traffic]()
        kernel = emulated.kernel(
            case,
            compiler.program(case, plan, plan.default(case, DEVICE), DEVICE, strided=strided),
            seen=seen,
        )
        moved = with_spread_rows(case, kernel) if strided else kernel
        moved(*arguments(case, rows, device=DEVICE).values())
        accesses.append(
            [
                {n: (m.loaded, m.stored, m.loads, m.stores, m.widest) for n, m in traffic.items()}
                for traffic in seen
            ]
        )
    assert accesses[0] == accesses[1]


# --------------------------------------------------------------------------------------------------
# the launcher


def test_distances_go_through_the_launcher(fake_gpu: FakeGpu) -> None:
    """One kernel takes contiguous rows, rows with gaps, the same row again and again, a single row
    of any stride, and none.
    """
    kernel = kernel_of(strided=True)
    values = tensors()
    for x in (
        values["x"],
        spread(values["x"], 4),
        spread(values["x"], 400),
        values["x"][:1].expand(5, -1),
    ):
        kernel(*{**values, "x": x}.values())
        assert right({**values, "x": x})
    one = tensors(1)
    one["x"] = torch.randn(3, 101)[1:2, :96].clone().as_strided((1, 96), (3, 1))
    kernel(*one.values())
    assert right(one)
    launches(fake_gpu)
    kernel(*tensors(0).values())
    assert launches(fake_gpu) == 0


def test_the_two_kinds_of_kernels_are_kept_separate(fake_gpu: FakeGpu) -> None:
    """In the cache each has a file of its own; the kernel for contiguous rows takes no others."""
    plain, free = kernel_of(), kernel_of(strided=True)
    values = tensors()
    values["x"] = spread(values["x"], 4)
    free(*values.values())
    assert right(values)
    with pytest.raises(
        InputError, match=r"argument x: got strides \(100, 1\), expected a contiguous tensor\."
    ):
        plain(*values.values())


def test_rows_that_do_not_fit_are_refused(fake_gpu: FakeGpu) -> None:
    """Rows apart by a part of an access, elements that are not side by side, and outputs with gaps
    are refused before anything is launched.
    """
    kernel, values = kernel_of(strided=True, vector_width=4), tensors()
    launches(fake_gpu)
    for changed, message in (
        (
            {"x": torch.zeros(5, 98)[:, :96]},
            r"argument x: got rows 392 bytes apart, expected a multiple of 16",
        ),
        (
            {"x": torch.zeros(5, 192)[:, ::2]},
            (
                r"argument x: got strides \(192, 2\), expected a contiguous tensor, but for gaps"
                r" between its rows"
            ),
        ),
        (
            {"y": torch.zeros(5, 100)[:, :96]},
            r"argument y: got strides \(100, 1\), expected a contiguous tensor\.",
        ),
        ({"x": torch.zeros(4, 100)[:, :96]}, r"argument y: got 5 rows, expected 4 as x has"),
    ):
        with pytest.raises(InputError, match=message):
            kernel(*{**values, **changed}.values())
    assert launches(fake_gpu) == 0


def test_an_argument_without_rows_has_no_stride(fake_gpu: FakeGpu) -> None:
    """A stored kernel that says otherwise is refused when it is loaded."""
    case = CASE
    device = launcher.device(0)
    setting = PLAN.default(case.typical, device)
    binary = stored.read(cache.prepare(case, PLAN, setting, device, strided=True))
    wrong = [
        type(a)(
            a.name, a.role, a.dtype, a.shape, "weight_stride" if a.name == "weight" else a.stride
        )
        for a in binary.arguments
    ]
    with pytest.raises(BuildError, match="argument weight is of a form the launcher does not know"):
        launcher.load(
            type(binary)(
                **{
                    **{f: getattr(binary, f) for f in binary.__struct_fields__},
                    "arguments": tuple(wrong),
                }
            )
        )


# --------------------------------------------------------------------------------------------------
# PyTorch's calls


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "part of wider rows": lambda t: functional.pad(t, (0, 8))[..., : t.shape[-1]],
    "one step of a batch of sequences": lambda t: torch.stack([t, t, t], 1)[:, 1],
    "every other row": lambda t: t.repeat_interleave(2, 0)[::2],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.fixture(params=["cpu", "imagined", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """PyTorch's device of the test: a CPU, the GPU that is imagined on it, a GPU."""
    if request.param == "cpu":
        dispatch.reload()
        yield "cpu"
        return
    with on_gpu.gpu(request, monkeypatch) as here:
        yield here.name


@unwarned
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_layer_norm_reads_rows_where_they_lie(
    place: str, view: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Input and gradient are not copied, and the result is that of a copy to the bit, in a first
    call and in the direct ones after it.
    """
    monkeypatch.setenv("LNTUNE_CHECK", "0")  # which copies what it compares
    generator = torch.Generator().manual_seed(0)
    x, dy = (view(torch.randn(6, 64, generator=generator).to(place)) for _ in range(2))
    weight, bias = (torch.randn(64, generator=generator).to(place) for _ in range(2))

    def run(x: Tensor, dy: Tensor) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        y = lntune.layer_norm(leaf, (64,), weight, bias)
        with torch.no_grad():
            z = lntune.layer_norm(x, (64,), weight, bias)
        return [y.detach(), z, *torch.autograd.grad(y, (leaf,), dy)]

    expected = run(x.contiguous(), dy.contiguous())
    copies = []
    with monkeypatch.context() as patch:
        patch.setattr(
            Tensor,
            "contiguous",
            lambda t, *_, **__: copies.append(t) or t.clone(memory_format=torch.contiguous_format),
        )
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(run(x, dy), expected, strict=True))
    assert not [t.shape for t in copies if t.ndim > 1 and t.shape[0] > 1]


@unwarned
def test_direct_calls_distinguish_strided_rows_from_contiguous_ones(place: str) -> None:
    """A table keeps the two kinds of kernels apart: contiguous and strided calls take turns, and
    all are direct once both were made.
    """
    x = torch.randn(6, 72).to(place)
    given = [x[:, :64], x[:, :64].contiguous()]
    expected = [functional.layer_norm(t, (64,)) for t in given]
    with torch.no_grad():
        for i in (0, 1, 0, 1, 1, 0):
            torch.testing.assert_close(
                lntune.layer_norm(given[i], (64,)), expected[i], rtol=1e-5, atol=1e-5
            )
        for t, y in zip(given, expected, strict=True):
            torch.testing.assert_close(
                layer_norm._direct.call(t, (64,), None, None, 1e-5), y, rtol=1e-5, atol=1e-5
            )


@unwarned
def test_a_step_of_an_lstm_reads_rows_where_they_lie(place: str) -> None:
    """Gates that are one step of a batch of sequences, and a cell that is part of wider rows: as
    near to float64 as eager, and a direct call.
    """
    given = {name: t.to(place) for name, t in make_arguments(hidden=16, batch=(6,)).items()}
    given["gates_x"] = torch.stack([given["gates_x"]] * 3, 1)[:, 1]
    given["c"] = VIEWS["part of wider rows"](given["c"])
    check_step(given)
    with torch.no_grad():
        expected = lnlstm.lnlstm_step(**given)
        direct = lnlstm._direct[False].call(*given.values(), 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(direct, expected, strict=True))


@unwarned
def test_the_gradients_of_a_step_with_strided_rows(place: str) -> None:
    """They are, to the bit, those of a step of copies, whatever of the step's arguments and of its
    gradients lies apart.
    """
    plain = {name: t.to(place) for name, t in make_arguments(hidden=16, batch=(6,)).items()}
    moved = {
        name: VIEWS["part of wider rows"](t) if name in ("gates_x", "gates_h", "c") else t
        for name, t in plain.items()
    }
    grads = [
        VIEWS["one step of a batch of sequences"](torch.randn(6, 16).to(place)) for _ in range(2)
    ]
    results = []
    for given, dy in ((plain, [g.contiguous() for g in grads]), (moved, grads)):
        leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
        results.append(torch.autograd.grad(lnlstm.lnlstm_step(**leaves), list(leaves.values()), dy))
    for name, mine, theirs in zip(plain, *results, strict=True):
        assert mine.is_contiguous()
        assert torch.equal(mine, theirs), name


@unwarned
def test_where_nothing_can_be_built_rows_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with built kernels and no compiler serves strided calls by the kernel for
    contiguous rows, and says nothing.
    """
    dispatch.reload()
    x, w = torch.randn(6, 80)[:, :72], torch.ones(72)
    with torch.no_grad():
        lntune.layer_norm(x.contiguous(), (72,), w)  # is in the cache from now on
        dispatch.reload()
        monkeypatch.setattr(
            compiler,
            "to_file",
            lambda *_: (_ for _ in ()).throw(BuildError("there is no compiler")),
        )
        monkeypatch.setattr(
            functional, "layer_norm", lambda *_: pytest.fail("eager mode served it")
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", ".*is not tuned.*")
            outputs = [lntune.layer_norm(x, (72,), w) for _ in range(2)]
    monkeypatch.undo()
    dispatch.reload()
    for y in outputs:
        torch.testing.assert_close(y, functional.layer_norm(x, (72,), w), rtol=1e-5, atol=1e-5)
