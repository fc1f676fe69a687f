"""A whole training iteration of an LSTM with layer normalization: lntune.LayerNormLSTM against what
can be written in PyTorch today.

    python bench/lnlstm_training.py [--dtype float32,bfloat16] [--sequence 100] [--batch 32]
                                   [--hidden 512] [--output FOLDER]
    python bench/lnlstm_training.py --sequence 10,50,200 --batch 1,32,128 --hidden 256 --layers 1
                                   --chunks "" --seconds 4 --output FOLDER    # how it scales

An iteration is: gradients set to None, forward, loss = mean of the squared output, backward to all
parameters. The optimizer's step is left out for everyone, and the input is data: it wants no
gradient (--input-grad: it does). All contenders have the same parameters and compute, with the
defaults of lntune.LayerNormLSTM (Ba, Kiros, Hinton: *Layer Normalization*, 2016, arXiv:1607.06450,
eqs. 20-22),

    z = LN(W_ih x[t]; ln_ih) + LN(W_hh h[t-1]; ln_hh) + b                in the order i, f, g, o
    c[t] = sigmoid(f) c[t-1] + sigmoid(i) tanh(g)
    h[t] = sigmoid(o) tanh(LN(c[t]; ln_c))

Before anything is timed, everyone's output and gradients are compared with the eager modules' in
float64.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import msgspec
import torch
import typer
from keeping import keep
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

import lntune
from lntune import device, timing
from lntune.log.records import Timing
from lntune.report.columns import WIDE, Column, Table, key
from lntune.report.rows import spread
from lntune.report.tables import percent
from lntune.system import toolchain
from lntune.system.heap import kept_heap
from lntune.torch import dispatch, first_check, layer_norm_node, products
from lntune.torch.direct_calls import Direct

# How far the output and each gradient may be from float64's, as |difference| / |float64's| in
# Euclidean norms: for everyone where eager mode's own distance is less than half of it (else twice
# that), and for eager mode itself. In bfloat16 eager mode adds up the gradients of a layer norm's
# parameters over all rows in bfloat16, which was found to put them 0.3 off at the default sizes and
# 0.86 off after 200 steps of 128 rows.
TOLERANCES = {"float64": (1e-10, 1e-10), "float32": (1e-5, 1e-5), "bfloat16": (0.03, 1.0)}
EAGER = "eager modules"
EAGER_OUR_PRODUCTS = "eager, lntune's products"
WARM_UP = 3  # iterations; TorchScript optimizes at the second and third
# 25 steps compiled for more than 80 s on two cores, 100 steps are one graph of thousands of
# operators
CHUNKS = "1,10"
PRODUCTS = {
    *(
        f"aten::{name}"
        for name in (
            "mm",
            "addmm",
            "addmm_",
            "bmm",
            "baddbmm",
            "mv",
            "addmv",
            "matmul",
            "linear",
            "mkldnn_linear",
        )
    ),
    *("mkldnn::_linear_pointwise", "mkldnn::_reorder_linear_weight", "mkl::_mkl_linear"),
}
"""Operators that are matrix products: the rearranging of a matrix among them, which a product on
its own does at every call.
"""


class Cell(nn.Module):
    """One step in PyTorch's operators; parameters as those of lntune.LayerNormLSTMCell."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in weights.items():
            self.register_parameter(name, nn.Parameter(value.clone()))
        self.hidden: int = weights["ln_c_weight"].numel()

    def times(self, x: Tensor, weight: Tensor) -> Tensor:
        """x @ weight.T."""
        return functional.linear(x, weight)

    def gates(self, x: Tensor) -> Tensor:
        """The input's part of z, (..., 4 * hidden), for any number of steps; b is added here, since
        it costs nothing in a layer norm.
        """
        product = self.times(x, self.weight_ih)
        return functional.layer_norm(
            product, (4 * self.hidden,), self.ln_ih_weight, self.ln_ih_bias + self.bias
        )

    def forward(self, gates_x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """(h, c) after the step, (batch, hidden) each."""
        product = self.times(h, self.weight_hh)
        z = gates_x + functional.layer_norm(
            product, (4 * self.hidden,), self.ln_hh_weight, self.ln_hh_bias
        )
        i, f, g, o = z.chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(
            functional.layer_norm(c, (self.hidden,), self.ln_c_weight, self.ln_c_bias)
        )
        return h, c


class OurProductsCell(Cell):
    """The same with lntune's choice of a library for matrix products: what is left of lntune's gain
    is its kernels' and its time loop's.
    """

    def times(self, x: Tensor, weight: Tensor) -> Tensor:
        """x @ weight.T."""
        return products.linear(x, weight)


class Layer(nn.Module):
    """The cell over a sequence, as in PyTorch's benchmarks/fastrnns/custom_lstms.py.

    `hoisted`: the input's part of all steps is one matrix product and one layer norm; otherwise
    each step makes its own, as there. `chunk`: steps to a call of `steps`, 0 for all.
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        hoisted: bool = True,
        chunk: int = 0,
        cell: type[Cell] = Cell,
    ) -> None:
        super().__init__()
        self.cell = cell(weights)
        self.hoisted: bool = hoisted
        self.chunk: int = chunk

    def steps(self, inputs: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs (time, batch, hidden) and the last (h, c), from gates_x if hoisted and from x
        otherwise.
        """
        outs: list[Tensor] = []
        for step in inputs.unbind(0):
            h, c = self.cell(step if self.hoisted else self.cell.gates(step), h, c)
            outs.append(h)
        return torch.stack(outs), h, c

    def forward(self, x: Tensor) -> Tensor:
        """(time, batch, hidden) from (time, batch, input)."""
        h = torch.zeros(x.shape[1], self.cell.hidden, dtype=x.dtype, device=x.device)
        c = torch.zeros_like(h)
        inputs = self.cell.gates(x) if self.hoisted else x
        if self.chunk == 0:
            return self.steps(inputs, h, c)[0]
        outs: list[Tensor] = []
        for part in inputs.split(self.chunk):
            out, h, c = self.steps(part, h, c)
            outs.append(out)
        return torch.cat(outs)


def lntune_module(sizes: tuple[int, int, int], dtype: torch.dtype) -> lntune.LayerNormLSTM:
    """A module of (input, hidden, layers) whose gains are not 1 and whose biases are not 0, so that
    a lost one shows.

    The gain on h is around 1/4. With 1 a fresh LSTM of this kind is chaotic: over 100 steps
    rounding grows by a factor of a thousand, and no two bfloat16 results would be alike.
    """
    module = lntune.LayerNormLSTM(*sizes, dtype=dtype)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim == 1:
                around = (
                    0.25
                    if "ln_hh_weight" in name
                    else float(name.startswith("ln_") and "_weight" in name)
                )
                p.copy_(torch.randn(p.shape) * 0.1 + around)
    return module


def eager_modules(
    source: lntune.LayerNormLSTM, dtype: torch.dtype | None = None, **options: Any
) -> nn.Sequential:
    """The same in eager modules, with copies of the parameters, in the same order."""
    values = {name: p.detach().to(dtype or p.dtype) for name, p in source.named_parameters()}
    return nn.Sequential(
        *(
            Layer({n.removesuffix(s): v for n, v in values.items() if n.endswith(s)}, **options)
            for _, s in source.suffixes()
        )
    )


def scripted(source: lntune.LayerNormLSTM, **options: Any) -> nn.Module:
    """The eager modules in TorchScript."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r".*torch\.jit\..* is deprecated", category=DeprecationWarning
        )
        return torch.jit.script(eager_modules(source, **options))


def compiled(source: lntune.LayerNormLSTM, chunk: int, backend: str = "inductor") -> nn.Module:
    """The eager modules with the input's part and `chunk` unrolled steps each compiled as one
    graph.
    """
    module = eager_modules(source, chunk=chunk)
    for layer in module:
        layer.cell.gates = torch.compile(
            layer.cell.gates, dynamic=False, fullgraph=True, backend=backend
        )
        layer.steps = torch.compile(layer.steps, dynamic=False, fullgraph=True, backend=backend)
    return module


def iterate(module: nn.Module, x: Tensor) -> Tensor:
    """One training iteration; the output."""
    x.grad = None
    for p in module.parameters():
        p.grad = None
    result = module(x)
    output: Tensor = result[0] if isinstance(result, tuple) else result
    output.square().mean().backward()
    return output.detach()


def results(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, then all gradients in the order of the parameters, then the input's if it wants one;
    in float64.
    """
    output = iterate(module, x)
    grads = [p.grad for p in (*module.parameters(), x) if p.requires_grad]
    return [t.double() for t in (output, *grads)]


def errors(ours: list[Tensor], reference: list[Tensor]) -> list[float]:
    """The relative difference of each tensor; infinity for what is not a number."""
    each = [float((a - b).norm() / b.norm()) for a, b in zip(ours, reference, strict=True)]
    return [math.inf if math.isnan(e) else e for e in each]


def checked(
    modules: dict[str, nn.Module], x: Tensor, reference: list[Tensor], dtype: str
) -> dict[str, float]:
    """The largest error of each contender.

    Raises:
        AssertionError: one is further from float64 than it may be.
    """
    off = {name: errors(results(module, x), reference) for name, module in modules.items()}
    tolerance, of_eager = TOLERANCES[dtype]
    for name, each in off.items():
        allowed = [of_eager if name == EAGER else max(tolerance, 2 * e) for e in off[EAGER]]
        worst, limit = max(zip(each, allowed, strict=True), key=lambda pair: pair[0] / pair[1])
        if worst > limit:
            raise AssertionError(
                f"{name} is {worst:.1e} from float64 in {dtype}, more than {limit:.1e}"
            )
    return {name: max(each) for name, each in off.items()}


class Form(msgspec.Struct, frozen=True):
    """One way to make a contender, tried: seconds until it was made and warm (less what its
    iterations take then), and one iteration.
    """

    name: str
    start_s: float
    ms: float


def prepare(make: Callable[[], nn.Module], x: Tensor, name: str = "") -> tuple[nn.Module, Form]:
    """A contender that has compiled what it compiles."""
    start = time.perf_counter()
    module = make()
    for _ in range(WARM_UP):
        iterate(module, x)
    spent = time.perf_counter() - start
    samples = []
    for _ in range(3):
        again = time.perf_counter()
        iterate(module, x)
        samples.append(time.perf_counter() - again)
    form = Form(
        name,
        max(0.0, spent - WARM_UP * statistics.median(samples)),
        1e3 * statistics.median(samples),
    )
    print(f"{name}: started in {form.start_s:.1f} s, {form.ms:.1f} ms", file=sys.stderr, flush=True)
    return module, form


def fastest(
    forms: dict[str, Callable[[], nn.Module]], x: Tensor
) -> tuple[nn.Module, Form, list[Form]]:
    """The fastest of the forms that a contender can have."""
    tried = {name: prepare(make, x, name) for name, make in forms.items()}
    module, best = min(tried.values(), key=lambda t: t[1].ms)
    return module, best, [form for _, form in tried.values()]


def fastest_chunk(
    make: Callable[[int], nn.Module], x: Tensor, chunks: list[int], limit: float
) -> tuple[nn.Module, Form, list[Form], list[str]]:
    """The fastest chunk of those that compile within `limit` seconds, and what was left out. The
    two smallest are tried whatever they take.
    """
    tried: dict[int, Form] = {}
    left_out: list[str] = []
    for chunk in sorted(set(chunks)):
        name = "compiled step" if chunk == 1 else f"compiled by {chunk} steps"
        if len(tried) > 1:  # compiling has a part that does not grow with the graph
            (one, early), (two, late) = ((c, tried[c].start_s) for c in list(tried)[-2:])
            expected = late + max(0.0, late - early) / (two - one) * (chunk - two)
            if expected > limit:
                left_out.append(
                    f"{name}: not tried, since it would take some {expected:.0f} s to compile"
                )
                continue
        # graphs of the one before would be asked at each call whether they fit
        torch._dynamo.reset()
        module, tried[chunk] = prepare(functools.partial(make, chunk), x, name)
    best = min(tried, key=lambda chunk: (tried[chunk].start_s > limit, tried[chunk].ms))
    if best != list(tried)[-1]:
        torch._dynamo.reset()
        module, _ = prepare(functools.partial(make, best), x, f"compiled by {best} again")
    return module, tried[best], list(tried.values()), left_out


def peak_memory(function: Callable[[], Any]) -> int:
    """Bytes that torch's CPU allocator had handed out during the call, at most, beyond what was
    there before.

    Every tensor's memory is seen, kernels' outputs among them; scratch memory that libraries take
    for themselves is not.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        with torch_profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            anchor = torch.empty(1, dtype=torch.uint8)  # tells the total from which to count
            function()
        trace.export_chrome_trace(str(file))
        events = [
            e
            for e in json.loads(file.read_text())["traceEvents"]
            if e["name"] == "[memory]" and e["args"]["Device Type"] == 0
        ]
    events.sort(key=lambda e: e["ts"])
    assert events[0]["args"]["Bytes"] == anchor.nbytes
    return int(
        max(e["args"]["Total Allocated"] for e in events) - events[0]["args"]["Total Allocated"]
    )


class Profile(msgspec.Struct, frozen=True):
    """Where the time of an iteration goes, in ms; the median round's. `others` lists what PyTorch
    ran beside matrix products: (operator, its own ms, calls). The rest is that, Python and
    autograd.
    """

    products_ms: float
    kernels_ms: float
    rest_ms: float
    kernel_calls: int
    others: list[tuple[str, float, int]]

    @property
    def shares(self) -> dict[str, float]:
        """Shares of the three parts."""
        parts = {
            "matrix products": self.products_ms,
            "lntune's kernels": self.kernels_ms,
            "the rest": self.rest_ms,
        }
        return {name: part / sum(parts.values()) for name, part in parts.items()}


class _Kernels:
    """Seconds in kernels, and calls of them."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def timed(self, call: Callable[..., Any], direct: bool) -> Callable[..., Any]:
        """The call, with its time added up. A direct call that finds no kernel gives None and is
        not counted.
        """

        def timed_call(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = call(*arguments)
            if result is not None or not direct:
                self.seconds += time.perf_counter() - start
                self.calls += 1
            return result

        return timed_call


class _TimedKernel:
    """A kernel that is timed; a table that wants its handle gets it."""

    def __init__(self, kernel: Any, kernels: _Kernels) -> None:
        self._kernel, self._call = kernel, kernels.timed(kernel, direct=False)

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)


@contextlib.contextmanager
def timed_kernels() -> Iterator[_Kernels]:
    """In the block every call of a kernel is timed, direct or not: all kernels are obtained again,
    and come from first_check.kernel.
    """
    kernels, obtain, remember = _Kernels(), first_check.kernel, Direct.remember
    node = layer_norm_node.ready, layer_norm_node.compile_once

    def remember_timed(self: Direct, *arguments: Any, **options: Any) -> None:
        remember(self, *arguments, **options)
        if self.ready and self._table is not None:
            self.call = kernels.timed(self._table.call, direct=True)

    try:
        first_check.kernel = lambda *arguments: _TimedKernel(obtain(*arguments), kernels)
        Direct.remember = remember_timed
        # C++ that calls kernels past Python
        layer_norm_node.ready = layer_norm_node.compile_once = lambda: False
        dispatch.reload()
        yield kernels
    finally:
        first_check.kernel, Direct.remember = obtain, remember
        layer_norm_node.ready, layer_norm_node.compile_once = node
        dispatch.reload()


def profile(function: Callable[[], Any], rounds: int = 5) -> Profile:
    """Where the time of `function` goes.

    A round is a call under timers around the kernels, which gives the whole and the kernels' part,
    and a call under torch.profiler, which gives the matrix products' own time: so what the profiler
    costs every other operator is not in the rest.
    """
    profiles = []
    with timed_kernels() as kernels:
        function()  # obtains the kernels
        function()
        for _ in range(rounds):
            kernels.seconds, kernels.calls = 0.0, 0
            start = time.perf_counter()
            function()
            whole, in_kernels, calls = (
                1e3 * (time.perf_counter() - start),
                1e3 * kernels.seconds,
                kernels.calls,
            )
            with torch_profile(activities=[ProfilerActivity.CPU]) as trace:
                function()
            own = [(e.key, e.self_cpu_time_total / 1e3, e.count) for e in trace.key_averages()]
            products = sum(ms for name, ms, _ in own if name in PRODUCTS)
            others = sorted(
                (o for o in own if o[0].startswith("aten::") and o[0] not in PRODUCTS),
                key=lambda o: -o[1],
            )
            profiles.append(
                Profile(
                    products,
                    in_kernels,
                    max(0.0, whole - products - in_kernels),
                    calls,
                    others[:10],
                )
            )
    return sorted(profiles, key=lambda p: p.shares["the rest"])[rounds // 2]


class Row(msgspec.Struct, frozen=True):
    """One contender. `ratio`: how many times faster lntune is, the median over rounds. `start_s`:
    compiling and what else comes first.
    """

    contender: str
    form: str
    ms: float
    ratio: float
    spread: float | None
    peak_mib: float
    start_s: float
    error: float


class Result(msgspec.Struct, frozen=True):
    """One dtype. `tried` has all forms of TorchScript and torch.compile."""

    dtype: str
    rows: list[Row]
    profile: Profile
    shares: dict[str, float]
    tried: list[Form]
    notes: list[str]
    busy: bool
    timings: dict[str, Timing]
    sequence: int
    batch: int


class Settings(msgspec.Struct, frozen=True):
    """Sizes, and how long to measure."""

    sequence: int = 100
    batch: int = 32
    hidden: int = 512
    input: int = 512
    layers: int = 2
    input_grad: bool = False
    rounds: int = 5
    seconds: float = 20.0
    chunks: tuple[int, ...] = ()  # none: without torch.compile
    limit: float = 120.0
    seed: int = 0


def run(settings: Settings, dtype_name: str) -> Result:
    """Make the contenders, check them against float64, time, weigh and profile them.

    Raises:
        AssertionError: a contender does not compute what the others do.
    """
    torch.manual_seed(settings.seed)
    dtype = getattr(torch, dtype_name)
    source = lntune_module((settings.input, settings.hidden, settings.layers), dtype)
    x = (
        torch.randn(settings.sequence, settings.batch, settings.input)
        .to(dtype)
        .requires_grad_(settings.input_grad)
    )
    reference = results(
        eager_modules(source, torch.float64),
        x.detach().double().requires_grad_(settings.input_grad),
    )
    modules: dict[str, nn.Module] = {}
    chosen: dict[str, Form] = {}
    notes: list[str] = []
    with kept_heap():
        modules[EAGER], chosen[EAGER] = prepare(
            lambda: eager_modules(source), x, "looped, input hoisted"
        )
        if dtype == torch.float32 and products.onednn_pays():  # otherwise they are PyTorch's
            make = functools.partial(eager_modules, source, cell=OurProductsCell)
            modules[EAGER_OUR_PRODUCTS], chosen[EAGER_OUR_PRODUCTS] = prepare(
                make, x, "looped, input hoisted"
            )
        scripts = {
            "input hoisted": lambda: scripted(source),
            "input step by step": lambda: scripted(source, hoisted=False),
        }
        modules["TorchScript"], chosen["TorchScript"], tried = fastest(scripts, x)
        if settings.chunks:
            best, form, forms, notes = fastest_chunk(
                lambda chunk: compiled(source, chunk), x, list(settings.chunks), settings.limit
            )
            modules["torch.compile"], chosen["torch.compile"], tried = best, form, [*tried, *forms]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", dispatch.UntunedWarning)
            modules["lntune"], chosen["lntune"] = prepare(lambda: source, x, "LayerNormLSTM")
        notes += [str(w.message) for w in caught if issubclass(w.category, dispatch.UntunedWarning)]
        off = checked(modules, x, reference, dtype_name)
        calls = {name: functools.partial(iterate, module, x) for name, module in modules.items()}
        measured = timing.quietest(
            lambda: timing.measure(calls, settings.seconds, settings.rounds, settings.seed),
            attempts=2,
        )
        for module in modules.values():
            module.zero_grad()
        peaks = {name: peak_memory(call) for name, call in calls.items()}
        profiled = profile(calls["lntune"])
    rows = []
    for name, t in measured.timings.items():
        ratio, form = timing.ratio(t, measured.timings["lntune"]), chosen[name]
        rows.append(
            Row(
                name,
                form.name,
                t.median_us / 1e3,
                ratio,
                spread(t),
                peaks[name] / 2**20,
                form.start_s,
                off[name],
            )
        )
    return Result(
        dtype_name,
        rows,
        profiled,
        profiled.shares,
        tried,
        notes,
        measured.busy,
        measured.timings,
        settings.sequence,
        settings.batch,
    )


def show(screen: Console, settings: Settings, result: Result) -> None:
    """The table of contenders, what else was tried, and the profile."""
    s = settings
    wants = "a" if s.input_grad else "no"
    title = (
        f"Training iteration of {s.layers} layers, sequence {s.sequence}, batch {s.batch}, input"
        f" {s.input}, hidden {s.hidden}, {result.dtype}; forward, loss, backward; no optimizer's"
        f" step, {wants} gradient of the input"
    )
    ranks = {
        "ms": 0,
        "lntune faster": 0,
        "spread": 3,
        "peak MiB": 0,
        "start s": 2,
        "off float64": 1,
    }
    columns = [
        *key("contender"),
        Column("form", 1, right=False),
        *(Column(name, rank) for name, rank in ranks.items()),
    ]
    table = Table(title, columns)
    for r in result.rows:
        ms = f"{r.ms:.1f}{'*' if result.busy else ''}"
        cells = (
            ms,
            f"{r.ratio:.2f}x",
            percent(r.spread),
            f"{r.peak_mib:.1f}",
            f"{r.start_s:.1f}",
            f"{r.error:.1e}",
        )
        table.add(r.contender, r.form, *cells)
    screen.print(table)
    if result.busy:
        screen.print(
            "* disturbed by other work on the machine: neither times nor ratios hold, measure again"
        )
    tolerance, of_eager = TOLERANCES[result.dtype]
    screen.print(
        f"Output and every gradient are within {tolerance:.0e} of float64's (Euclidean norms) or"
        f" twice what eager mode is off there, which itself is within {of_eager:.0e}."
    )
    screen.print(
        "Tried: "
        + "; ".join(f"{f.name} {f.ms:.1f} ms, start {f.start_s:.1f} s" for f in result.tried)
    )
    for note in result.notes:
        screen.print(note)
    split = ", ".join(f"{name} {100 * share:.1f} %" for name, share in result.shares.items())
    p = result.profile
    screen.print(
        f"lntune's iteration: {split} (of {p.products_ms + p.kernels_ms + p.rest_ms:.1f} ms, with"
        f" {p.kernel_calls} calls of kernels)"
    )
    screen.print(
        "Other operators, as torch.profiler sees them: "
        + ", ".join(f"{name} {ms:.1f} ms in {calls}" for name, ms, calls in p.others)
    )


def main(
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float64; several with commas.")
    ] = "float32,bfloat16",
    sequence: Annotated[str, typer.Option(help="Steps; several with commas.")] = str(
        Settings().sequence
    ),
    batch: Annotated[str, typer.Option(help="Rows of a step; several with commas.")] = str(
        Settings().batch
    ),
    hidden: int = Settings().hidden,
    input: Annotated[int, typer.Option(help="Features of the input; 0: as hidden.")] = 0,
    layers: int = Settings().layers,
    input_grad: Annotated[
        bool,
        typer.Option("--input-grad", help="The input wants a gradient, as behind an embedding."),
    ] = False,
    seconds: Annotated[
        float, typer.Option(help="Time for the timing of each dtype.")
    ] = Settings().seconds,
    rounds: Annotated[int, typer.Option(help="At least.")] = Settings().rounds,
    chunks: Annotated[
        str,
        typer.Option(
            help=(
                "Steps that torch.compile gets at once; the fastest counts. Empty: without"
                " torch.compile."
            )
        ),
    ] = CHUNKS,
    limit: Annotated[
        float, typer.Option(help="Seconds that compiling may take.")
    ] = Settings().limit,
    seed: int = Settings().seed,
    output: Annotated[
        Path | None,
        typer.Option(
            help=(
                "Folder for lnlstm_training.json and lnlstm_training.txt; where there are several"
                " sequences or batches, lnlstm_scaling.json and .txt."
            )
        ),
    ] = None,
) -> None:
    """Training iterations of LSTMs with layer normalization, lntune against PyTorch."""
    sizes = [(int(s), int(b)) for s in sequence.split(",") for b in batch.split(",")]
    settings = Settings(
        *sizes[0],
        hidden,
        input or hidden,
        layers,
        input_grad,
        rounds,
        seconds,
        tuple(int(c) for c in chunks.split(",") if c),
        limit,
        seed,
    )
    screen = Console(
        record=True, highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDE
    )
    screen.print(
        f"{device.current().slug}, {torch.get_num_threads()} threads, "
        + ", ".join(f"{k} {v}" for k, v in toolchain.versions().items())
    )
    outcomes = []
    # A cache of its own for inductor, so that compiling is not finding what an earlier run
    # compiled.
    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache),
    ):
        for name, (steps, rows) in itertools.product(dtype.split(","), sizes):
            sized = msgspec.structs.replace(settings, sequence=steps, batch=rows)
            outcomes.append(run(sized, name))
            show(screen, sized, outcomes[-1])
            if output is not None:  # after each: what was measured outlives what ends the rest
                facts = {
                    "threads": torch.get_num_threads(),
                    "settings": settings,
                    "results": outcomes,
                }
                several = len(sizes) > 1
                keep(output, "lnlstm_scaling" if several else "lnlstm_training", screen, facts)


if __name__ == "__main__":
    typer.run(main)
