"""The searches that can be run here: Optuna's needs a package of the `search` extra."""

from __future__ import annotations

from lntune.search import SEARCHES, tpe

USABLE = [name for name in SEARCHES if name != "optuna" or tpe.installed()]
