"""`lntune doctor`: whether everything is here that lntune needs, and what is known of this machine.

The packages and the C++ compiler are looked at in `packages`, each kind of device in a module of
its name, the folders that are written to in `folders`, bundles of kernels in `bundles`, schedules
and tuning records in `content`.
"""

from __future__ import annotations

import os
import warnings

from lntune.commands.doctor import bundles, content, cpu, folders, gpu, packages
from lntune.commands.doctor.finding import Finding, looked
from lntune.system import paths, variables

__all__ = ["Finding", "examine"]


def examine() -> list[Finding]:
    """All findings; whatever goes wrong in looking is a finding too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", paths.CacheWarning)  # a finding says it
        return [
            *packages.examine(),
            *cpu.examine(),
            *gpu.examine(),
            *folders.examine(),
            *looked("environment", _environment),
            *looked("bundle", bundles.examine),
            *looked("schedules", content.examine),
        ]


def _environment() -> list[Finding]:
    """The variables of lntune's that are set, and what looks like one and is none."""
    known = ", ".join(sorted(name for name in variables.KNOWN if os.environ.get(name)))
    found = [Finding("environment", "ok", known or "no variable of lntune's is set")]
    for sentence in variables.mistaken():
        what, _, remedy = sentence.partition(". ")
        found.append(Finding("environment", "warn", what, remedy or "Set it to 0 or 1."))
    return found
