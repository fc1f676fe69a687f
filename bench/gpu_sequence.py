"""An LN-LSTM of one layer over a sequence of many steps on a GPU: lntune's layer, under CUDA
graphs, against the eager loop.

    python bench/gpu_sequence.py [--target cuda] [--batch 64,256,1024] [--hidden 512,1024,2048]
                                 [--output FOLDER]

A loop of small kernels on a GPU is bound by launches: eager mode takes some ten of them a step.
`lntune.LayerNormLSTM` takes two (a matrix product and a fused step) and captures the loop in a CUDA
graph when shapes repeat. To tell the two apart the eager loop is measured under a CUDA graph, too.
All have the same parameters and are compared before they are timed; times are by the wall clock,
from an idle device to an idle device. Every case is written as soon as it is measured.

What lntune's graphs copy is counted beside: at first every input and output of a replay, and in the
end what does not lie where it lay before (see lntune/torch/graphs.py).
"""

from __future__ import annotations

import datetime
import functools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
import typer
from lnlstm_training import eager_modules, errors, iterate, lntune_module, results
from rich.console import Console
from torch import Tensor, nn

from lntune import timing
from lntune.backends.cuda.capture import record
from lntune.report import tables
from lntune.report.columns import WIDE, Column, Table, key
from lntune.report.rows import geomean
from lntune.system import toolchain
from lntune.torch import devices, dispatch, graphs

# How far the output, and each gradient, may be from the eager loop's in float64, as |difference| /
# |float64's| in Euclidean norms, where the eager loop's own distance is less than half of it (else
# twice that).
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.05}
MODES = ("inference", "training")
OURS, EAGER, GRAPH = "lntune", "eager loop", "eager loop in a CUDA graph"


class Settings(msgspec.Struct, frozen=True):
    """Steps of the sequence, and seconds and rounds of the timing of a case."""

    sequence: int = 100
    seconds: float = 2.0
    rounds: int = 5
    seed: int = 0


class Case(msgspec.Struct, frozen=True):
    """Sizes of one comparison; the input is as wide as the hidden state."""

    mode: str
    dtype: str
    batch: int
    hidden: int

    def __str__(self) -> str:
        return f"{self.mode} {self.dtype} batch {self.batch} hidden {self.hidden}"


class Result(msgspec.Struct, frozen=True):
    """Milliseconds of a sequence by contender, how many times faster lntune is than each, what was
    left out and why, and the bytes that lntune's graphs copied for a sequence, at first and in the
    end.
    """

    case: Case
    ms: dict[str, float]
    faster: dict[str, float]
    off: dict[str, float]
    notes: list[str]
    timings: dict[str, timing.Timing]
    busy: bool
    copied: tuple[int, int]


def copied(call: Callable[[], Any], calls: int) -> tuple[int, int]:
    """The bytes that graphs copied for a call, the first time that they served it and after so many
    calls more; zeros where there are none.
    """
    graphs.forget()
    replays, counted = graphs.traffic.replays, []
    for _ in range(3):
        call()
    if graphs.traffic.replays == replays:
        return 0, 0
    for _ in range(calls):
        before = graphs.traffic.bytes
        call()
        counted.append(graphs.traffic.bytes - before)
    return next(filter(None, counted), 0), counted[-1]


def synchronized(call: Callable[[], Any], place: torch.device) -> Callable[[], Any]:
    """The call, and the wait for the device to be done with it."""
    if place.type != "cuda":
        return call

    def run() -> None:
        call()
        torch.cuda.synchronize(place)

    return run


def graphed(call: Callable[[], Any], place: torch.device) -> Callable[[], Any]:
    """The call recorded once, to be replayed.

    Raises:
        RuntimeError: it does something that cannot be recorded.
    """
    stream = torch.cuda.Stream(place)
    stream.wait_stream(torch.cuda.current_stream(place))
    # whatever is allocated or chosen at first calls is behind before the recording
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream(place).wait_stream(stream)
    with torch.cuda.device(place):
        return record(call, stream)


def checked(
    modules: dict[str, nn.Module], source: nn.Module, x: Tensor, case: Case
) -> dict[str, float]:
    """The largest distance from float64 of each contender's output and, in training, gradients.

    Raises:
        AssertionError: one is further off than it may be.
    """
    exact = eager_modules(source, torch.float64)

    def evaluate(module: nn.Module, given: Tensor) -> list[Tensor]:
        if case.mode == "training":
            return results(module, given)
        with torch.inference_mode():
            output = module(given)
        return [(output[0] if isinstance(output, tuple) else output).double()]

    reference = evaluate(exact, x.double())
    off = {name: errors(evaluate(module, x), reference) for name, module in modules.items()}
    allowed = [max(TOLERANCES[case.dtype], 2 * e) for e in off[EAGER]]
    for name, each in off.items():
        if name != EAGER and any(e > limit for e, limit in zip(each, allowed, strict=True)):
            raise AssertionError(
                f"{name} is {max(each):.1e} from float64 in {case}, more than {max(allowed):.1e}"
            )
    return {name: max(each) for name, each in off.items()}


