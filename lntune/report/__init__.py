"""Reports: records and results as tables, sentences and comparisons. Nothing here touches a device,
TVM or PyTorch.

    from lntune import report
    report.cases("layer_norm", hidden=1024)               # prints as a table; a list of records
    report.trials("layer_norm", rows=512).to_pandas()     # where pandas is installed
    report.compare("cached_rows", "widened_rows")         # as lntune compare has it
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lntune.report.queries import cases as cases
    from lntune.report.queries import compare as compare
    from lntune.report.queries import trials as trials

__all__ = ["cases", "compare", "trials"]
"""Names for Python, all of one module, which is loaded on first use."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lntune.report' has no attribute {name!r}")
    return getattr(importlib.import_module("lntune.report.queries"), name)


def __dir__() -> list[str]:
    return __all__
