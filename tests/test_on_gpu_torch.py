"""PyTorch's calls on a GPU: values and gradients against float64, layouts, streams, threads, CUDA
graphs, autocast, torch.compile.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from grids import exhaustive, product
from on_gpu import Here, here
from torch import Tensor, nn
from torch.nn import functional

import lntune
from lntune.errors import LaunchError
from lntune.torch import graphs

__all__ = ["here"]

pytestmark = [
    pytest.mark.filterwarnings("ignore::lntune.UntunedWarning"),
    pytest.mark.usefixtures("one_thread"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float32: 16 * 2.0**-24, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
Norm = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def kernels_run(here: Here) -> Iterator[None]:
    """Whatever a test compares, kernels of the GPU took part in it."""
    here.launches()
    yield
    assert here.launches() >= 1


def make(*shape: int, here: Here, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random numbers around 0.5, the same on every device."""
    return (
        (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.5)
        .to(dtype)
        .to(here.name)
    )


def run(norm: Norm, x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> list[Tensor]:
    """y and the gradients of x, weight and bias, in float64 on the CPU."""
    given = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = norm(given[0], (weight.numel(),), *given[1:], 1e-5)
    return [t.detach().double().cpu() for t in (y, *torch.autograd.grad(y, given, dy))]


def assert_right(
    x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, norm: Norm = lntune.layer_norm
) -> None:
    """y and every gradient are no further from float64 than twice eager's own error on this device
    and a rounding.
    """
    truth = run(functional.layer_norm, *(t.detach().double().cpu() for t in (x, weight, bias, dy)))
    eager = run(functional.layer_norm, x, weight, bias, dy)
    ours = run(norm, x, weight, bias, dy)
    for name, mine, theirs, true in zip(
        ("y", "dx", "dweight", "dbias"), ours, eager, truth, strict=True
    ):
        assert mine.shape == theirs.shape
        if mine.numel():
            error, of_eager = ((t - true).abs().max().item() for t in (mine, theirs))
            assert error <= 2 * of_eager + ROUNDING[x.dtype] * max(1.0, true.abs().max().item()), (
                f"{name}: {error}, eager {of_eager}"
            )


def problem(
    here: Here, *shape: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, weight, bias, dy) for a shape whose last dimension is normalized."""
    weight, bias = (make(shape[-1], here=here, dtype=dtype, seed=seed) for seed in (1, 2))
    return (
        make(*shape, here=here, dtype=dtype),
        weight,
        bias,
        make(*shape, here=here, dtype=dtype, seed=3),
    )


# --------------------------------------------------------------------------------------------------
# layer norm


@every_dtype
def test_values_and_gradients(here: Here, dtype: torch.dtype) -> None:
    """Few rows and many, odd sizes and whole ones, up to long rows: y, dx, dweight and dbias
    against float64.
    """
    real = (
        (1, 1024),
        (7, 1000),
        (8, 128, 768),
        (513, 4096),
        (4099, 1024),
        (33, 16384),
        (20000, 256),
        (3, 50257),
    )
    for shape in here.pick(real, ((2, 2, 24),)):
        assert_right(*problem(here, *shape, dtype=dtype))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "part of wider rows": lambda t: functional.pad(t, (0, 24))[:, : t.shape[1]],
    "part of wider rows, one off": lambda t: functional.pad(t, (1, 7))[:, 1 : 1 + t.shape[1]],
    "every other row": lambda t: t.repeat_interleave(2, 0)[::2],
    "every other element": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "transposed": lambda t: t.t().contiguous().t(),
    "expanded": lambda t: t[:1].expand(t.shape[0], -1),
    **{
        f"{shift} off": lambda t, shift=shift: torch.cat([t.new_zeros(shift), t.flatten()])[
            shift:
        ].view(t.shape)  # type: ignore[misc]
        for shift in (1, 2, 3, 4, 8)
    },
}


@pytest.mark.parametrize(
    ("dtype", "name"), product((torch.float32, torch.bfloat16), tuple(LAYOUTS)), ids=str
)
def test_layouts(here: Here, dtype: torch.dtype, name: str) -> None:
    """Row-strided, transposed, expanded and misaligned views of the input and of its gradient:
    right, and never a crash.
    """
    layout = LAYOUTS[name]
    x, weight, bias, dy = problem(here, 6, here.pick(1024, 64), dtype=dtype)
    assert_right(layout(x), weight, bias, dy)
    assert_right(x, weight, bias, layout(dy))
    off = torch.cat([weight.new_zeros(1), weight])[1:]
    assert_right(x, off, bias, dy)


@pytest.mark.parametrize("leading", [(0,), (0, 3), (2, 0)], ids=str)
def test_no_rows(here: Here, leading: tuple[int, ...]) -> None:
    """An empty batch gives an empty result and gradients of zero, before and after a full one."""
    x, weight, bias, dy = problem(here, 2, 64)
    for _ in range(2):
        ours = run(
            lntune.layer_norm,
            make(*leading, 64, here=here),
            weight,
            bias,
            make(*leading, 64, here=here),
        )
        assert ours[0].shape == ours[1].shape == (*leading, 64)
        assert ours[2].eq(0).all() and ours[3].eq(0).all()
        assert_right(x, weight, bias, dy)


def test_the_gradients_of_the_affine_are_the_same_bits_every_time(here: Here) -> None:
    """dweight and dbias of the same call are the same bits, however often it is made."""
    given = problem(here, here.pick(5000, 40), here.pick(1024, 64), dtype=torch.bfloat16)
    first = run(lntune.layer_norm, *given)
    for _ in range(here.pick(30, 2)):
        assert all(
            torch.equal(a, b) for a, b in zip(run(lntune.layer_norm, *given), first, strict=True)
        )


def test_a_row_does_not_depend_on_its_neighbours(here: Here) -> None:
    """A row with NaN, and one with an infinity, spoils nothing but itself."""
    x, weight, bias, _ = problem(here, 6, here.pick(1024, 64))
    clean = lntune.layer_norm(x, (x.shape[1],), weight, bias)
    x[1, 5], x[4, 0] = torch.nan, torch.inf
    y = lntune.layer_norm(x, (x.shape[1],), weight, bias)
    assert y[1].isnan().all() and y[4].isnan().any()
    assert all(torch.equal(y[i], clean[i]) for i in (0, 2, 3, 5))


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, "low"], ids=str)
def test_autocast(here: Here, low: torch.dtype, given: Any) -> None:
    """Under autocast the result and every gradient have the dtypes that PyTorch's layer norm has
    there, and its values.
    """
    x, weight, bias, _ = problem(here, 6, here.pick(768, 64))
    x = x.to(low) if given == "low" else x
    results = []
    for norm in (lntune.layer_norm, functional.layer_norm):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        with torch.autocast(torch.device(here.name).type, dtype=low):
            y = norm(leaves[0], (x.shape[1],), *leaves[1:], 1e-5)
        results.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(
            ours, theirs, rtol=ROUNDING[low] * 4, atol=ROUNDING[low] * 4 * theirs.abs().max().item()
        )


def test_converted_models(here: Here) -> None:
    """A converted transformer layer gives the original's output and gradients."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True).to(here.name)
    ours = lntune.convert(copy.deepcopy(model))
    x, dy = make(2, 5, 64, here=here), make(2, 5, 64, here=here, seed=3)
    outputs = [m(x) for m in (model, ours)]
    grads = [
        torch.autograd.grad(y, list(m.parameters()), dy)
        for y, m in zip(outputs, (model, ours), strict=True)
    ]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(
            mine, theirs, rtol=1e-3, atol=1e-3 * max(1e-2, theirs.abs().max().item())
        )


# ----------------------------------------------------------------------------------------------
# streams, threads, graphs


def test_streams(here: Here) -> None:
    """Kernels run on PyTorch's current stream, forward and backward: work before and behind them on
    that stream is in order.
    """
    x, weight, bias, dy = problem(here, here.pick(4096, 6), here.pick(4096, 64))
    expected = run(lntune.layer_norm, x * 2, weight, bias, dy)
    for _ in range(here.pick(10, 1)):
        with here.stream():
            if here.real:
                # whoever does not wait for the stream reads x before it is doubled
                torch.cuda._sleep(10_000_000)
            results = run(lntune.layer_norm, x * 2, weight, bias, dy)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_two_threads(here: Here) -> None:
    """Two threads, each on a stream of its own, get their own results, the first call of all
    included.
    """
    given = [
        problem(here, here.pick(512, 3), here.pick(hidden, hidden // 8)) for hidden in (640, 1152)
    ]
    expected = [run(functional.layer_norm, *g) for g in given]
    failures: list[BaseException] = []
    start = threading.Barrier(2)

    def work(number: int) -> None:
        try:
            start.wait()
            for _ in range(here.pick(50, 2)):
                with here.stream():
                    results = run(lntune.layer_norm, *given[number])
                for ours, theirs in zip(results, expected[number], strict=True):
                    torch.testing.assert_close(
                        ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item()
                    )
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_layer_norm_in_a_graph(here: Here, training: bool) -> None:
    """Captured in a CUDA graph, forward and backward compute on what is in their inputs when the
    graph is replayed.
    """
    x, weight, bias, dy = problem(here, here.pick(512, 4), here.pick(1024, 64))
    leaves = [t.detach().requires_grad_(training) for t in (x.clone(), weight, bias)]
    kept = [torch.empty_like(x), *(torch.empty_like(t) for t in leaves)]

    def call() -> None:
        y = lntune.layer_norm(leaves[0], (x.shape[1],), *leaves[1:])
        results = (y, *torch.autograd.grad(y, leaves, dy)) if training else (y,)
        for out, value in zip(kept, results, strict=False):
            out.copy_(value.detach())

    with contextlib.nullcontext() if training else torch.no_grad():
        replay = here.graph(call)
    for seed in (4, 5):
        with torch.no_grad():
            leaves[0].copy_(make(*x.shape, here=here, seed=seed))
        replay()
        here.wait()
        expected = run(lntune.layer_norm, leaves[0].detach(), weight, bias, dy)
        for out, value in zip(kept[: 4 if training else 1], expected, strict=False):
            torch.testing.assert_close(
                out.double().cpu(), value, rtol=1e-5, atol=1e-5 * value.abs().max().item()
            )


# --------------------------------------------------------------------------------------------------
# LSTM


def layers(here: Here, dtype: torch.dtype = torch.float32, **options: Any) -> lntune.LayerNormLSTM:
    """An LSTM whose gains and biases are not ones and zeros; the gain on h is around 1/4, since
    with 1 rounding grows from step to step.
    """
    torch.manual_seed(0)
    model = lntune.LayerNormLSTM(here.pick(64, 6), here.pick(128, 16), dtype=dtype, **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                around = (
                    0.25
                    if "ln_hh_weight" in name
                    else float(name.startswith("ln_") and "_weight" in name)
                )
                p.copy_(torch.randn(p.shape) * 0.1 + around)
    return model.to(here.name)


def sequence(here: Here, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """(time, batch, features)."""
    return (
        make(
            here.pick(20, 3), here.pick(32, 2), here.pick(64, 6), here=here, dtype=dtype, seed=seed
        )
        - 0.5
    )


def outcome(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, last states, gradients of the input and of every parameter, in float64 on the CPU."""
    leaf = x.detach().requires_grad_()
    output, (h, c) = model(leaf)
    grads = torch.autograd.grad(
        output.square().mean() + h.sum() * 0.01 + c.sum() * 0.01, [leaf, *model.parameters()]
    )
    return [t.detach().double().cpu() for t in (output, h, c, *grads)]


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True},
    "carried": {"carried": True},
    "no biases": {"bias": False, "norm_bias": False},
}


def lstms() -> list[Any]:
    """(GPU, dtype, options): all on a device; on the imagined one every dtype and every option, but
    not all of their pairs.
    """
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    every = [(dtype, name) for dtype in dtypes for name in OPTIONS]
    some = [(torch.float32, "default"), *zip(dtypes, list(OPTIONS)[1:], strict=True)]
    given = [("imagined", some, ()), ("cuda", every, pytest.mark.gpu)]
    return [
        param if where == "cuda" or number % 2 == 0 else exhaustive(param)
        for where, chosen, marks in given
        for number, (dtype, name) in enumerate(chosen)
        for param in [
            pytest.param(where, dtype, OPTIONS[name], id=f"{where}-{dtype}-{name}", marks=marks)
        ]
    ]


@pytest.mark.parametrize(("here", "dtype", "options"), lstms(), indirect=["here"])
def test_lstm_against_float64(here: Here, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Outputs, states and every gradient of the layers, again and again (from the second call on as
    a CUDA graph), against the same layers in float64, which PyTorch's operators serve.
    """
    model, x = layers(here, dtype, **options), sequence(here, dtype)
    truth = outcome(copy.deepcopy(model).double().cpu(), x.double().cpu())
    tolerance = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    for _ in range(3):
        for i, (mine, true) in enumerate(zip(outcome(model, x), truth, strict=True)):
            assert (mine - true).norm() <= tolerance * max(true.norm().item(), 1e-3), i


def test_lstm_calls_are_independent(here: Here) -> None:
    """Outputs of one call stay what they are when the next call, of the same shape, replays the
    same graph.
    """
    model = layers(here)
    inputs = [sequence(here, seed=seed) for seed in range(4)]
    with torch.no_grad():
        outputs = [model(x)[0] for x in inputs]
        copies = [y.clone() for y in outputs]
        again = [model(x)[0] for x in reversed(inputs)][::-1]
    here.wait()
    for y, kept, later in zip(outputs, copies, again, strict=True):
        assert torch.equal(y, kept)
        torch.testing.assert_close(y, later, rtol=1e-5, atol=1e-6)


def test_lstm_in_a_graph_of_the_users(here: Here) -> None:
    """The layer can be captured inside a CUDA graph of the user's, whatever graphs it makes
    itself.
    """
    model, x = layers(here), sequence(here)
    kept = torch.empty_like(model(x)[0])

    def call() -> None:
        with torch.no_grad():
            kept.copy_(model(x)[0])

    replay = here.graph(call)
    x.copy_(sequence(here, seed=7))
    replay()
    here.wait()
    with torch.no_grad():
        torch.testing.assert_close(kept, model(x)[0], rtol=1e-5, atol=1e-6)


def test_lstm_training_with_a_changing_weight(here: Here) -> None:
    """A graph of the layer's computes with the weights as they are now: an optimizer's step shows
    in the next output.
    """
    model, x = layers(here), sequence(here)
    reference = copy.deepcopy(model).double().cpu()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference)]
    for _ in range(4):
        losses = []
        for m, optimizer, given in zip(
            (model, reference), optimizers, (x, x.double().cpu()), strict=True
        ):
            loss = m(given)[0].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_lstm_training_on_the_callers_memory(here: Here) -> None:
    """In a training loop graphs come to work on the callers' memory, with the results of float64;
    on a GPU, whose allocator gives the same memory again, next to nothing is copied then: gradients
    of last states that are one number, expanded.
    """
    model, x = layers(here, num_layers=here.pick(2, 1)), sequence(here)
    truth = outcome(copy.deepcopy(model).double().cpu(), x.double().cpu())
    copied = []
    for _ in range(here.pick(40, 3)):
        before = graphs.traffic.bytes
        results = outcome(model, x)
        copied.append(graphs.traffic.bytes - before)
        for mine, true in zip(results, truth, strict=True):
            assert (mine - true).norm() <= 2e-5 * max(true.norm().item(), 1e-3)
        del results, mine
    assert max(copied) > 0
    assert not here.real or max(copied[-4:]) < max(copied) / 20, copied


# --------------------------------------------------------------------------------------------------
# torch.compile


def test_compile(here: Here) -> None:
    """torch.compile takes layer norm and an LSTM as one graph each, forward and backward, with
    eager's results.
    """
    torch._dynamo.reset()
    backend = here.pick("inductor", "aot_eager")
    x, weight, bias, dy = problem(here, 6, here.pick(1024, 64))

    def norm(x: Tensor, shape: tuple[int, ...], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return lntune.layer_norm(x * 1.0, shape, weight, bias, eps) * 1.0

    assert_right(x, weight, bias, dy, torch.compile(norm, fullgraph=True, backend=backend))
    model, steps = layers(here), sequence(here)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    expected = outcome(model, steps)
    for ours, theirs in zip(outcome(compiled, steps), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# errors, GPUs


def test_a_launch_error_is_an_exception(here: Here) -> None:
    """What the driver refuses is raised where the call is made, naming the operator and the
    case.
    """
    x, weight, bias, _ = problem(here, 4, 64)
    lntune.layer_norm(x, (64,), weight, bias)
    if here.fake is None:
        pytest.skip("a real driver has no launch that fails and leaves the process as it was")
    here.fake.fail("cuLaunchKernel", 2)  # out of memory
    with pytest.raises(LaunchError, match=r"layer_norm.*64"):
        lntune.layer_norm(x, (64,), weight, bias)
    here.fake.fail()
    assert_right(*problem(here, 4, 64))


def test_tensors_on_two_devices_are_refused(here: Here) -> None:
    """A weight on another device is an InputError that names it."""
    x, weight, bias, _ = problem(here, 4, 64)
    lntune.layer_norm(x, (64,), weight, bias)
    with pytest.raises(lntune.LntuneError, match="weight"):
        lntune.layer_norm(x, (64,), weight.to(here.pick("cpu", "meta")), bias)


@pytest.mark.parametrize("here", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_two_gpus(here: Here) -> None:
    """Each GPU of a process runs its own calls, whichever is PyTorch's current device, forward,
    backward and as graphs.
    """
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs; torch.cuda.device_count() is {torch.cuda.device_count()}")
    for current in (0, 1):
        with torch.cuda.device(current):
            for number in (1, 0):
                place = Here(f"cuda:{number}", here.device)
                assert_right(*problem(place, 40, 1024, dtype=torch.bfloat16))
                model, x = layers(place), sequence(place)
                expected = outcome(copy.deepcopy(model).double().cpu(), x.double().cpu())
                for _ in range(3):
                    for mine, true in zip(outcome(model, x), expected, strict=True):
                        assert (mine - true).norm() <= 1e-4 * max(true.norm().item(), 1e-3)


def test_graphs_are_captured_without_warnings(here: Here) -> None:
    """The layer's loop is captured without a warning that it could not be."""
    model, x = layers(here), sequence(here)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for _ in range(3):
            outcome(model, x)