def measure(case: Case, settings: Settings, place: torch.device) -> Result:
    """One comparison.

    Raises:
        AssertionError: a contender does not compute what the others do.
    """
    torch.manual_seed(settings.seed)
    dtype = getattr(torch, case.dtype)
    source = lntune_module((case.hidden, case.hidden, 1), dtype).to(place)
    x = torch.randn(settings.sequence, case.batch, case.hidden).to(place, dtype)
    modules: dict[str, nn.Module] = {EAGER: eager_modules(source), OURS: source}
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        off = checked(modules, source, x, case)
        notes += sorted(
            {
                str(w.message)
                for w in caught
                if issubclass(w.category, (dispatch.UntunedWarning, RuntimeWarning))
            }
        )
    step = iterate if case.mode == "training" else _infer
    calls = {name: functools.partial(step, module, x) for name, module in modules.items()}
    contenders = {name: synchronized(call, place) for name, call in calls.items()}
    if place.type == "cuda":
        try:
            contenders[GRAPH] = synchronized(graphed(calls[EAGER], place), place)
        except RuntimeError as e:
            notes.append(f"{GRAPH}: cannot be recorded: {e}")
    moved = copied(calls[OURS], 40 if place.type == "cuda" else 8)
    measured = timing.measure(contenders, settings.seconds, settings.rounds, settings.seed)
    times = measured.timings
    faster = {name: timing.ratio(t, times[OURS]) for name, t in times.items() if name != OURS}
    return Result(
        case,
        {name: t.median_us / 1e3 for name, t in times.items()},
        faster,
        off,
        notes,
        times,
        measured.busy,
        moved,
    )


def _infer(module: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        module(x)


def table(results_: list[Result], settings: Settings) -> Table:
    """One line per comparison."""
    figures = [
        Column(name)
        for name in (
            "batch",
            "hidden",
            EAGER,
            GRAPH,
            OURS,
            "over the loop",
            "over its graph",
            "copied",
        )
    ]
    comparison = Table(
        f"one-layer LN-LSTM, sequence {settings.sequence}, ms from idle to idle; MiB that graphs"
        " copy for a sequence, at first and in the end",
        [*key("mode", "dtype"), *figures],
    )
    for r in results_:
        times = [f"{r.ms[name]:.3f}" if name in r.ms else "-" for name in (EAGER, GRAPH, OURS)]
        ratios = [f"{r.faster[name]:.2f}x" if name in r.faster else "-" for name in (EAGER, GRAPH)]
        comparison.add(
            r.case.mode,
            r.case.dtype,
            str(r.case.batch),
            str(r.case.hidden),
            *times,
            *ratios,
            " -> ".join(f"{size / 2**20:.1f}" for size in r.copied),
        )
    return comparison


def write(
    folder: Path,
    results_: list[Result],
    failed: dict[str, str],
    settings: Settings,
    place: torch.device,
) -> None:
    """gpu_sequence.json and gpu_sequence.txt as things stand."""
    screen = Console(record=True, file=sys.stderr, width=WIDE, highlight=False)
    screen.print(table(results_, settings))
    overall = {name: geomean(r.faster.get(name) for r in results_) for name in (EAGER, GRAPH)}
    for name, ratio in overall.items():
        if ratio is not None:
            screen.print(f"geomean {ratio:.2f}x over the {name}")
    for what, why in (
        *failed.items(),
        *((str(r.case), note) for r in results_ for note in r.notes),
    ):
        screen.print(f"{what}: {why}", markup=False)
    facts = {
        "device": devices.of(place),
        "place": str(place),
        "versions": toolchain.versions(),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "settings": settings,
        "geomean": overall,
        "results": results_,
        "failed": failed,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu_sequence.json").write_bytes(
        msgspec.json.format(msgspec.json.encode(facts), indent=1) + b"\n"
    )
    (folder / "gpu_sequence.txt").write_text(screen.export_text())


def main(
    target: Annotated[str, typer.Option(help="cuda, cuda:1, or cpu for trying this out.")] = "cuda",
    batch: str = "256,64,1024",
    hidden: str = "1024,512,2048",
    dtype: str = "float32,bfloat16",
    mode: Annotated[
        str, typer.Option(help="inference, training or both, separated by a comma.")
    ] = ",".join(MODES),
    sequence: int = Settings().sequence,
    seconds: Annotated[
        float, typer.Option(help="Time for the timing of each case.")
    ] = Settings().seconds,
    rounds: Annotated[int, typer.Option(help="At least.")] = Settings().rounds,
    seed: int = Settings().seed,
    output: Annotated[
        Path | None, typer.Option(help="Folder for gpu_sequence.json and gpu_sequence.txt.")
    ] = None,
) -> None:
    """Sequences of an LN-LSTM on a GPU, lntune against the eager loop."""
    place = torch.device(target)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(
            "there is no CUDA device (torch.cuda.is_available() is False)", param_hint="--target"
        )
    settings = Settings(sequence, seconds, rounds, seed)
    sizes = [(b, h) for h in map(int, hidden.split(",")) for b in map(int, batch.split(","))]
    done: list[Result] = []
    failed: dict[str, str] = {}
    for case in (
        Case(m, d, b, h) for b, h in sizes for m in mode.split(",") for d in dtype.split(",")
    ):
        print(f"{case} ...", file=sys.stderr, flush=True)
        try:
            done.append(measure(case, settings, place))
        except Exception as e:  # the others are worth having; the exit code says that one failed
            failed[str(case)] = f"{type(e).__name__}: {e}"
        if output is not None:
            write(output, done, failed, settings, place)
    console = tables.console()
    console.print(table(done, settings))
    for what, why in failed.items():
        console.print(f"FAILED {what}: {why}", markup=False)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
