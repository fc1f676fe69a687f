"""The README's two plots, drawn of the results of one CPU under bench/results.

    python bench/plots.py            # which of them are not as they would be drawn
    python bench/plots.py --write    # draw bench/results/speedups.svg and lstm_scaling.svg

The first has speedups of layer norm and its backward over hidden sizes, as `lntune bench --plot`
draws them. The second has the time of an LSTM's step and of its backward over batches, and of
training iterations over sequences where bench/lnlstm_training.py has measured several, on whatever
CPU.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from lntune.log.records import Record
from lntune.report import panels, plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS = Path(__file__).resolve().parent / "results"
CPU = "amd-epyc-x86-64-v4-2c"
HIDDEN = (128, 512, 1024)
"""Of the LSTM's steps."""
DTYPES = ("float32", "bfloat16")


class Line(NamedTuple):
    """Times over sizes: of lntune and of PyTorch's best way, in the same rounds."""

    name: str
    sizes: list[int]
    ours: list[float]
    theirs: list[float]


def records_of(folder: Path, *ops: str) -> list[Record]:
    """What `lntune bench --output` measured of some operators."""
    texts = [(folder / f"{op}.json").read_text() for op in ops]
    return [r for text in texts for r in msgspec.convert(json.loads(text)["records"], list[Record])]


def steps(records: Sequence[Record], dtype: str) -> list[Line]:
    """Microseconds of a call of a step over batches, for some hidden sizes; what was disturbed is
    left out.
    """
    lines = []
    for hidden in HIDDEN:
        some = [r for r in records if (r.case.dtype, r.case.hidden) == (dtype, hidden)]
        some = sorted((r for r in some if not r.disturbance), key=lambda r: r.case.rows)
        ours = [r.timings["tuned"].median_us for r in some]
        theirs = [min(r.timings[name].median_us for name in ("eager", "compile")) for r in some]
        lines.append(Line(f"hidden {hidden}", [r.case.rows for r in some], ours, theirs))
    return lines


def iterations(results: Sequence[dict[str, Any]], dtype: str) -> list[Line]:
    """Milliseconds of a training iteration over sequences, for each batch; what was disturbed is
    left out.
    """
    sound = [r for r in results if r["dtype"] == dtype and not r["busy"]]
    lines = []
    for batch in sorted({r["batch"] for r in sound}):
        some = sorted((r for r in sound if r["batch"] == batch), key=lambda r: r["sequence"])
        times = [{row["contender"]: row["ms"] for row in r["rows"]} for r in some]
        theirs = [min(ms for name, ms in t.items() if name != "lntune") for t in times]
        ours = [t["lntune"] for t in times]
        lines.append(Line(f"batch {batch}", [r["sequence"] for r in some], ours, theirs))
    return lines


LOOKS: dict[str, dict[str, Any]] = {
    "lntune": {"linestyle": "-"},
    "PyTorch": {"linestyle": "--", "mfc": "white"},
}


def draw_times(axes: Axes, lines: Sequence[Line], title: str, size: str, unit: str) -> None:
    """A colour and mark for each line: ours whole and full, PyTorch's broken and hollow."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for place, line in enumerate(lines):
        look = panels.appearance(place, len(lines))
        axes.plot(line.sizes, line.theirs, **look, **LOOKS["PyTorch"])
        axes.plot(line.sizes, line.ours, **look, **LOOKS["lntune"])
    ticks = sorted({size for line in lines for size in line.sizes})
    axes.set_xticks([float(t) for t in ticks], [str(t) for t in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    panels.plain_numbers(axes)
    axes.set(title=title, xlabel=size, ylabel=unit)


def legend(figure: Figure, lines: Sequence[Line], title: str, at: str) -> None:
    """What colours, marks and kinds of lines mean, beside the panels."""
    looks = [panels.appearance(place, len(lines)) for place in range(len(lines))]
    handles = [Line2D([], [], linestyle="", **look) for look in looks]
    handles += [Line2D([], [], color=panels.BLACK, marker="o", **look) for look in LOOKS.values()]
    names = [*(line.name for line in lines), *LOOKS]
    figure.legend(handles, names, title=title, loc=f"outside right {at}", frameon=False)


def draw_speedups(results: Path, path: Path) -> None:
    """Layer norm and its backward over hidden sizes."""
    records = records_of(results / CPU, "layer_norm", "layer_norm_backward")
    plots.of_records(records, path, bandwidth=False)


def draw_scaling(results: Path, path: Path) -> None:
    """LSTMs over batches and sequences."""
    forward, backward = (
        records_of(results / CPU, f"lnlstm_step{end}") for end in ("", "_backward")
    )
    notes = plots.provenance([*forward, *backward])
    notes.append("medians; PyTorch: the better of eager mode and torch.compile")
    measured = sorted(results.glob("*/lnlstm_scaling.json"))
    facts = json.loads(measured[0].read_text()) if measured else None
    if facts:
        layers, input_ = (facts["settings"][name] for name in ("layers", "input"))
        notes.append(
            f"training: {layers} layer, {input_} features, {facts['name']}, {facts['time'][:10]};"
            " PyTorch: the better of eager modules and TorchScript"
        )
    with plots.own_style():
        columns = 2 + bool(facts)
        figure = Figure(figsize=(3.2 * columns + 1, 5.2), layout="constrained")
        for line, dtype in zip(figure.subplots(2, columns), DTYPES, strict=True):
            title = f"LSTM step, {dtype}"
            draw_times(line[0], steps(forward, dtype), title, "batch", "µs a call")
            title = f"LSTM step's backward, {dtype}"
            draw_times(line[1], steps(backward, dtype), title, "batch", "µs a call")
            if facts:
                title = f"training iteration, hidden {facts['settings']['hidden']}, {dtype}"
                lines = iterations(facts["results"], dtype)
                draw_times(line[2], lines, title, "sequence", "ms an iteration")
        legend(figure, steps(forward, DTYPES[0]), "steps", "upper")
        if facts:
            legend(figure, iterations(facts["results"], DTYPES[0]), "training", "lower")
        figure.suptitle("How long LSTMs with layer normalization take", fontsize=10)
        plots.write(figure, path, notes)


PLOTS: dict[str, Callable[[Path, Path], None]] = {
    "speedups.svg": draw_speedups,
    "lstm_scaling.svg": draw_scaling,
}


def changed(results: Path = RESULTS) -> list[str]:
    """The plots that are not as they would be drawn now."""
    names = []
    with tempfile.TemporaryDirectory() as folder:
        for name, draw in PLOTS.items():
            draw(results, Path(folder) / name)
            old = results / name
            if not old.is_file() or old.read_bytes() != (Path(folder) / name).read_bytes():
                names.append(name)
    return names


def main() -> int:
    """Draw the plots, or say which would change; exit code 1 where one would."""
    if sys.argv[1:] == ["--write"]:
        for name, draw in PLOTS.items():
            draw(RESULTS, RESULTS / name)
        return 0
    names = changed()
    print("\n".join(f"{name} would change" for name in names) or "all are as they would be drawn")
    return bool(names)


if __name__ == "__main__":
    sys.exit(main())
