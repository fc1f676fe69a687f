"""What the model says of kernels with default knobs on a GPU, which need not be here: of layer norm
the share of a copy's bandwidth that each reaches, and what bounds it; of an LSTM's steps the
microseconds, where batches are so small that a single row's time counts. A model, not a
measurement.

    python bench/gpu_model.py
    python bench/gpu_model.py --target nvidia/nvidia-b200 --hidden 1024 --rows 4096
    python bench/gpu_model.py --steps

Needs a CUDA compiler. TARGETS are what the default knobs are to reach, see schedules/gpu.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lntune import knobs, ops, schedule
from lntune.architectures import WARP
from lntune.backends import device_of
from lntune.backends.cuda import model
from lntune.backends.cuda.targets import product_of
from lntune.case import Case
from lntune.device import Device
from lntune.errors import LntuneError
from lntune.kernels import candidate_facts

OPS = ("layer_norm", "layer_norm_backward")
HIDDEN = "768,1024,2048,4096,5003,8192,16384"
ROWS = "32768,4096"
DTYPES = ("float32", "bfloat16")
STEPS = ("lnlstm_step", "lnlstm_step_backward")
STEPS_HIDDEN, STEPS_ROWS = "128,256,512,1024,2048", "8,64"
ACCESS_BYTES = 16
"""Of the knobs that an LSTM's steps are compared with: the widest access, and two barriers."""
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
    ahead = ", prefetch" if setting.prefetch else ""
    short = f"{rows}{setting.threads_per_row}{blocks}{kept}{ahead}"
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


def step(case: Case, setting: Any, device: Device) -> tuple[float, int, str]:
    """Microseconds of an LSTM's step by the model, bytes that it spills, and its knobs in short."""
    plan = next(iter(schedule.for_op(case.op, device.kind).values()))
    facts = candidate_facts.facts(case, plan, setting, device)
    spilled = max(kernel.resources.spill_store_bytes for kernel in facts.kernels)
    us = model.predict(facts.parts, ops.get(case.op).bytes(case), device).us
    short = f"{setting.threads_per_row} x {setting.vector_width}"
    differing = {
        name: value
        for name, value in knobs.to_dict(setting).items()
        if value != knobs.to_dict(type(setting)())[name]
        and name not in ("threads_per_row", "vector_width")
    }
    return us, spilled, f"{short} {knobs.describe(differing)}" if differing else short


def wide(setting: Any, case: Case, device: Device) -> Any:
    """Knobs like these with the widest accesses that fit, threads for as many elements, and two
    barriers.
    """
    plan = next(iter(schedule.for_op(case.op, device.kind).values()))
    for width in (ACCESS_BYTES // case.itemsize, setting.vector_width):
        per_row = max(WARP, setting.threads_per_row * setting.vector_width // width)
        changed = {"threads_per_row": per_row, "vector_width": width, "exchange": "two_barriers"}
        if plan.reason_invalid(other := replace(setting, **changed), case, device) is None:
            return other
    return setting


def step_lines(device: Device, hidden: list[int], rows: list[int]) -> Iterator[str]:
    """The table of an LSTM's steps, line by line."""
    yield (
        f"{model.NOTE}: microseconds of an LSTM's step on {device.name} with accesses of"
        f" {ACCESS_BYTES} bytes and two barriers to an exchange, as by default before, and with the"
        " default knobs: threads a row x elements of an access; knobs that are not a schedule's"
        " first; bytes that ptxas spills, whose cost the model does not know\n"
    )
    yield "| operator | rows | hidden | dtype | before | us | spills | default | us | spills |"
    yield "|---|--:|--:|---|---|--:|--:|---|--:|--:|"
    for op in STEPS:
        plan = next(iter(schedule.for_op(op, device.kind).values()))
        for n in rows:
            for size in hidden:
                for dtype in DTYPES:
                    case = Case(op, size, dtype, n)
                    default = plan.default(case.typical, device)
                    cells = []
                    for setting in (wide(default, case.typical, device), default):
                        us, spilled, short = step(case, setting, device)
                        cells += [short, f"{us:.2f}", str(spilled)]
                    yield f"| {op} | {n} | {size} | {dtype} | {' | '.join(cells)} |"


def numbers(text: str) -> list[int]:
    """The numbers, 1 or more, of a text with commas between them.

    Raises:
        argparse.ArgumentTypeError: it has others.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers such as 768,1024")
    return [int(word) for word in words]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--target", default="nvidia/nvidia-h200", help="a GPU, such as cuda:sm_90")
    parser.add_argument("--steps", action="store_true", help="an LSTM's steps, not layer norm")
    parser.add_argument("--hidden", type=numbers, help="sizes, separated by commas")
    parser.add_argument("--rows", type=numbers, help="numbers of rows, separated by commas")
    given = parser.parse_args()
    texts = (STEPS_HIDDEN, STEPS_ROWS) if given.steps else (HIDDEN, ROWS)
    hidden, rows = given.hidden or numbers(texts[0]), given.rows or numbers(texts[1])
    table = step_lines if given.steps else lines
    try:
        device = device_of(given.target)
        if device.kind != "gpu":
            parser.error(f"--target: got {given.target}, expected a GPU, such as cuda:sm_90")
        for line in table(device, hidden, rows):
            print(line)
            sys.stdout.flush()
    except LntuneError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
