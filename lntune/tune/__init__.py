"""Tuning: for each case, search; then measure the finalists again; every result in the log at once."""

from __future__ import annotations

from lntune.tune.loop import FINALISTS, TRIAL_SECONDS, Observer, Progress, Summary, tune
from lntune.tune.settings import TRIAL_TIMEOUT, Settings, check_settings

__all__ = ["FINALISTS", "TRIAL_SECONDS", "TRIAL_TIMEOUT", "Observer", "Progress", "Settings", "Summary", "check_settings", "tune"]
