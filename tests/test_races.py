"""Few samples for those that are behind, more for the best: races in trials and before finals, and
what a final measures besides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from lntune import backends, device, schedule
from lntune.backends.host import HostBackend
from lntune.case import Case
from lntune.log.records import Timing
from lntune.measure import kept, trial
from lntune.measure.jobs import Candidate, Final, Heat, Outcome, Try
from lntune.measure.kept import Kept
from lntune.timing import Measured

CASE = Case("layer_norm", 64, "float32", 8)
HERE = device.current()
PLAN = next(iter(schedule.for_op("layer_norm", "cpu").values()))
SETTINGS = [
    Candidate.of(PLAN.name, setting)
    for setting in (PLAN.untuned(CASE, HERE), *PLAN.space(CASE, HERE))
]


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has tried nothing yet."""
    monkeypatch.setattr(trial, "_kept", Kept())
    trial._inputs.cache_clear()


def numbered(count: int) -> tuple[Candidate, ...]:
    """So many candidates, by number."""
    return tuple(Candidate("plain", (("number", i),)) for i in range(count))


@pytest.fixture
def heats(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """What each part of a heat measured, in seconds of the part by candidate; a candidate takes as
    many microseconds as it has been told (`us`).
    """
    parts: list[dict[str, float]] = []

    def measure(
        contenders: Mapping[str, Sequence[Any]],
        _: Any,
        seconds: float,
        rounds: int,
        seed: int,
    ) -> Measured:
        assert rounds == trial.HEAT_ROUNDS
        parts.append(dict.fromkeys(contenders, seconds))
        return Measured(
            {n: Timing((calls[0](),), calls[0]()) for n, calls in contenders.items()}, 0, False
        )

    fake = SimpleNamespace(measure=measure)
    monkeypatch.setattr(trial.backends, "of", lambda _: fake)
    monkeypatch.setattr(trial, "_fault", lambda _: "")
    monkeypatch.setattr(trial, "_inputs", lambda *_: [{}])
    monkeypatch.setattr(trial.calls, "bind", lambda _, kernel, *__, **___: [kernel])
    return parts


def takes(us: Sequence[float]) -> Callable[..., Any]:
    """In the place of trial._kernel: the kernel of a candidate says how long it takes."""
    return lambda _case, _device, candidate, checked: lambda: us[candidate.knobs["number"]]


@pytest.mark.parametrize(
    ("us", "sizes"),
    [
        ([5, 3, 8, 1, 7, 2, 6, 4], [8, 4, 2]),
        ([2, 1, 3], [3, 2]),
        ([1, 2], [2]),
        ([9, 8, 7, 6, 5], [5, 3, 2]),
        ([1], [1]),
    ],
    ids=str,
)
def test_a_heat_halves(
    us: list[float],
    sizes: list[int],
    heats: list[dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each part of the time is for the better half of the one before, and the order is by how far
    candidates came.
    """
    monkeypatch.setattr(trial, "_kernel", takes(us))
    outcome = trial.run(Heat(CASE, HERE, numbered(len(us)), 0.3))
    assert outcome.status == "ok"
    assert [us[i] for i in outcome.order] == sorted(us)
    assert [len(part) for part in heats] == sizes
    assert {s for part in heats for s in part.values()} == {0.3 / len(sizes)}


def test_a_heat_of_which_one_cannot_be_built(
    heats: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so, and nothing is measured."""
    failed = Outcome("compile", "no")
    monkeypatch.setattr(trial, "_kernel", lambda *_, **__: failed)
    assert trial.run(Heat(CASE, HERE, numbered(4), 0.3)) == failed
    assert heats == []


def test_the_best_kernels_are_kept() -> None:
    """The quickest kernels of a case, so many; those of the case before are given up."""
    store, other = Kept(), msgspec.structs.replace(CASE, rows=9)
    candidates = numbered(kept.MOST + 5)

    def kernel(number: int) -> None:
        """A kernel."""

    kernels = [functools.partial(kernel, i) for i in range(len(candidates))]
    for i, candidate in enumerate(candidates):
        store.add(CASE, HERE, candidate, kernels[i], us=(i * 7) % len(candidates))
    found = [store.get(CASE, HERE, c) for c in candidates]
    assert sum(k is not None for k in found) == kept.MOST
    for i, k in enumerate(found):
        assert k is (kernels[i] if (i * 7) % len(candidates) < kept.MOST else None)
    assert store.get(other, HERE, candidates[0]) is None
    store.add(other, HERE, candidates[0], kernels[0], us=1.0)
    assert store.get(other, HERE, candidates[0]) is kernels[0]
    assert store.get(CASE, HERE, candidates[0]) is None


def test_a_trial_that_is_far_behind_is_short() -> None:
    """Beside a best candidate that takes a tenth of the time a trial has the fewest samples, and
    what comes of it is sound; the same without one has all that the log keeps.
    """
    job = Try(CASE, HERE, SETTINGS[0], 0.04)
    long = trial.run(job)
    best_us = min(long.timings["tuned"].samples_us) / 10
    short = trial.run(msgspec.structs.replace(job, best_us=best_us))
    assert (long.status, short.status) == ("ok", "ok")
    assert len(long.timings["tuned"].samples_us) == trial.TRIAL_SAMPLES
    assert len(short.timings["tuned"].samples_us) == 5
    assert short.errors == long.errors and short.timings["tuned"].median_us > 0


def test_a_trial_that_cannot_be_so_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes a hundred times as long as the best has waited for the machine: it is measured
    again, and where that is so again, it counts as disturbed and will be tried anew.
    """
    measured: list[float] = []
    backend = type(backends.of(HERE))

    def measure(*_: Any, **__: Any) -> Measured:
        us = measured.pop(0)
        return Measured({"tuned": Timing((us,) * 5, us)}, None, None)

    monkeypatch.setattr(backend, "measure", measure)
    job = Try(CASE, HERE, SETTINGS[0], 0.01, best_us=5.0)
    for taken, us, busy in (
        ([501, 5.1], 5.1, None),
        ([8000, 7990], 7990, True),
        ([499], 499, None),
    ):
        measured[:] = taken
        outcome = trial.run(job)
        assert (outcome.timings["tuned"].median_us, outcome.busy) == (us, busy)
        assert not measured


@pytest.fixture(scope="module")
def final() -> Outcome:
    """A final of two candidates with both caches."""
    job = Final(CASE, HERE, tuple(SETTINGS[:3:2]), 0.05, default=SETTINGS[0], beside_seconds=2.0)
    return trial.run(job)


def test_a_final_has_both_caches(final: Outcome) -> None:
    """Everyone that a final measures is measured with a cold cache too, its rivals as well, on
    inputs that rotate.
    """
    assert final.status == "ok"
    assert set(final.timings) == set(final.cold) == {"tuned", "default", "eager", "copy"}
    (rival,) = final.rivals
    assert rival.cold is not None
    for timing in (*final.cold.values(), rival.cold):
        assert len(timing.samples_us) >= 3 and min(timing.samples_us) > 0
    assert final.warm == {} and rival.warm is None


def test_a_case_beyond_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a case leaves nothing of itself in the cache, its timings are cold ones already, and
    only their medians are repeated.
    """
    monkeypatch.setattr(type(backends.of(HERE)), "last_cache", lambda *_: 100)
    job = Final(CASE, HERE, (SETTINGS[0],), 0.02, beside_seconds=10.0)
    outcome = trial.run(job)
    assert {n: t.median_us for n, t in outcome.cold.items()} == {
        n: t.median_us for n, t in outcome.timings.items()
    }
    assert not any(t.samples_us for t in outcome.cold.values())


def test_no_time_for_the_other_cache() -> None:
    """A final that is to measure one cache has no timings of the other, nor has one with no time
    for a few calls of each.
    """
    for seconds in (0.0, 1e-6):
        outcome = trial.run(Final(CASE, HERE, (SETTINGS[0],), 0.02, beside_seconds=seconds))
        assert outcome.status == "ok" and (outcome.cold, outcome.warm) == ({}, {})


def test_finals_are_on_fresh_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs of a final are not those of the trials: they have its own seed."""
    seeds: list[int] = []
    inputs = HostBackend.inputs

    def noting(self: HostBackend, case: Case, of: device.Device, seed: int = 0) -> Any:
        seeds.append(seed)
        return inputs(self, case, of, seed)

    monkeypatch.setattr(HostBackend, "inputs", noting)
    trial.run(Try(CASE, HERE, SETTINGS[0], 0.01))
    trial.run(Final(CASE, HERE, (SETTINGS[0],), 0.01, seed=7))
    assert seeds == [0, 7]
