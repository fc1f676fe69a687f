"""What a whole transformer gains by lntune.convert: BERT-base with random weights, before and
after.

    python bench/transformer.py [--dtype float32,bfloat16] [--batch 8] [--sequence 128]
                                [--layers 12] [--output FOLDER]

The encoder of Devlin, Chang, Lee, Toutanova: *BERT*, 2018, arXiv:1810.04805 (hidden 768, 12 heads,
3072 features between, GELU, layer norm behind each residual addition), as the usual libraries write
it: linear layers, scaled_dot_product_attention, torch.nn.LayerNorm. Measured are inference, and a
training iteration without an optimizer's step, of the same weights in PyTorch and converted,
interleaved. Matrix products are nearly all of the time, so that little is to be gained: that is
what the table shows.
"""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path
from typing import Annotated

import keeping
import msgspec
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional

import lntune
from lntune import timing
from lntune.log.records import Timing
from lntune.report.columns import Column, Table, key
from lntune.system.heap import kept_heap

# heads of a layer; features between its two last products, over those of the model
HEADS, BETWEEN = 12, 4
EAGER, OURS = "eager", "lntune"


class Layer(nn.Module):
    """One layer of the encoder."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.wide, self.narrow = (
            nn.Linear(hidden, BETWEEN * hidden),
            nn.Linear(BETWEEN * hidden, hidden),
        )
        self.norm1, self.norm2 = nn.LayerNorm(hidden, eps=1e-12), nn.LayerNorm(hidden, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, hidden) to the same."""
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.out(attended))
        return self.norm2(x + self.narrow(functional.gelu(self.wide(x))))


class Row(msgspec.Struct, frozen=True):
    """Inference or training in one dtype: milliseconds (medians), how many times faster the
    converted model is (the median over rounds), the norms' share of eager's time (those of the
    layers' shape alone, measured beside), the largest difference of outputs over their scale.
    """

    what: str
    dtype: str
    eager_ms: float
    lntune_ms: float
    ratio: float
    norms: float
    difference: float
    disturbed: bool
    timings: dict[str, Timing]


def infer(model: nn.Module, x: Tensor) -> Tensor:
    """A forward without gradients."""
    with torch.no_grad():
        return model(x)  # type: ignore[no-any-return]


def train(model: nn.Module, x: Tensor) -> None:
    """Forward and backward of a training iteration."""
    model.zero_grad()
    model(x).float().square().mean().backward()


def rows(
    dtype: str, batch: int, sequence: int, layers: int, hidden: int, seconds: float, seed: int
) -> list[Row]:
    """Inference and training in one dtype."""
    torch.manual_seed(seed)
    eager = nn.Sequential(*(Layer(hidden) for _ in range(layers))).to(getattr(torch, dtype))
    ours = lntune.convert(copy.deepcopy(eager))
    x = torch.randn(batch, sequence, hidden).to(getattr(torch, dtype))
    a, b = infer(eager, x).double(), infer(ours, x).double()
    difference = float((a - b).abs().max() / a.abs().max())
    norms = nn.Sequential(*(nn.LayerNorm(hidden) for _ in range(2 * layers))).to(x.dtype)
    measurements = []
    for what, call in (("inference", infer), ("training", train)):
        calls = {
            EAGER: functools.partial(call, eager, x),
            OURS: functools.partial(call, ours, x),
            "norms": functools.partial(call, norms, x),
        }
        for _ in range(3):  # kernels are built, and learnt by the backward
            calls[OURS]()
        measured = timing.quietest(
            functools.partial(timing.measure, calls, seconds, rounds=7, seed=seed), attempts=2
        )
        times = measured.timings
        ms = [times[name].median_us / 1e3 for name in (EAGER, OURS)]
        share = times["norms"].median_us / times[EAGER].median_us
        ratio = timing.ratio(times[EAGER], times[OURS])
        measurements.append(
            Row(what, dtype, *ms, ratio, share, difference, bool(measured.busy), times)
        )
    return measurements


def table(measurements: list[Row]) -> Table:
    """A line for each kind of use and dtype."""
    columns = [
        Column("eager ms", 1),
        Column("lntune ms"),
        Column("over eager"),
        Column("eager's norms", 2),
        Column("difference", 3),
    ]
    comparison = Table(
        "BERT's encoder with random weights, in PyTorch and converted",
        [*key("what", "dtype"), *columns],
    )
    for r in measurements:
        figures = (
            f"{r.eager_ms:.1f}",
            f"{r.lntune_ms:.1f}{'*' * r.disturbed}",
            f"{r.ratio:.3f}x",
            f"{100 * r.norms:.1f}%",
            f"{r.difference:.0e}",
        )
        comparison.add(r.what, r.dtype, *figures)
    return comparison


def main(
    dtype: Annotated[
        str, typer.Option(help="float32 or bfloat16; several with commas.")
    ] = "float32,bfloat16",
    batch: int = 8,
    sequence: int = 128,
    layers: int = 12,
    hidden: int = 768,
    seconds: Annotated[float, typer.Option(help="Time for each use and dtype.")] = 20.0,
    seed: int = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder for transformer.json and transformer.txt.")
    ] = None,
) -> None:
    """Inference and training of BERT's encoder, before and after lntune.convert."""
    screen = keeping.screen()
    screen.print(
        f"{torch.get_num_threads()} threads; {layers} layers, {batch} x"
        f" {sequence} tokens, hidden {hidden}"
    )
    measurements: list[Row] = []
    with kept_heap(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", lntune.UntunedWarning)
        for name in dtype.split(","):
            measurements += rows(name, batch, sequence, layers, hidden, seconds, seed)
    screen.print(table(measurements))
    if any(r.disturbed for r in measurements):
        screen.print(
            "* disturbed by other work on the machine: neither times nor ratios hold, measure again"
        )
    for warning in caught:
        if issubclass(warning.category, lntune.UntunedWarning):
            screen.print(str(warning.message))
    if output is not None:
        facts = {
            "threads": torch.get_num_threads(),
            "settings": {
                "batch": batch,
                "sequence": sequence,
                "layers": layers,
                "hidden": hidden,
                "seed": seed,
            },
            "results": measurements,
        }
        keeping.keep(output, "transformer", screen, facts)


if __name__ == "__main__":
    typer.run(main)
