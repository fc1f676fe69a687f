"""The table of `lntune bench --call-cost`."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from lntune.case import Case
from lntune.report.columns import KEY, Cell, Column, Table, key
from lntune.report.tables import micros, number, ratio_text

FORMS = ("2-D", "3-D", "2-D rows")
"""Of a call: dimensions of its input, whose rows are the last one, or a normalized_shape of two."""


class Costs(msgspec.Struct, frozen=True):
    """What a kernel costs besides its own time.

    `call_us`: microseconds of one call from Python in inference mode, "eager" and "tuned" of each
    of the FORMS as in "eager 2-D"; `eager_over_tuned` their ratios. `load_ms`: milliseconds to
    load a cached kernel; `first_load_ms`: the same for a process's first one, which also imports
    tvm_ffi and reads the tuning log; None where eager serves the case. `import_ms`: what `import
    lntune; lntune.layer_norm` adds to `import torch`. Medians over `processes` fresh processes.
    """

    case: Case
    call_us: dict[str, float]
    eager_over_tuned: dict[str, float | None]
    first_load_ms: float | None
    load_ms: float | None
    loading_imports_tvm: bool
    import_ms: float
    processes: int
    busy: bool


def costs_table(costs: Sequence[Costs]) -> Table:
    """Per case: a call in each form, eager against tuned; loading; importing."""
    columns = [*key("case")]
    for form, ranks in zip(FORMS, ((1, KEY, KEY), (6, 4, 4), (9, 8, 7)), strict=True):
        columns += [
            Column(f"{form} {what}", rank)
            for what, rank in zip(("eager us", "tuned us", "over eager"), ranks, strict=True)
        ]
    columns += [Column("load ms", 2), Column("first load", 5), Column("import ms", 3)]
    title = "one call from Python in inference mode; loading and importing in fresh processes"
    table = Table(f"{title} after `import torch`", columns)
    for c in costs:
        calls: list[Cell] = []
        for form in FORMS:
            tuned = micros(c.call_us[f"tuned {form}"]) + ("*" if c.busy else "")
            calls += [
                micros(c.call_us[f"eager {form}"]),
                tuned,
                ratio_text(c.eager_over_tuned[form]),
            ]
        load = number(c.load_ms, 1) + (" (imports tvm)" if c.loading_imports_tvm else "")
        table.add(str(c.case), *calls, load, number(c.first_load_ms, 1), number(c.import_ms, 1))
    return table


def costs_lines(costs: Sequence[Costs]) -> list[str]:
    """What is to be known about the table."""
    if not any(c.busy for c in costs):
        return []
    return ["* disturbed by other work on the machine: neither times nor ratios hold"]
