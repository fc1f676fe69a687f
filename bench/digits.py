"""Recurrent classifiers of handwritten digits: torch.nn.LSTM, an LSTM with layer normalization in
eager mode, lntune.LayerNormLSTM.

    pip install -e '.[bench]'
    python bench/digits.py [--seeds 5] [--hidden 128] [--updates 400] [--batch 32] [--output FOLDER]

The data are the 1,797 images of 8x8 pixels that scikit-learn ships
(`sklearn.datasets.load_digits`), in 0..1, read row by row: 8 steps of 8 features, classified from
the last h by a linear layer; Adam, cross entropy. Two claims are looked at: layer normalization
needs fewer updates to a given validation loss (Ba, Kiros, Hinton: *Layer Normalization*, 2016,
arXiv:1607.06450), and lntune.LayerNormLSTM learns what the same cell does in eager mode, up to
rounding, in less time.

Within a seed everyone has the same split, batches, order of batches, initial matrices and
classifier. Learning rates are chosen from one grid for everyone, on seeds that are not reported.
Contenders train in turn, a few updates each in random order, so that what else the machine does
hits all alike. Rounding grows in training, as any small difference does: the yardstick is an eager
run whose initial weights were all moved to a neighbouring float32.
"""

from __future__ import annotations

import copy
import datetime
import importlib.util
import io
import math
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

import lntune
from lntune import device, timing
from lntune.report.columns import WIDE, Column, Table
from lntune.system import toolchain
from lntune.torch.lstm_weights import from_lstm

LSTM, EAGER, OURS, MOVED = (
    "nn.LSTM",
    "LN-LSTM, eager",
    "lntune.LayerNormLSTM",
    "LN-LSTM, eager, moved by a rounding",
)
CONTENDERS = (LSTM, EAGER, OURS, MOVED)
FEATURES, CLASSES = 8, 10
EVERY = 10  # updates between two evaluations, and a contender's turn
VALIDATION = 0.2  # share of the images
Say = Callable[[str], None]
SWEEP_SEED = 1000  # the first of those on which learning rates are chosen


class Settings(msgspec.Struct, frozen=True):
    """What is trained, and how often. `targets` are validation losses to be reached."""

    seeds: int = 5
    hidden: int = 128
    updates: int = 400
    batch: int = 32
    rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03)
    sweep_seeds: int = 3
    targets: tuple[float, ...] = (0.5, 0.2, 0.1)


