"""Reports: records and results as tables, sentences and comparisons. Nothing here touches a device,
TVM or PyTorch.

    from lntune import report
    report.cases("layer_norm", hidden=1024)               # prints as a table; a list of records
    report.trials("layer_norm", rows=512).to_pandas()     # where pandas is installed
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lntune.report.queries import cases as cases
    from lntune.report.queries import trials as trials

_HOME = {"cases": "lntune.report.queries", "trials": "lntune.report.queries"}
"""Names for Python and the modules that they are in, which are loaded on first use."""
__all__ = ["cases", "trials"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lntune.report' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
