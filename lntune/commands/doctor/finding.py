"""One line of `lntune doctor`: what was looked at, a status, details and a remedy."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from lntune.errors import LntuneError

SHOWN = 3
"""Things of a kind that are quoted: damaged files, skipped lines, records, commands."""


class Finding(msgspec.Struct, frozen=True):
    """One thing looked at. `status`: "ok", "warn" (works, with less), "fail" (will not work)."""

    topic: str
    status: str
    detail: str
    remedy: str = ""


def looked(
    topic: str, look: Callable[[], Finding | list[Finding]], status: str = "fail"
) -> list[Finding]:
    """What looking finds; an error is a finding under the topic."""
    try:
        findings = look()
    except Exception as e:
        reason = str(e) if isinstance(e, LntuneError) else f"{type(e).__name__}: {e}"
        return [Finding(topic, status, reason, "Mend that; eager mode serves what kernels cannot.")]
    return findings if isinstance(findings, list) else [findings]
