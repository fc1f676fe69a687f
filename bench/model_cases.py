"""What whole models gain by tuning the cases that they use: BERT-base and GPT-2 with random
weights, before and after.

    python bench/model_cases.py [--models bert,gpt2] [--dtype float32] [--batch 2] [--sequence 128]
                                [--budget 120] [--seconds 20] [--output FOLDER]

Both are of their published configurations: BERT-base is 12 layers of hidden 768 with 12 heads, 3072
features between and layer norm behind each residual addition, 30,522 words and 512 places (Devlin
et al. 2018, arXiv:1810.04805); GPT-2 is 12 layers of the same sizes with layer norm before
attention and product and behind the last layer, 50,257 words whose embedding is the last product,
too, and 1,024 places (Radford et al. 2019).

Each is converted, and its calls are recorded (`lntune.record_cases`) in a forward without gradients
and in a training step (forward, loss and backward). Nothing is tuned in the log that it has: that
is "before". Then `lntune tune --cases` tunes what was recorded, and the same is measured again.
Eager mode is measured beside either, interleaved; what is compared are the ratios to it.
"""

from __future__ import annotations

import copy
import functools
import os
import tempfile
import warnings
from pathlib import Path
from typing import Annotated, Any

import keeping
import msgspec
import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional
from transformer import BETWEEN, HEADS, Layer

import lntune
from lntune import device, timing
from lntune.commands import tune as tuning
from lntune.log import cases as recorded
from lntune.log.records import Timing
from lntune.log.wanted import ALL
from lntune.report.columns import Column, Table, key
from lntune.report.progress import TuningProgress
from lntune.system.heap import kept_heap
from lntune.tune import Settings

EAGER, OURS = "eager", "lntune"
FORWARD, TRAINING = "forward", "training step"


class Bert(nn.Module):
    """BERT: the sum of three embeddings, normalized, and layers of the encoder; the loss is that of
    masked words, by the embedding of words.
    """

    def __init__(self, hidden: int, layers: int, words: int = 30_522, places: int = 512) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, hidden), nn.Embedding(places, hidden)
        self.kinds, self.norm = nn.Embedding(2, hidden), nn.LayerNorm(hidden, eps=1e-12)
        self.layers = nn.Sequential(*(Layer(hidden) for _ in range(layers)))

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, sequence) of words to (batch, sequence, hidden)."""
        place = torch.arange(tokens.shape[1])
        embedded = self.words(tokens) + self.places(place) + self.kinds(torch.zeros_like(tokens))
        return self.layers(self.norm(embedded))  # type: ignore[no-any-return]

    def loss(self, tokens: Tensor) -> Tensor:
        """Of one word in eight, as in its pretraining."""
        hidden = self(tokens)[:, ::8].flatten(0, 1)
        logits = functional.linear(hidden, self.words.weight)
        return functional.cross_entropy(logits.float(), tokens[:, ::8].flatten())


class Block(nn.Module):
    """One layer of GPT-2: norm, causal attention, norm, two products with GELU."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.wide = nn.Linear(hidden, BETWEEN * hidden)
        self.narrow = nn.Linear(BETWEEN * hidden, hidden)
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, hidden) to the same."""
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in parts)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.narrow(functional.gelu(self.wide(self.norm2(x)), approximate="tanh"))


class Gpt2(nn.Module):
    """GPT-2: embeddings, blocks, a norm, and the embedding of words once more."""

    def __init__(self, hidden: int, layers: int, words: int = 50_257, places: int = 1024) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, hidden), nn.Embedding(places, hidden)
        self.blocks = nn.Sequential(*(Block(hidden) for _ in range(layers)))
        self.norm = nn.LayerNorm(hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, sequence) of words to logits of the next ones."""
        embedded = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        return functional.linear(self.norm(self.blocks(embedded)), self.words.weight)

    def loss(self, tokens: Tensor) -> Tensor:
        """Of every next word."""
        logits = self(tokens)[:, :-1].flatten(0, 1)
        return functional.cross_entropy(logits.float(), tokens[:, 1:].flatten())


MODELS = {"bert": Bert, "gpt2": Gpt2}


class Row(msgspec.Struct, frozen=True):
    """A model's use in one dtype, "before" or "after" its cases were tuned: milliseconds (medians),
    and how many times as fast the converted model is (the median over rounds).
    """

    model: str
    what: str
    dtype: str
    when: str
    eager_ms: float
    lntune_ms: float
    ratio: float
    disturbed: bool
    timings: dict[str, Timing]


def forward(model: nn.Module, tokens: Tensor) -> Tensor:
    """Without gradients."""
    with torch.no_grad():
        return model(tokens)  # type: ignore[no-any-return]


def train(model: Bert | Gpt2, tokens: Tensor) -> None:
    """Forward, loss and backward."""
    model.zero_grad()
    model.loss(tokens).backward()  # type: ignore[no-untyped-call]


USES = {FORWARD: forward, TRAINING: train}


