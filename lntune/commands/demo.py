"""`lntune demo`: a short tour that tunes layer norm, loads it, checks it and reports."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import msgspec
from rich.console import Console

from lntune import device
from lntune.case import Case
from lntune.log import records
from lntune.log.records import Key
from lntune.ops.layer_norm import NAME
from lntune.ops.layer_norm_backward import NAME as BACKWARD
from lntune.report.columns import say, whole
from lntune.report.output import Output, print_table
from lntune.report.progress import TuningProgress
from lntune.report.rows import Row, rows_of
from lntune.report.tables import cases_table, console, summary_lines
from lntune.system import paths
from lntune.tune import Settings, tune
from lntune.words import counted

GRID = tuple(
    Case(NAME, hidden, dtype, rows)
    for hidden in (1024, 768)
    for dtype in ("float32", "bfloat16")
    for rows in (512, 32, 1)
)


AGREES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
"""The largest difference between two right answers, as a share of the largest value: a rounding or
two of the dtype and its sums.
"""


class Agreement(msgspec.Struct, frozen=True):
    """The tuned op against eager in one case: largest differences of the output and of the gradient
    as shares of eager's largest value, and whether both are within the dtype's rounding.
    """

    case: Case
    output: float
    gradient: float
    agrees: bool


class Tour(msgspec.Struct, frozen=True):
    """What came of it: trials, rows of the report, and how the tuned op compares with eager."""

    trials: int
    rows: list[Row]
    agreements: list[Agreement]
    log_dir: str

    @property
    def ok(self) -> bool:
        """True when something was tuned and all of it agrees with eager."""
        return bool(self.rows) and bool(self.agreements) and all(a.agrees for a in self.agreements)


def run(
    seconds: float, grid: Sequence[Case] = GRID, out: Console | None = None, wide: bool = False
) -> Tour:
    """Tune the grid on this CPU in about `seconds`, load, check, report; `out` shows it, with
    `wide` all columns of the table.
    """
    import lntune

    out = out or console()
    cpu = device.current()
    on = f"{cpu.name} ({counted(cpu.cores, 'core')}, {cpu.isa})"
    say(
        out,
        f"1. Tuning {NAME} on {on} for about {seconds:.0f} s:"
        " every candidate is checked, then timed.",
    )
    with TuningProgress(out) as progress:
        summary = tune(grid, Settings(seconds=seconds, again=True), progress)
    if summary.interrupted or not summary.finals:
        say(out, "interrupted" if summary.interrupted else f"nothing was tuned: {summary.untuned}")
        return Tour(summary.trials, [], [], str(summary.log_dir))
    say(out, "2. Loading the winners in PyTorch and checking them against eager on real tensors.")
    lntune.reload()
    with warnings.catch_warnings():  # the backward's kernels are none that this tour tunes
        warnings.simplefilter("ignore", lntune.UntunedWarning)
        agreements = [_agreement(case) for case in grid]
    for a in agreements:
        differences = (
            f"largest difference {a.output:.1e} of the largest value, gradient {a.gradient:.1e}"
        )
        say(out, f"   {a.case}: {'agrees' if a.agrees else 'DIFFERS'}; {differences}")
    right = sum(a.agrees for a in agreements)
    say(
        out,
        (
            "   all tuned ops agree with eager"
            if right == len(agreements)
            else f"   {len(agreements) - right} DIFFER from eager"
        ),
    )
    say(out, "3. The report (`lntune report` shows it again):")
    finals = records.finals(records.read(paths.log_dirs(), NAME, cpu))
    keys = dict.fromkeys(Key.of(case) for case in grid)
    serving = [finals[key] for key in keys if key in finals]
    rows = rows_of(serving)
    table = cases_table(rows, f"{NAME}, medians; every call allocates its output")
    print_table(
        Output(rows, [table], summary_lines(rows)), console(out.stderr, wide) if wide else out
    )
    if older := sum(r.run != summary.finals[0].run for r in serving):
        say(
            out,
            f"{counted(older, 'row')} of earlier runs on this kind of machine: what other work"
            " disturbed now replaces no quiet measurement.",
        )
    example = grid[0]
    command = (
        f"lntune why {NAME} --hidden {example.hidden} --dtype {example.dtype} --rows {example.rows}"
    )
    say(
        out,
        f"The log is in {whole(summary.log_dir)}. Next: {whole(command)}; the backward, which its"
        f" default knobs serve, is tuned by {whole(f'lntune tune {BACKWARD}')}.",
    )
    return Tour(summary.trials, rows, agreements, str(summary.log_dir))


def _agreement(case: Case) -> Agreement:
    """The public call against PyTorch's layer norm, forward and backward, on random tensors."""
    import torch

    import lntune

    dtype = getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(case.rows, case.hidden, generator=generator).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(case.hidden, generator=generator).to(dtype) for _ in range(2))
    outputs: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    for function in (lntune.layer_norm, torch.nn.functional.layer_norm):
        with torch.inference_mode():
            outputs.append(function(x, (case.hidden,), weight, bias))
        leaf = x.clone().requires_grad_()
        gradients += torch.autograd.grad(function(leaf, (case.hidden,), weight, bias), leaf, dy)
    output, gradient = (
        float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())
        for ours, theirs in (outputs, gradients)
    )
    agrees = all(difference < AGREES[case.dtype] for difference in (output, gradient))
    return Agreement(case, output, gradient, agrees)
