"""The tour behind `make demo`: tune, load, check, report."""

from __future__ import annotations

from rich.console import Console

from lntune import device, paths, records
from lntune.case import Case
from lntune.ops.layer_norm import NAME
from lntune.report.progress import TuningProgress
from lntune.report.rows import rows_of
from lntune.report.tables import cases_table, console, summary_lines
from lntune.tune import Settings, tune

GRID = tuple(Case(NAME, hidden, dtype, rows) for hidden in (1024, 768) for dtype in ("float32", "bfloat16") for rows in (512, 32, 1))


def run(seconds: float) -> bool:
    """Go through it all on this CPU; True when every tuned op agrees with eager."""
    out = console()
    cpu = device.current()
    out.print(f"1. Tuning {NAME} on {cpu.name} ({cpu.cores} cores, {cpu.isa}) for about {seconds:.0f} s: every candidate is checked, then timed.")
    with TuningProgress(out) as progress:
        summary = tune(GRID, Settings(seconds=seconds), progress)
    if summary.interrupted or not summary.finals:
        out.print("interrupted" if summary.interrupted else f"nothing was tuned: {summary.untuned}")
        return False
    out.print("2. Loading the winners in PyTorch and checking them against eager on real tensors.")
    right = _check(out)
    out.print("3. The report (`lntune report` shows it again):")
    found = records.finals(records.read(paths.log_dirs(), NAME, cpu))
    rows = rows_of(found[key] for key in found if any(key == (c.op, c.hidden, c.dtype, c.bucket) for c in GRID))
    out.print(cases_table(rows, f"{NAME}, medians; every call allocates its output"))
    for line in summary_lines(rows):
        out.print(line)
    out.print(f"The log is in {summary.log_dir}. Next: lntune why {NAME} --hidden 1024 --rows 32")
    return right


def _check(out: Console) -> bool:
    """The public call against torch.nn.functional.layer_norm, forward and backward."""
    import torch

    import lntune

    lntune.reload()
    right = True
    for case in GRID:
        dtype = getattr(torch, case.dtype)
        torch.manual_seed(0)
        x, dy = torch.randn(case.rows, case.hidden).to(dtype), torch.randn(case.rows, case.hidden).to(dtype)
        weight, bias = torch.randn(case.hidden).to(dtype), torch.randn(case.hidden).to(dtype)
        with torch.inference_mode():
            ours, theirs = (f(x, (case.hidden,), weight, bias) for f in (lntune.layer_norm, torch.nn.functional.layer_norm))
        gradients = []
        for f in (lntune.layer_norm, torch.nn.functional.layer_norm):
            leaf = x.clone().requires_grad_()
            f(leaf, (case.hidden,), weight, bias).backward(dy)
            gradients.append(leaf.grad)
        apart = float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())
        bar = {"float32": 1e-5, "bfloat16": 2e-2}[case.dtype]
        agrees = apart < bar and torch.allclose(gradients[0].float(), gradients[1].float(), rtol=0, atol=bar * float(gradients[1].abs().max()))
        right &= agrees
        out.print(f"   {case}: largest difference {apart:.1e} of the largest value, gradient {'agrees' if agrees else 'DIFFERS'}")
    return right
