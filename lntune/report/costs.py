"""The table of `lntune bench --call-cost`."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from rich.table import Table

from lntune.case import Case
from lntune.report.tables import micros, number, ratio_text


class Costs(msgspec.Struct, frozen=True):
    """What surrounds a kernel.

    `call_us`: microseconds of one call from Python in inference mode, keys "eager 2-D", "tuned 2-D", "eager 3-D" and
    "tuned 3-D"; `eager_over_tuned` their ratios. `load_ms`: milliseconds to load a cached kernel; `first_load_ms`:
    the same for a process's first one, which also imports tvm_ffi and reads the tuning log; None where eager serves the case.
    `import_ms`: what `import lntune; lntune.layer_norm` adds to `import torch`. All three are medians over `processes`
    fresh processes.
    """

    case: Case
    call_us: dict[str, float]
    eager_over_tuned: dict[str, float]
    first_load_ms: float | None
    load_ms: float | None
    loading_imports_tvm: bool
    import_ms: float
    processes: int
    busy: bool


def costs_table(costs: Sequence[Costs]) -> Table:
    """Per case: a call with 2-D and 3-D input, eager against tuned; loading; importing."""
    table = Table(title="one call from Python in inference mode; loading and importing in fresh processes after `import torch`", title_justify="left")
    table.add_column("case")
    for name in (
        "2-D eager us",
        "2-D tuned us",
        "2-D over eager",
        "3-D eager us",
        "3-D tuned us",
        "3-D over eager",
        "load ms",
        "first load",
        "import ms",
    ):
        table.add_column(name, justify="right")
    for c in costs:
        calls = [
            cell
            for form in ("2-D", "3-D")
            for cell in (
                micros(c.call_us[f"eager {form}"]),
                micros(c.call_us[f"tuned {form}"]) + ("*" if c.busy else ""),
                ratio_text(c.eager_over_tuned[form]),
            )
        ]
        load = number(c.load_ms, 1) + (" (imports tvm)" if c.loading_imports_tvm else "")
        table.add_row(str(c.case), *calls, load, number(c.first_load_ms, 1), number(c.import_ms, 1))
    if any(c.busy for c in costs):
        table.caption = "* measured while others used the machine"
        table.caption_justify = "left"
    return table
