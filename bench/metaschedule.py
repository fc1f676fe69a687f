"""TVM's own tuner against lntune's schedules: `python bench/metaschedule.py [--seconds 240]`.

Each case is tuned once by all schedules of its operator and by MetaSchedule, each with an equal
share of the seconds, and with the same builds, checks and measurements; the best of each are then
measured in the same rounds. Printed is what `lntune compare` says of them, and how many candidates
of each were tried, with what came of them. Left in the folder of results: `metaschedule.txt`,
`metaschedule.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from lntune import device, schedule, tune
from lntune.case import Case
from lntune.log import records
from lntune.words import counted

RESULTS = Path(__file__).parent / "results"
CASES = (
    Case("layer_norm", 1024, "float32", 512),
    Case("layer_norm", 1024, "bfloat16", 512),
    Case("layer_norm_backward", 1024, "float32", 512),
    Case("layer_norm", 4096, "float32", 512),
    Case("layer_norm", 1024, "float32", 32),
    Case("layer_norm", 1000, "bfloat16", 512),
    Case("layer_norm", 1024, "float32", 1),
    Case("layer_norm_backward", 1024, "bfloat16", 512),
    Case("lnlstm_step", 256, "float32", 32),
)


def contender(op: str) -> str:
    """The name of MetaSchedule's schedule for an operator."""
    named = schedule.for_op(op, device.current().kind).values()
    return next(s.name for s in named if s.propose is not None)


def measure(case: Case, seconds: float, log_dir: Path) -> list[str]:
    """Tune a case by everyone; what was tried, a line a schedule."""
    ours = list(schedule.listing(case.op, device.current().kind))
    names = (*ours, contender(case.op))
    summary = tune.tune(
        [case], tune.Settings(schedules=names, seconds=seconds, log_dir=log_dir), lambda _: None
    )
    trials = [r for r in records.read([log_dir], case.op) if r.role == "trial" and r.case == case]
    lines = [f"{case}"]
    for name in names:
        own = [r for r in trials if r.schedule == name]
        statuses = Counter(r.status for r in own)
        best = min((r.median() or 0 for r in own if r.status == "ok"), default=None)
        took = "none worked" if best is None else f"best trial {best:.1f} us"
        counts = ", ".join(f"{n} {status}" for status, n in statuses.items())
        lines.append(f"  {name}: {counted(len(own), 'candidate')} ({counts}), {took}")
    return [*lines, *(f"  {note}" for note in summary.notes)]


def compared(op: str, log_dir: Path, form: str) -> str:
    """What `lntune compare` says of an operator's cases."""
    words = ["compare", contender(op), "tuned", "--log-dir", str(log_dir), form]
    done = subprocess.run(
        [sys.executable, "-m", "lntune", *words], capture_output=True, text=True, check=False
    )
    return done.stdout or done.stderr


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and leave the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=240.0, help="for each case")
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first so many")
    parser.add_argument("--output", type=Path, default=RESULTS / device.current().slug)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    text = [f"{options.seconds:.0f} s a case, shared equally among its schedules"]
    tables: dict[str, str] = {}
    facts: dict[str, Any] = {"seconds": options.seconds, "tried": [], "compared": {}}
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES[: options.cases]:
            facts["tried"] += (lines := measure(case, options.seconds, Path(folder)))
            table = compared(case.op, Path(folder), "--wide").rstrip()
            facts["compared"][case.op] = json.loads(compared(case.op, Path(folder), "--json"))
            print("\n".join([*lines, "", table, ""]), flush=True)
            tables[case.op] = table
            # after every case: what there is stays where the next one is interrupted
            whole = "\n\n".join([*text, "\n".join(facts["tried"]), *tables.values()])
            (options.output / "metaschedule.txt").write_text(whole + "\n")
            (options.output / "metaschedule.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
