"""Tuning: for each case, search; then measure the finalists again; every result in the log at
once.
"""

from __future__ import annotations

from lntune.tune.loop import tune
from lntune.tune.settings import TRIAL_TIMEOUT, Settings, check_settings
from lntune.tune.state import TIME_OVER, Observer, Progress, Summary
from lntune.tune.times import TRIAL_SECONDS

__all__ = [
    "TIME_OVER",
    "TRIAL_SECONDS",
    "TRIAL_TIMEOUT",
    "Observer",
    "Progress",
    "Settings",
    "Summary",
    "check_settings",
    "tune",
]
