"""Heat maps: the colour of a ratio, and cases by hidden size and row bucket."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

from lntune.case import bucket_label
from lntune.report.page.cells import DASH
from lntune.report.page.facts import DeviceFacts


class Level(NamedTuple):
    """A class of a heat map: ratios up to `end`, with the colours of cell and text in the light and
    in the dark scheme.
    """

    end: float
    light: str
    light_text: str
    dark: str
    dark_text: str


LEVELS = (
    Level(0.5, "#9a3d00", "#ffffff", "#ffb066", "#1d1206"),
    Level(0.8, "#e58a3c", "#1d1206", "#c2691f", "#0d0500"),
    Level(0.98, "#fbd3a6", "#1d1206", "#643d17", "#ffe9d1"),
    Level(1.02, "#efefee", "#202124", "#34383f", "#f1f3f4"),
    Level(1.25, "#dcebf7", "#0c1a28", "#1f3a52", "#e4f1fd"),
    Level(1.5, "#bfdaef", "#0c1a28", "#1f4a6d", "#eaf5ff"),
    Level(2.0, "#98c5e6", "#0c1a28", "#1d5d8c", "#f5faff"),
    Level(3.0, "#6aacdb", "#05101a", "#3d88c0", "#03101b"),
    Level(5.0, "#2a78b8", "#ffffff", "#62aae0", "#03101b"),
    Level(10.0, "#155596", "#ffffff", "#93c9f3", "#03101b"),
    Level(math.inf, "#08305c", "#ffffff", "#c9e6fc", "#03101b"),
)
"""From orange (slower) over grey (a draw) to blue (faster): told apart with any colour vision."""


def level(ratio: float | None) -> int:
    """The place of a ratio's class in LEVELS; -1 of none."""
    return -1 if ratio is None else next(i for i, one in enumerate(LEVELS) if ratio <= one.end)


def legend() -> list[tuple[int, str]]:
    """Each class with the ratios that it holds."""
    ends = [one.end for one in LEVELS]
    spans = [f"{a:g}{DASH}{b:g}" for a, b in itertools.pairwise(ends[:-1])]
    return list(enumerate([f"below {ends[0]:g}", *spans, f"above {ends[-2]:g}"]))


class HeatCell(NamedTuple):
    """A cell of a heat map: the number of its case, its class, its text, and what serves it."""

    case: int
    level: int
    text: str
    schedule: str


class HeatMap(NamedTuple):
    """Hidden sizes by row buckets, of one operator and dtype; None where nothing was measured."""

    op: str
    dtype: str
    buckets: list[str]
    rows: list[tuple[int, list[HeatCell | None]]]


def heat_maps(facts: DeviceFacts, first: int) -> list[HeatMap]:
    """The speedup over eager of each operator and dtype; `first` is the number of the device's
    first case on the page.
    """
    groups: dict[tuple[str, str], dict[tuple[int, int], HeatCell]] = {}
    for number, c in enumerate(facts.cases, first):
        r = c.row
        groups.setdefault((r.op, r.dtype), {})[r.hidden, c.record.case.bucket] = HeatCell(
            number,
            level(r.speedup),
            DASH if r.speedup is None else f"{r.speedup:.2f}",
            "eager" if c.eager_serves else r.schedule.split("_")[0],
        )
    maps = []
    for (op, dtype), cells in groups.items():
        buckets = sorted({bucket for _, bucket in cells})
        rows = [(h, [cells.get((h, b)) for b in buckets]) for h in sorted({h for h, _ in cells})]
        maps.append(HeatMap(op, dtype, [bucket_label(b) for b in buckets], rows))
    return maps
