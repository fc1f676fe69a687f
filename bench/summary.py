"""The README's table of gains, made of the results of every CPU under bench/results.

    python bench/summary.py            # print it
    python bench/summary.py --write    # put it into README.md, between its two marks

Ten cases, and the geometric means over all cases that were measured. A gain is how many times
faster lntune is than the better of eager and torch.compile in the same run. What other work on the
machine disturbed, by the rules of today, is called that in place of figures, and is in no mean.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from lntune.log.records import Record
from lntune.report.rows import geomean, rows_of
from lntune.report.training import steps_of

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- figures of bench/summary.py -->", "<!-- end of the figures -->"
NAMES = {
    "layer_norm": "layer norm",
    "layer_norm_backward": "layer norm backward",
    "layer_norm_training": "layer norm training step",
    "lnlstm_step": "LSTM step",
    "lnlstm_step_backward": "LSTM step backward",
}
CASES = (
    ("layer_norm", "float32", 1024, 1),
    ("layer_norm", "float32", 1024, 32),
    ("layer_norm", "float32", 4096, 512),
    ("layer_norm", "bfloat16", 1024, 4096),
    ("layer_norm_backward", "float32", 1024, 512),
    ("layer_norm_backward", "bfloat16", 1024, 512),
    ("layer_norm_training", "float32", 768, 32),
    ("lnlstm_step", "float32", 512, 32),
    ("lnlstm_step_backward", "float32", 512, 32),
)
DISTURBED = "disturbed"
ITERATION = ("LN-LSTM training iteration", "float32", 512, 32)


class Cpu(NamedTuple):
    """A CPU's results: operator -> its cases, of the records that `lntune bench --output` wrote;
    training iterations of an LN-LSTM by dtype.
    """

    name: str
    cases: dict[str, list[dict[str, Any]]]
    iterations: dict[str, dict[str, Any]]


def cpu_name(device: Mapping[str, Any]) -> str:
    """A CPU as a person knows it: clouds tell no more than the family, so what tells generations
    apart is added.
    """
    vectors = {"x86-64-v4": "AVX-512", "x86-64-v3": "AVX2"}.get(device["isa"], device["isa"])
    name = device["name"].replace("(R)", "").removesuffix(" Processor")
    return f"{name}, {vectors}, " + (
        _generation(device.get("model", ""))
        or f"L1 {device['l1'] // 1024} KiB, L2 {device['l2'] // 1024} KiB"
    )


def _generation(model: str) -> str:
    """Family and model, which tell generations apart, of what a fingerprint says."""
    return (
        model[model.find("family") :].split(" stepping", maxsplit=1)[0]
        if "family" in model
        else model
    )


def read(results: Path) -> Iterator[Cpu]:
    """The CPUs that there are results of."""
    for folder in sorted(p for p in results.iterdir() if p.is_dir()):
        cases: dict[str, list[dict[str, Any]]] = {}
        iterations: dict[str, dict[str, Any]] = {}
        name = ""
        for op in NAMES:
            if (path := folder / f"{op}.json").is_file():
                records = msgspec.convert(json.loads(path.read_text())["records"], list[Record])
                rows = steps_of(records) if op == "layer_norm_training" else rows_of(records)
                cases[op], name = (
                    [msgspec.to_builtins(one) for one in rows],
                    cpu_name(msgspec.to_builtins(records[0].device)),
                )
        for path in sorted(folder.glob("lnlstm_training*.json")):
            facts = json.loads(path.read_text())
            name = cpu_name(facts["device"])
            iterations |= {
                r["dtype"]: {} if r["busy"] else {row["contender"]: row for row in r["rows"]}
                for r in facts["results"]
            }
        if cases:
            yield Cpu(name, cases, iterations)


def micros(value: float) -> str:
    """Microseconds with about three digits, from 10 ms on in milliseconds."""
    if value >= 1e4:  # noqa: PLR2004
        return f"{value / 1e3:.0f} ms"
    return f"{value:.0f} µs" if value >= 100 else f"{value:.1f} µs"  # noqa: PLR2004


def cell(cpu: Cpu, op: str, dtype: str, hidden: int, rows: int) -> str:
    """Our time and gain in a case, or nothing."""
    for c in cpu.cases.get(op, ()):
        if (c["dtype"], c["hidden"], c["rows"]) != (dtype, hidden, rows):
            continue
        if c["disturbed"]:
            return DISTURBED
        if c["over_better"]:
            return f"{micros(c['tuned_us'])}, {c['over_better']:.2f}x"
    return ""


def iteration(cpu: Cpu, dtype: str) -> str:
    """Our time and gain in a training iteration, over the best of PyTorch's ways that others
    know.
    """
    if (rows := cpu.iterations.get(dtype)) is None:
        return ""
    if not rows:
        return DISTURBED
    return (
        f"{micros(1e3 * rows['lntune']['ms'])},"
        f" {min(rows[n]['ratio'] for n in ('eager modules', 'torch.compile')):.2f}x"
    )


def means(cpu: Cpu, op: str) -> str:
    """The geometric mean over all cases, how many they are, in how many eager was faster, and how
    many do not count.
    """
    if not (cases := cpu.cases.get(op)):
        return ""
    sound = [c for c in cases if not c["disturbed"]]
    ratios = "speedup" if "speedup" in cases[0] else "over_eager"
    slower = sum(c[ratios] is not None and c[ratios] < 1 for c in sound)
    mean = geomean(c["over_better"] for c in sound)
    parts = [f"{mean:.2f}x of {len(sound)}"] if mean else []
    parts += [f"eager faster in {slower}"] if slower else []
    parts += [f"{len(cases) - len(sound)} {DISTURBED}"] if len(sound) < len(cases) else []
    return ", ".join(parts)


def markdown(results: Path = ROOT / "bench" / "results") -> str:
    """The table."""
    cpus = list(read(results))
    lines = [
        "| case | " + " | ".join(cpu.name for cpu in cpus) + " |",
        "|---|" + "--:|" * len(cpus),
    ]
    for op, dtype, hidden, rows in CASES:
        cells = [cell(cpu, op, dtype, hidden, rows) for cpu in cpus]
        lines.append(f"| {NAMES[op]}, {dtype}, {rows}x{hidden} | " + " | ".join(cells) + " |")
    name, dtype, hidden, rows = ITERATION
    lines.append(
        f"| {name}, {dtype}, {rows}x{hidden} | "
        + " | ".join(iteration(cpu, dtype) for cpu in cpus)
        + " |"
    )
    for op, name in NAMES.items():
        lines.append(f"| geomean, {name} | " + " | ".join(means(cpu, op) for cpu in cpus) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, or put it into README.md."""
    if sys.argv[1:] != ["--write"]:
        print(markdown())
        return
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{markdown()}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