class Curve(msgspec.Struct):
    """One contender's run of one seed. `losses` and `accuracies` are on the validation images,
    after 0, EVERY, 2 EVERY, ... updates; `seconds` are those of each turn of EVERY updates:
    forward, backward and Adam's step, without evaluations.
    """

    losses: list[float] = []
    accuracies: list[float] = []
    seconds: list[float] = []

    def reached(self, target: float) -> float:
        """Updates to the first evaluation with a validation loss of `target` or less; inf:
        never.
        """
        return next((i * EVERY for i, loss in enumerate(self.losses) if loss <= target), math.inf)

    def seconds_to(self, target: float) -> float:
        """Seconds of training to that evaluation; inf: never."""
        updates = self.reached(target)
        return updates if math.isinf(updates) else sum(self.seconds[: int(updates) // EVERY])

    def difference(self, other: Curve, updates: int) -> float:
        """The largest difference between the validation losses of two runs within `updates`."""
        return max(
            abs(a - b)
            for a, b in list(zip(self.losses, other.losses, strict=True))[: updates // EVERY + 1]
        )


class EagerLayerNormLSTM(nn.Module):
    """lntune.LayerNormLSTM's defaults, one layer, in PyTorch's operators, with a copy of its
    parameters (Ba, Kiros, Hinton 2016, eqs. 20-22).

    As there, the input's part of all steps is one product and one layer norm; b is added in the
    latter, where it costs nothing.
    """

    def __init__(self, like: lntune.LayerNormLSTM) -> None:
        super().__init__()
        self.hidden, self.eps = like.hidden_size, like.eps
        for name, p in like.named_parameters():
            self.register_parameter(name, nn.Parameter(p.detach().clone()))

    def forward(self, x: Tensor) -> tuple[None, tuple[Tensor, Tensor]]:
        """(None, (h_n, c_n)) of x (time, batch, features), both (1, batch, hidden)."""
        gates, width = (4 * self.hidden,), (self.hidden,)
        bias_x = self.ln_ih_bias_l0 + self.bias_l0
        parts = functional.layer_norm(
            functional.linear(x, self.weight_ih_l0), gates, self.ln_ih_weight_l0, bias_x, self.eps
        )
        h = c = x.new_zeros(x.shape[1], self.hidden)
        for part in parts.unbind():
            product = functional.linear(h, self.weight_hh_l0)
            z = part + functional.layer_norm(
                product, gates, self.ln_hh_weight_l0, self.ln_hh_bias_l0, self.eps
            )
            i, f, g, o = z.chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(
                functional.layer_norm(c, width, self.ln_c_weight_l0, self.ln_c_bias_l0, self.eps)
            )
        return None, (h[None], c[None])


class Classifier(nn.Module):
    """A recurrent layer, and a linear one on its last h."""

    def __init__(self, rnn: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.rnn, self.head = rnn, copy.deepcopy(head)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, CLASSES) of x (time, batch, features)."""
        _, (h, _) = self.rnn(x)
        return self.head(h[-1])  # type: ignore[no-any-return]


class Data(msgspec.Struct):
    """Images as (8 steps, images, 8 features) and labels, both in two parts; `indices` are those
    parts' places in the data set.
    """

    x: Tensor
    y: Tensor
    x_valid: Tensor
    y_valid: Tensor
    indices: tuple[list[int], list[int]]


def load(seed: int) -> Data:
    """The seed's split, a fifth of every class for validation."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    x, y = (
        torch.from_numpy(digits.images / 16).float().transpose(0, 1).contiguous(),
        torch.from_numpy(digits.target).long(),
    )
    train, valid = (
        sorted(map(int, part))
        for part in train_test_split(
            np.arange(len(y)), test_size=VALIDATION, stratify=digits.target, random_state=seed
        )
    )
    return Data(
        x[:, train].contiguous(), y[train], x[:, valid].contiguous(), y[valid], (train, valid)
    )


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Indices of one batch after the other, each epoch in a new order; what does not fill a batch
    waits for its next epoch's.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator)[: count // size * size].split(size)


def moved(model: Any, seed: int) -> Any:
    """The same model with every parameter moved to a neighbouring float32, up or down by chance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.nextafter(p, p + torch.randn(p.shape, generator=generator)))
    return model


def classifiers(hidden: int, seed: int) -> dict[str, Classifier]:
    """All contenders, from the same matrices; LSTMs with layer normalization have all their
    parameters in common.
    """
    torch.manual_seed(seed)
    lstm, head = nn.LSTM(FEATURES, hidden), nn.Linear(hidden, CLASSES)
    ours = from_lstm(lstm)
    rnns = {
        LSTM: lstm,
        EAGER: EagerLayerNormLSTM(ours),
        OURS: ours,
        MOVED: EagerLayerNormLSTM(ours),
    }
    contenders = {name: Classifier(rnn, head) for name, rnn in rnns.items()}
    moved(contenders[MOVED], seed)
    return contenders


def train(
    models: dict[str, Classifier],
    rates: dict[str, float],
    data: Data,
    settings: Settings,
    seed: int,
) -> dict[str, Curve]:
    """Train the models in place, in turns of EVERY updates, all on the same batches, with Adam at
    each one's learning rate.
    """
    optimizers = {
        name: torch.optim.Adam(model.parameters(), lr=rates[name]) for name, model in models.items()
    }
    curves = {name: Curve() for name in models}
    order, stream = random.Random(seed), batches(len(data.y), settings.batch, seed)

    def gradients(name: str, chosen: Tensor) -> None:
        optimizers[name].zero_grad()
        functional.cross_entropy(models[name](data.x[:, chosen]), data.y[chosen]).backward()

    def evaluate(name: str) -> None:
        with torch.no_grad():
            logits = models[name](data.x_valid)
        curves[name].losses.append(functional.cross_entropy(logits.double(), data.y_valid).item())
        curves[name].accuracies.append((logits.argmax(1) == data.y_valid).double().mean().item())

    for name in models:
        # loads kernels; no step, so nothing is learnt
        gradients(name, torch.arange(settings.batch))
        evaluate(name)
    for _ in range(settings.updates // EVERY):
        turn = [next(stream) for _ in range(EVERY)]
        for name in order.sample(list(models), len(models)):
            start = time.perf_counter()
            for chosen in turn:
                gradients(name, chosen)
                optimizers[name].step()
            curves[name].seconds.append(time.perf_counter() - start)
        for name in models:
            evaluate(name)
    return curves


class Tried(msgspec.Struct):
    """A contender at a learning rate of the grid: the mean validation loss of a run, and the
    updates to each target (inf: never); medians over the sweep's seeds.
    """

    contender: str
    rate: float
    loss: float
    reached: list[float]


def sweep(settings: Settings, say: Say) -> list[Tried]:
    """Train nn.LSTM and the eager LN-LSTM at every learning rate, on seeds that are not
    reported.
    """
    tried = []
    for rate in settings.rates:
        runs = []
        for seed in range(SWEEP_SEED, SWEEP_SEED + settings.sweep_seeds):
            models = classifiers(settings.hidden, seed)
            say(f"learning rate {rate:g}, seed {seed}")
            runs.append(
                train(
                    {n: models[n] for n in (LSTM, EAGER)},
                    dict.fromkeys(CONTENDERS, rate),
                    load(seed),
                    settings,
                    seed,
                )
            )
        for name in (LSTM, EAGER):
            loss = statistics.median(statistics.fmean(r[name].losses) for r in runs)
            tried.append(
                Tried(
                    name,
                    rate,
                    loss,
                    [statistics.median(r[name].reached(t) for r in runs) for t in settings.targets],
                )
            )
    return tried


def choose(tried: Sequence[Tried], settings: Settings) -> dict[str, float]:
    """Everyone's learning rate: the one with the lowest mean validation loss. LSTMs with layer
    normalization share it.
    """
    if not tried:
        return dict.fromkeys(CONTENDERS, settings.rates[0])
    best = {
        name: min((t for t in tried if t.contender == name), key=lambda t: t.loss).rate
        for name in (LSTM, EAGER)
    }
    return {name: best[LSTM if name == LSTM else EAGER] for name in CONTENDERS}


class Row(msgspec.Struct):
    """A contender over all seeds; triples are (median, least, most). `over_eager`: eager's seconds
    over its own, the median over turns. `early`, `whole`: the largest difference to eager's
    validation losses within a quarter of the updates, and within all.
    """

    contender: str
    rate: float
    reached: list[tuple[float, float, float]]
    not_reached: list[int]
    seconds_to: list[tuple[float, float, float]]
    loss: tuple[float, float, float]
    accuracy: tuple[float, float, float]
    seconds: tuple[float, float, float]
    over_eager: float
    early: tuple[float, float, float]
    whole: tuple[float, float, float]


class Result(msgspec.Struct):
    """All of a run, as it is written to digits.json; inf there is null."""

    settings: Settings
    device: str
    versions: dict[str, str]
    threads: int
    time: str
    sweep: list[Tried]
    rates: dict[str, float]
    rows: list[Row]
    others: float | None
    busy: bool
    notes: list[str]
    curves: dict[str, list[Curve]]


def triple(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, least, most)."""
    return statistics.median(values), min(values), max(values)


def summarize(
    curves: dict[str, list[Curve]], rates: dict[str, float], settings: Settings
) -> list[Row]:
    """The table's rows."""
    rows = []
    for name, runs in curves.items():
        reached = [[run.reached(target) for run in runs] for target in settings.targets]
        pairs = list(zip(runs, curves[EAGER], strict=True))
        rows.append(
            Row(
                contender=name,
                rate=rates[name],
                reached=[triple(r) for r in reached],
                not_reached=[sum(map(math.isinf, r)) for r in reached],
                seconds_to=[
                    triple([run.seconds_to(target) for run in runs]) for target in settings.targets
                ],
                loss=triple([run.losses[-1] for run in runs]),
                accuracy=triple([run.accuracies[-1] for run in runs]),
                seconds=triple([sum(run.seconds) for run in runs]),
                over_eager=statistics.median(
                    e / s
                    for run, eager in pairs
                    for e, s in zip(eager.seconds, run.seconds, strict=True)
                ),
                early=triple(
                    [run.difference(eager, settings.updates // 4) for run, eager in pairs]
                ),
                whole=triple([run.difference(eager, settings.updates) for run, eager in pairs]),
            )
        )
    return rows


def run(settings: Settings, say: Say) -> Result:
    """Choose learning rates, then train everyone on every seed."""
    contention = timing.Contention()
    # a kernel that was not tuned for this size is a note
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        tried = sweep(settings, say) if len(settings.rates) > 1 else []
        rates = choose(tried, settings)
        curves: dict[str, list[Curve]] = {name: [] for name in CONTENDERS}
        for seed in range(settings.seeds):
            say(f"seed {seed}")
            for name, curve in train(
                classifiers(settings.hidden, seed), rates, load(seed), settings, seed
            ).items():
                curves[name].append(curve)
    others = contention.share()
    edges = [
        n for n in (LSTM, EAGER) if tried and rates[n] in (min(settings.rates), max(settings.rates))
    ]
    notes = [
        f"{name}: the best learning rate is at the edge of the grid; one beyond it may be better"
        for name in edges
    ]
    return Result(
        settings=settings,
        device=device.current().slug,
        versions={**toolchain.versions(), "scikit-learn": toolchain.installed("scikit-learn")},
        threads=torch.get_num_threads(),
        time=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        sweep=tried,
        rates=rates,
        rows=summarize(curves, rates, settings),
        others=others,
        busy=(others or 0) > timing.BUSY_SHARE,
        notes=[*notes, *dict.fromkeys(str(w.message) for w in caught)],
        curves=curves,
    )


def spread(values: tuple[float, float, float], form: str = ".3f") -> str:
    """A median with the least and the most."""
    middle, low, high = ("never" if math.isinf(v) else format(v, form) for v in values)
    return f"{middle} ({low}..{high})"


def table(title: str, *names: str) -> Table:
    """An empty table; all columns but the first are figures."""
    return Table(title, [Column(name, right=i > 0) for i, name in enumerate(names)])


def tables(result: Result) -> list[Table | str]:
    """What was learnt, how long it took and how far rounding went, the learning rates tried; and
    notes.
    """
    s = result.settings
    to = [f"updates to {t:g}" for t in s.targets]
    differences = f"difference, {s.updates // 4} updates", f"{s.updates} updates"
    learnt = table(
        "Validation loss: median (least..most) over the seeds",
        "contender",
        "rate",
        *to,
        "loss at the end",
        "accuracy at the end",
    )
    times = table(
        "Seconds of training, and the largest difference to the eager LN-LSTM's validation loss",
        *(
            "contender",
            f"s, {s.updates} updates",
            "eager / its",
            *(f"s to {t:g}" for t in s.targets),
            *differences,
        ),
    )
    rates = table(
        "Learning rates (* chosen): mean validation loss of a run; medians over other seeds",
        "contender",
        "rate",
        "mean loss",
        *to,
    )
    parts: list[Table | str] = [
        (
            f"{s.seeds} seeds, hidden {s.hidden}, batch {s.batch}, {result.threads} thread(s),"
            f" evaluated every {EVERY} updates; {result.device}"
        ),
        learnt,
        times,
    ]
    for row in result.rows:
        missed = [f", {s.seeds - n} of {s.seeds}" if n else "" for n in row.not_reached]
        reached = [spread(r, ".0f") + m for r, m in zip(row.reached, missed, strict=True)]
        learnt.add(row.contender, f"{row.rate:g}", *reached, spread(row.loss), spread(row.accuracy))
        far = [
            spread(d, ".1e") if row.contender in (OURS, MOVED) else "-"
            for d in (row.early, row.whole)
        ]
        times.add(
            row.contender,
            spread(row.seconds, ".2f"),
            f"{row.over_eager:.2f}x",
            *(spread(t, ".2f") for t in row.seconds_to),
            *far,
        )
    for t in result.sweep:
        chosen = "*" if t.rate == result.rates[t.contender] else ""
        rates.add(
            t.contender,
            f"{t.rate:g}{chosen}",
            f"{t.loss:.3f}",
            *("never" if math.isinf(r) else f"{r:.0f}" for r in t.reached),
        )
    parts += [rates] if result.sweep else []
    parts += (
        [
            f"others used {result.others:.0%} of the machine meanwhile: neither ratios nor seconds"
            " hold"
        ]
        if result.busy and result.others
        else []
    )
    return [*parts, *(f"note: {note}" for note in result.notes)]


def plot(result: Result, path: Path) -> None:
    """Validation loss over updates and over seconds, and what rounding does to it: medians, and
    bands from the least to the most.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    s = result.settings
    updates = np.arange(0, s.updates + 1, EVERY)
    figure, (by_updates, by_seconds, distances) = plt.subplots(
        1, 3, figsize=(15, 5), layout="constrained"
    )
    styles = {
        LSTM: ("tab:gray", "-"),
        EAGER: ("tab:blue", "-"),
        OURS: ("tab:red", "--"),
        MOVED: ("tab:blue", ":"),
    }

    def draw(axes: Any, name: str, x: Any, values: list[list[float]], label: str) -> None:
        color, line = styles[name]
        axes.plot(x, np.median(values, axis=0), line, color=color, label=label)
        axes.fill_between(
            x, np.min(values, axis=0), np.max(values, axis=0), color=color, alpha=0.15, linewidth=0
        )

    for name in (LSTM, EAGER, OURS):
        runs = result.curves[name]
        losses = [run.losses for run in runs]
        seconds = np.median([np.cumsum([0.0, *run.seconds]) for run in runs], axis=0)
        label = f"{name} (rate {result.rates[name]:g})"
        draw(by_updates, name, updates, losses, label)
        draw(by_seconds, name, seconds, losses, label)
    for name in (OURS, MOVED):
        pairs = zip(result.curves[name], result.curves[EAGER], strict=True)
        draw(
            distances,
            name,
            updates,
            [
                [abs(a - b) for a, b in zip(run.losses, eager.losses, strict=True)]
                for run, eager in pairs
            ],
            name,
        )
    for axes, title, x, y in (
        (by_updates, "Loss by updates", "updates", "validation loss (nats)"),
        (
            by_seconds,
            "Loss by time",
            "training time (s; forward, backward, Adam)",
            "validation loss (nats)",
        ),
        (
            distances,
            "Rounding: distance from the eager LN-LSTM",
            "updates",
            "difference of validation losses (nats)",
        ),
    ):
        axes.set(title=title, xlabel=x, ylabel=y, yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(
        f"LSTMs with and without layer normalization on handwritten digits (hidden {s.hidden},"
        f" batch {s.batch}): median of {s.seeds} seeds, band from least to most"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(result: Result, folder: Path) -> str:
    """Write digits.json, digits.txt and digits.png, and return the text."""
    text = io.StringIO()
    out = Console(file=text, width=WIDE, highlight=False)
    for part in tables(result):
        out.print(part, markup=False)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "digits.json").write_bytes(
        msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n"
    )
    (folder / "digits.txt").write_text(text.getvalue(), encoding="utf-8")
    plot(result, folder / "digits.png")
    return text.getvalue()


def numbers(text: str) -> tuple[float, ...]:
    """The numbers of "0.5,0.2"."""
    return tuple(float(part) for part in text.split(","))


def main(
    seeds: Annotated[
        int,
        typer.Option(
            min=1, help="Seeds 0, 1, ...: each a split, initial weights and an order of batches."
        ),
    ] = 5,
    hidden: Annotated[int, typer.Option(min=1, help="Features of h and c.")] = 128,
    updates: Annotated[
        int, typer.Option(min=EVERY, help=f"Updates of every run, in turns of {EVERY}.")
    ] = 400,
    batch: Annotated[int, typer.Option(min=1, max=1400, help="Images of an update.")] = 32,
    rates: Annotated[
        str, typer.Option(help="Learning rates to choose from; one: no choice.")
    ] = "0.001,0.003,0.01,0.03",
    sweep_seeds: Annotated[
        int, typer.Option(min=1, help="Seeds for the choice, none of which is reported.")
    ] = 3,
    targets: Annotated[str, typer.Option(help="Validation losses to be reached.")] = "0.5,0.2,0.1",
    threads: Annotated[
        int,
        typer.Option(min=1, help="PyTorch's threads; products this small wait for each other's."),
    ] = 1,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of digits.json, .txt and .png (default bench/results/<device>)."),
    ] = None,
) -> None:
    """Train digit classifiers with nn.LSTM, an LN-LSTM in eager mode and lntune.LayerNormLSTM, side
    by side. About two minutes.
    """
    if missing := [
        package
        for module, package in (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib"))
        if not importlib.util.find_spec(module)
    ]:
        print(
            f"bench/digits.py needs {' and '.join(missing)}: pip install -e '.[bench]', or pip"
            f" install {' '.join(missing)}",
            file=sys.stderr,
        )
        raise typer.Exit(2)
    settings = Settings(
        seeds,
        hidden,
        updates // EVERY * EVERY,
        batch,
        numbers(rates),
        sweep_seeds,
        numbers(targets),
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = run(settings, lambda text: print(text, file=sys.stderr))
    finally:
        torch.set_num_threads(before)
    print(write(result, output or Path(__file__).parent / "results" / device.current().slug))


if __name__ == "__main__":
    typer.run(main)
