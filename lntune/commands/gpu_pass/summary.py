"""What a pass found so far, for people: a line for each case that was timed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lntune.commands.gpu_pass.jobs import Answer

_OURS = ("tuned", "candidate", "lntune")


def figures(answer: Answer) -> str:
    """The figures of a work in a few words; empty where it has none."""
    values = answer.values
    parts: list[str] = []
    us: Any = values.get("us")
    if isinstance(us, Mapping):
        parts += [f"{name} {time:.4g} us" for name, time in us.items()]
    elif us is not None:
        parts.append(f"{us:.4g} us")
    if isinstance(gbps := values.get("gbps"), float):
        parts.append(f"{gbps:.0f} GB/s")
    if "cycles" in values:
        parts.append(f"{values['cycles']:.0f} cycles")
    if errors := values.get("errors"):
        parts.append(f"errors {max(errors.values()):.3g} of what is allowed")
    return ", ".join(parts)


def copy_bandwidth(answers: Iterable[tuple[str, str, Answer]]) -> float | None:
    """GB/s of the fastest copy among (step, key, answer) of works."""
    copies = [
        float(answer.values["gbps"])
        for step, _, answer in answers
        if step == "yardsticks" and isinstance(answer.values.get("gbps"), float)
    ]
    return max(copies, default=None)


def lines(answers: list[tuple[str, str, Answer]]) -> Iterator[str]:
    """Of each case that was timed our time, its share of the fastest copy, and how many times as
    long the others take. What did not go well is at the end.
    """
    best = copy_bandwidth(answers)
    if best is not None:
        yield f"fastest copy: {best:.0f} GB/s"
    for step, key, answer in answers:
        us = answer.values.get("us")
        if not isinstance(us, Mapping):
            continue
        name = next((one for one in _OURS if one in us), "")
        if not name:
            continue
        gbps = answer.values.get("gbps", {})
        share = f", {100 * gbps[name] / best:.0f} % of copy" if best and name in gbps else ""
        others = "".join(f", {n} {t / us[name]:.2f}x" for n, t in us.items() if n != name)
        yield f"{step}: {key}: {us[name]:.4g} us{share}{others}"
    for step, key, answer in answers:
        if answer.status != "ok":
            yield f"{answer.status}: {step}: {key}: {answer.message}"
