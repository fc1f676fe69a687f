"""Why candidates failed, in a few lines."""

from __future__ import annotations

from lntune.report.failures import Failures, lines


def test_reasons_are_counted() -> None:
    """Messages that differ in numbers are one reason, told in the first one's words; the commonest
    come first, and what is left is counted.
    """
    failures = Failures()
    for number in range(5):
        failures.add("wrong", f"y: {number}.25e-3 at 0x7f{number}")
    for status, message in (
        ("run", "SIGSEGV"),
        ("run", "SIGSEGV"),
        ("compile", "a\n b"),
        ("timeout", "late"),
        ("invalid", ""),
    ):
        failures.add(status, message)
    assert [(r.status, r.count) for r in failures.reasons()] == [
        ("wrong", 5),
        ("run", 2),
        ("compile", 1),
        ("timeout", 1),
        ("invalid", 1),
    ]
    assert lines(failures.reasons()) == [
        "5 wrong: y: 0.25e-3 at 0x7f0",
        "2 run: SIGSEGV",
        "1 compile: a b",
        "2 for other reasons, see the log",
    ]
    assert lines([]) == []


def test_long_messages_are_cut() -> None:
    """A line keeps to a length; one without a message is the status alone."""
    failures = Failures()
    failures.add("compile", "word " * 100)
    (line,) = lines(failures.reasons())
    assert len(line) < 180 and line.endswith(" ...")
    alone = Failures()
    alone.add("timeout", "")
    assert lines(alone.reasons()) == ["1 timeout"]