def measured(
    name: str, models: dict[str, Any], tokens: Tensor, dtype: str, when: str, seconds: float
) -> list[Row]:
    """Both uses of a model, in eager mode and converted, interleaved."""
    rows = []
    for what, call in USES.items():
        calls = {who: functools.partial(call, model, tokens) for who, model in models.items()}
        for _ in range(3):  # kernels are built, and learnt by the backward
            calls[OURS]()
        result = timing.quietest(
            functools.partial(timing.measure, calls, seconds, rounds=5), attempts=2
        )
        times = result.timings
        ms = [times[who].median_us / 1e3 for who in (EAGER, OURS)]
        ratio = timing.ratio(times[EAGER], times[OURS])
        rows.append(Row(name, what, dtype, when, *ms, ratio, bool(result.busy), times))
    return rows


def record(models: dict[str, Any], tokens: Tensor, file: Path) -> None:
    """Note the cases of both uses of the converted model."""
    with lntune.record_cases(file):
        for call in USES.values():
            for _ in range(3):
                call(models[OURS], tokens)


def tune(file: Path, log_dir: Path, seconds: float) -> list[str]:
    """Tune what was recorded, and say what came of it."""
    plan = tuning.of_recorded(file, ALL, device.current())
    with TuningProgress(Console(stderr=True)) as progress:
        settings = Settings(seconds=seconds, log_dir=log_dir)
        summary = tuning.run(plan.parts, settings, lambda _: progress)
    lntune.reload()
    untuned = [f"not tuned: {case}: {why}" for case, why in summary.untuned.items()]
    return [f"{len(summary.finals)} cases tuned, {summary.trials} trials", *plan.notes, *untuned]


def table(rows: list[Row]) -> Table:
    """A line for each model and use, before and after."""
    figures = [Column("eager ms", 2), Column("lntune ms"), Column("over eager")]
    shown = Table(
        "models with random weights, converted, before and after tuning their own cases",
        [*key("model", "what", "dtype", "when"), *figures],
    )
    for r in rows:
        ms = f"{r.lntune_ms:.1f}{'*' * r.disturbed}"
        shown.add(r.model, r.what, r.dtype, r.when, f"{r.eager_ms:.1f}", ms, f"{r.ratio:.3f}x")
    return shown


def main(
    models: Annotated[str, typer.Option(help="bert or gpt2; several with commas.")] = "bert,gpt2",
    dtype: Annotated[
        str, typer.Option(help="float32 or bfloat16; several with commas.")
    ] = "float32",
    batch: int = 2,
    sequence: int = 128,
    layers: int = 12,
    hidden: int = 768,
    budget: Annotated[float, typer.Option(help="Seconds of tuning a model and dtype.")] = 120.0,
    seconds: Annotated[float, typer.Option(help="Time for each use, before and after.")] = 20.0,
    seed: int = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder for model_cases.json and .txt.")
    ] = None,
) -> None:
    """Measure models before and after tuning the cases that they use."""
    screen = keeping.screen()
    screen.print(
        f"{torch.get_num_threads()} threads; {layers} layers, {batch} x"
        f" {sequence} tokens, hidden {hidden}; {budget:g} s of tuning a model"
    )
    rows: list[Row] = []
    said: list[str] = []
    with tempfile.TemporaryDirectory() as folder, kept_heap(), warnings.catch_warnings():
        warnings.simplefilter("ignore", lntune.UntunedWarning)  # before, nothing is tuned
        for name in models.split(","):
            for of in dtype.split(","):
                logs = Path(folder, f"{name}-{of}")
                os.environ.update(LNTUNE_LOG_DIR=str(logs), LNTUNE_SHIPPED_LOGS="0")
                lntune.reload()
                torch.manual_seed(seed)
                plain = MODELS[name](hidden, layers).to(getattr(torch, of))
                both = {EAGER: plain, OURS: lntune.convert(copy.deepcopy(plain))}
                tokens = torch.randint(1000, (batch, sequence))
                record(both, tokens, logs.with_suffix(".jsonl"))
                rows += measured(name, both, tokens, of, "before", seconds)
                lines = tune(logs.with_suffix(".jsonl"), logs, budget)
                said += [f"{name}, {of}: {line}" for line in lines]
                rows += measured(name, both, tokens, of, "after", seconds)
                counts = recorded.read(logs.with_suffix(".jsonl"))
                said.append(f"{name}, {of}: {len(counts)} cases were recorded")
    screen.print(table(rows))
    for line in said:
        screen.print(line, markup=False)
    if any(row.disturbed for row in rows):
        screen.print("* disturbed by other work on the machine: measure again")
    if output is not None:
        facts = {
            "threads": torch.get_num_threads(),
            "settings": {
                "batch": batch,
                "sequence": sequence,
                "layers": layers,
                "hidden": hidden,
                "budget": budget,
                "seed": seed,
            },
            "said": said,
            "results": rows,
        }
        keeping.keep(output, "model_cases", screen, facts)


if __name__ == "__main__":
    typer.run(main)
