"""What the samples of a measurement show of other work on the machine."""

from __future__ import annotations

import random
import statistics
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lntune.log import disturbance, records

LOGS = Path(__file__).parents[1] / "tuning_logs"


def why(**samples: list[float]) -> str:
    """Of contenders' samples, whose medians are their own."""
    return disturbance.why(
        samples, {name: statistics.median(taken) for name, taken in samples.items()}
    )


def around(us: float, count: int = 40, share: float = 0.02) -> list[float]:
    """Samples of a quiet machine: a little scattered."""
    noise = random.Random(us)
    return [us * noise.uniform(1, 1 + share) for _ in range(count)]


def test_a_quiet_measurement() -> None:
    """Samples that scatter, some of them by much, and drift are undisturbed."""
    outliers = [*around(30), *around(240, 8)]
    drifting = [30.0 + i for i in range(40)]
    assert not why(tuned=outliers, eager=drifting, copy=around(9.3), default=outliers)
    assert not why(tuned=[5.0], eager=[7.0])
    assert not why()


def test_most_calls_wait() -> None:
    """A median of 7,993 us where the quickest call took 5 us is a wait, and so is one of a quarter
    of the calls.
    """
    assert "7993 us or more, the quickest 5 us" in why(tuned=[5.0, *[7993.0] * 20])
    assert "a quarter of the calls of 'eager'" in why(
        tuned=around(30), eager=[*around(40, 25), *around(4000, 15)]
    )


def test_the_median_is_of_more_samples_than_are_kept() -> None:
    """A trial keeps sixteen samples of hundreds: those may all be quick where the median is not."""
    assert disturbance.why({"tuned": around(30, 16)}, {"tuned": 7993.0})


@pytest.mark.parametrize("turns", [1, 2, 5])
def test_everybody_takes_whole_turns(turns: int) -> None:
    """Where nobody was ever quick, contenders of different work that take the same whole number of
    turns have waited.
    """
    waiting = [around(4000 * turns - offset, share=0.0005) for offset in (2, 6, 11)]
    assert "turns of the scheduler" in why(
        tuned=waiting[0], eager=waiting[1], copy=waiting[2], default=waiting[0]
    )
    assert not why(tuned=waiting[0], eager=around(4000 * turns + 700), copy=waiting[2])
    assert not why(tuned=waiting[0], default=waiting[0])  # one kernel that happens to take so long
    assert not why(tuned=around(4000 * turns, share=0), eager=around(8000 * turns, share=0))


def test_calls_of_different_numbers_of_turns() -> None:
    """Samples of 8, 12 and 16 ms and nothing in between are turns, also of a single contender; one
    long kernel of any time is not.
    """
    waits = [11919.1, 15935.2, 15940.0, 7992.8, 15961.5]
    assert "calls of 'tuned' took 2 to 4 turns of the scheduler" in why(tuned=waits)
    assert not why(tuned=[*waits, 9100.0, 13500.0])
    for us in (7990.0, 11950.0, 13000.0, 401_000.0):
        assert not why(tuned=around(us, share=0.05)), us


def test_no_kernel_is_so_much_faster() -> None:
    """A factor of thousands over eager mode, either way, is no gain but a wait on one side."""
    assert "a factor of 2500 apart" in why(tuned=around(3.6, share=0), eager=around(9000, share=0))
    assert why(tuned=around(9000), eager=around(3.6))
    assert why(tuned=around(3.2), eager=around(9), copy=around(8025))  # "of copy 250806 %"
    assert why(tuned=around(3.2), eager=around(9), default=around(8025))
    assert not why(tuned=around(900), eager=around(1900), copy=around(1.2))
    assert not why(tuned=around(4.5), eager=around(85.3), copy=around(0.4))


@given(
    samples=st.dictionaries(
        st.sampled_from(["tuned", "eager", "copy"]),
        st.lists(st.floats(0, 1e9), min_size=1, max_size=9),
        max_size=3,
    )
)
def test_any_samples_can_be_looked_at(samples: dict[str, list[float]]) -> None:
    """Zeros and single samples included; in whatever order they were taken."""
    assert why(**samples) == why(**{name: sorted(taken) for name, taken in samples.items()})


def test_shipped_finals_are_what_they_say() -> None:
    """The thresholds leave every final alone that was measured on a quiet machine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        finals = records.read([LOGS], role="final")
    assert len(finals) > 100
    assert [f"{r.case}: {r.disturbance}" for r in finals if r.disturbance and not r.busy] == []
