"""What the model says of layer norm's kernels with default knobs on a GPU, which need not be here:
the share of a copy's bandwidth that each reaches, and what bounds it. A model, not a measurement.

    python bench/gpu_model.py
    python bench/gpu_model.py --target nvidia/nvidia-b200 --hidden 1024 --rows 4096

Needs a CUDA compiler. TARGETS are what the default knobs are to reach, see schedules/gpu.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from lntune import ops, schedule
from lntune.backends import device_of
from lntune.backends.cuda import model
from lntune.backends.cuda.targets import product_of
from lntune.case import Case
from lntune.device import Device
from lntune.kernels import candidate_facts

OPS = ("layer_norm", "layer_norm_backward")
HIDDEN = "768,1024,2048,4096,5003,8192,16384"
ROWS = "32768,4096"
DTYPES = ("float32", "bfloat16")
TARGETS = {"layer_norm": 0.85, "layer_norm_backward": 0.8}


def prediction(case: Case, device: Device) -> tuple[str, model.Prediction]:
    """The default knobs of a case in short, and what the model says of them."""
    plan = next(iter(schedule.for_op(case.op, device.kind).values()))
    setting = plan.default(case.typical, device)
    facts = candidate_facts.facts(case, plan, setting, device)
    least = ops.get(case.op).bytes(case)
    blocks = f" x {setting.blocks_per_sm}" if hasattr(setting, "blocks_per_sm") else ""
    kept = "" if setting.row_storage == "registers" else f", {setting.row_storage}"
    rows = f"{setting.rows_per_block} x " if setting.rows_per_block > 1 else ""
    short = f"{rows}{setting.threads_per_row}{blocks}{kept}"
    return short, model.predict(facts.parts, least, device)


def lines(device: Device, hidden: list[int], rows: list[int]) -> Iterator[str]:
    """The table, line by line."""
    product = product_of(device)
    yield (
        f"{model.NOTE}: share of a copy's bandwidth on {device.name} ({product.gbps:.0f} GB/s x"
        f" {model.CONSTANTS.reached}), default knobs: rows x threads a row x blocks a"
        " multiprocessor; what bounds it; * below the target of"
        f" {', '.join(f'{100 * share:.0f} % ({op})' for op, share in TARGETS.items())}\n"
    )
    heads = [cell for n in rows for cell in (f"{n:,} rows", "knobs", "bound")]
    yield f"| operator | hidden | dtype | {' | '.join(heads)} |"
    yield f"|---|--:|---|{'--:|---|---|' * len(rows)}"
    for op in OPS:
        for size in hidden:
            for dtype in DTYPES:
                cells = []
                for n in rows:
                    knobs, found = prediction(Case(op, size, dtype, n), device)
                    mark = "" if found.share >= TARGETS[op] else " *"
                    cells += [f"{100 * found.share:.0f} %{mark}", knobs, found.bound]
                yield f"| {op} | {size} | {dtype} | {' | '.join(cells)} |"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="nvidia/nvidia-h200")
    parser.add_argument("--hidden", default=HIDDEN)
    parser.add_argument("--rows", default=ROWS)
    given = parser.parse_args()
    hidden, rows = ([int(n) for n in text.split(",")] for text in (given.hidden, given.rows))
    for line in lines(device_of(given.target), hidden, rows):
        print(line)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
