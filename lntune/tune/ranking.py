"""Which candidates for a GPU to measure first: those that the model says are fastest.

A guess, made to be overruled by the first measurement; lntune/backends/cuda/model.py says what it
is made of. It does not exclude: see candidate_facts.Facts.problems for what does.
"""

from __future__ import annotations

from lntune import knobs, ops
from lntune.backends.cuda import model
from lntune.backends.cuda.model import Pair
from lntune.case import Case
from lntune.device import Device
from lntune.kernels.candidate_facts import Facts
from lntune.measure.jobs import Candidate


def score(facts: Facts, case: Case, device: Device) -> float:
    """0 (cannot run) to 1: the share of a copy's bandwidth that the model predicts."""
    least = ops.get(case.op).bytes(case)
    return min(1.0, model.predict(facts.parts, least, device).share)


def pair(
    facts: Facts, case: Case, candidate: Candidate, device: Device, measured_us: float
) -> Pair:
    """A measured candidate beside what the model says of it."""
    least = ops.get(case.op).bytes(case)
    predicted = model.predict(facts.parts, least, device).us
    what = f"{case} {candidate.schedule} {knobs.describe(candidate.knobs)}"
    return Pair(what, device, facts.parts, least, predicted, measured_us)
