"""What the loops of bfloat16 layer norm cost a core by llvm-mca: operations on vectors, and cycles,
for a vector of float32, with pairs and without, in AVX2 and AVX-512.

    python bench/bfloat16_operations.py [--hidden 16384] [--llvm-mca llvm-mca-19] [--output FILE]

A loop's cycles are those of LLVM's model of a core, with all loads in the L1 cache: a count and no
measurement, for machines that are not here. One row at a time, 512 rows, else the default knobs; of
backward kernels the loop for groups whose rows are all there. llvm-mca is of Debian's package
llvm-19; LLVM 16 is the first that knows Zen 4. What kernels take is measured by

    lntune tune layer_norm SIZES --knob pairs=false --log-dir LOG --budget 2m
    lntune tune layer_norm SIZES --knob pairs --log-dir LOG --budget 2m
    lntune compare cached_rows:pairs=false cached_rows:pairs --measure --op layer_norm SIZES
                   --log-dir LOG

with SIZES `--dtype bfloat16 --hidden 256,768,1024,4096 --rows 32,512,4096`, which compares the best
of both; the same of layer_norm_backward and blocked_rows.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from lntune import schedule
from lntune.case import Case
from lntune.device import Device
from lntune.kernels import compiler
from lntune.knobs import changed

ITERATIONS, ROWS = 200, 512
CORES = {"x86-64-v3": ("znver3",), "x86-64-v4": ("znver4", "sapphirerapids")}
KERNELS = {
    ("layer_norm", False): ("pairs=false", "sample=false", "affine32", "lanes=4"),
    ("layer_norm", True): ("affine32",),
    ("layer_norm_backward", False): ("pairs=false", "together=1", "lanes=2"),
    ("layer_norm_backward", True): ("together=1",),
}
"""Operator and whether in pairs -> knobs."""
MATRICES = {"layer_norm": 1, "layer_norm_backward": 3}
"""What of bfloat16 a loop reads: x; dy, x and the weight."""
_LABEL, _JUMP = re.compile(r"(\.LBB\w+):"), re.compile(r"\s+j\w+\s+(\.LBB\w+)")
_READ = re.compile(r"\s+v(?:pmovzxwd|movdqu\w*|pslld\s+\$16,)\s+(-?\d*\(.*?\)),")
_MOVED = re.compile(r"\s+v(mov|zeroupper)")


class Loop(NamedTuple):
    """An innermost loop: its part in the kernel, its instructions, and how many vectors of float32
    an iteration is for.
    """

    part: str
    text: list[str]
    vectors: float

    @property
    def operations(self) -> int:
        """Instructions on vectors but moves."""
        return sum(bool(re.match(r"\s+v", line)) and not _MOVED.match(line) for line in self.text)


def loops(assembly: str, op: str, pairs: bool) -> dict[str, Loop]:
    """The loops over a row by their part: its first mean, its sums, its output; of several the one
    with the fewest operations.
    """
    body = [
        line
        for line in assembly.partition("\n.L__tvm_parallel_lambda:")[2]
        .partition(".Lfunc_end")[0]
        .splitlines()
        if line.strip() and not re.match(r"\.L(tmp|func)|\s*\.(cfi|loc|p2align)|\s*#", line)
    ]
    places = {m[1]: n for n, line in enumerate(body) if (m := _LABEL.match(line))}
    back = [
        (places[m[1]], n)
        for n, line in enumerate(body)
        if (m := _JUMP.match(line)) and places.get(m[1], n) < n
    ]
    found: dict[str, Loop] = {}
    for begin, end in back:
        if any(begin <= a and b <= end and (a, b) != (begin, end) for a, b in back):
            continue
        text = [
            line for line in body[begin : end + 1] if not (_LABEL.match(line) or _JUMP.match(line))
        ]
        reads = {m[1] for line in text if (m := _READ.match(line))}
        if not reads:
            continue
        kinds = "\n".join(text)
        part = "output" if "vpsrld" in kinds else "sums" if "vsubps" in kinds else "mean"
        loop = Loop(part, text, len(reads) * (2 if pairs else 1) / MATRICES[op])
        best = found.get(part)
        if best is None or loop.operations / loop.vectors < best.operations / best.vectors:
            found[part] = loop
    return found


def cycles(loop: Loop, core: str, command: str) -> float:
    """Of an iteration on a core, by llvm-mca."""
    said = subprocess.run(
        [command, "-mtriple=x86_64", f"-mcpu={core}", f"-iterations={ITERATIONS}"],
        input="\n".join(loop.text),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    total = re.search(r"Total Cycles:\s+(\d+)", said)
    assert total is not None, said
    return int(total[1]) / ITERATIONS


def rows_of(hidden: int, command: str) -> list[str]:
    """The table's lines."""
    lines = [
        "operator             pairs  ISA        loop    operations  "
        + "cycles for a vector by core (llvm-mca)"
    ]
    for (op, pairs), words in KERNELS.items():
        for isa, cores in CORES.items():
            device = Device("cpu", "made up", isa, 2, (), 32 << 10, 1 << 20, 32 << 20)
            case = Case(op, hidden, "bfloat16", ROWS)
            name = {"layer_norm": "cached_rows"}.get(op, "blocked_rows")
            plan = schedule.get(name, op)
            setting = changed(plan.default(case, device), words)
            found = loops(compiler.show(case, plan, setting, device, "asm"), op, pairs)
            totals = dict.fromkeys(("operations", *cores), 0.0)
            for part in ("mean", "sums", "output"):
                if part not in found:
                    continue
                loop = found[part]
                share = 0.25 if part == "mean" and getattr(setting, "sample", False) else 1.0
                costs = {core: cycles(loop, core, command) / loop.vectors for core in cores}
                costs = {"operations": loop.operations / loop.vectors, **costs}
                totals = {of: totals[of] + share * cost for of, cost in costs.items()}
                called = f"{part} of 1/4" if share < 1 else part
                lines.append(_line(op, pairs, isa, called, costs))
            lines.append(_line(op, pairs, isa, "a row", totals))
    return lines


def _line(op: str, pairs: bool, isa: str, part: str, costs: dict[str, float]) -> str:
    told = "  ".join(f"{core} {cost:.2f}" for core, cost in costs.items() if core != "operations")
    operations = costs["operations"]
    return f"{op:<20} {'yes' if pairs else 'no':<6} {isa:<10} {part:<12} {operations:>5.1f}  {told}"


def main(
    hidden: Annotated[int, typer.Option(help="Elements of a row.")] = 16384,
    llvm_mca: Annotated[str, typer.Option(help="The command.")] = "",
    output: Annotated[Path | None, typer.Option(help="A file for the table.")] = None,
) -> None:
    """Print the table."""
    names = [llvm_mca] if llvm_mca else ["llvm-mca-19", "llvm-mca-18", "llvm-mca-17", "llvm-mca"]
    command = next((name for name in names if shutil.which(name)), None)
    if command is None:
        typer.echo(f"skipped: none of {', '.join(names)} is here; apt-get install llvm-19 has one")
        raise typer.Exit
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    told = re.search(r"LLVM version \S+", version.stdout)
    head = f"hidden {hidden}, {ROWS} rows, one at a time; {told[0] if told else command}"
    text = "\n".join([head, *rows_of(hidden, command), ""])
    typer.echo(text, nl=False)
    if output is not None:
        output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
