"""The model's constants, fitted to measured times of a card.

    lntune bringup --output OUT                    # measures, and writes OUT/predictions.jsonl
    python bench/fit_model.py OUT/predictions.jsonl
    python bench/fit_model.py --fixed port,latency FILE...

Prints each constant before and after and how near the model comes with them; what is to be kept
goes into `Constants` in lntune/backends/cuda/model.py. Errors are those of the logarithms of times,
so that short kernels count as much as long ones. A constant that no kernel of the files depends on
stays as it is.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import msgspec

from lntune.backends.cuda import model
from lntune.backends.cuda.model import Constants, Pair

NAMES = Constants.__struct_fields__
MOST = {"reached": 1.0, "issued": 1.0}
"""Shares, of which there is no more than all."""
FIRST_DAMPING, LAST_DAMPING = 0.1, 1e6
DIFFERENCE, LONGEST = 1e-3, 0.5
"""Of a constant's logarithm: what a slope is taken over, and the longest step."""
EPSILON = 1e-9
DIFFERENT = 1.05
"""Two times of one case that differ by more than this have an order."""


def read(paths: Sequence[Path]) -> list[Pair]:
    """The pairs of files of predictions, a pair a line."""
    return [
        msgspec.json.decode(line, type=Pair)
        for path in paths
        for line in path.read_bytes().splitlines()
        if line.strip()
    ]


def errors(pairs: Sequence[Pair], constants: Constants) -> list[float]:
    """Of each pair the logarithm of predicted over measured."""
    predictions = (model.predict(p.parts, p.least, p.device, constants) for p in pairs)
    return [math.log(q.us / p.measured_us) for p, q in zip(pairs, predictions, strict=True)]


def distance(pairs: Sequence[Pair], constants: Constants) -> float:
    """Root of the mean square of the errors."""
    return math.sqrt(sum(e * e for e in errors(pairs, constants)) / len(pairs))


def in_order(pairs: Sequence[Pair], constants: Constants) -> float:
    """The share of two candidates of one case, operator, size and dtype, which the model has in
    their measured order; 1 where there are no two.
    """
    cases: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for pair, error in zip(pairs, errors(pairs, constants), strict=True):
        times = pair.measured_us, pair.measured_us * math.exp(error)
        cases.setdefault(tuple(pair.what.split()[:3]), []).append(times)
    agree = [
        (p < q) == (a < b)
        for times in cases.values()
        for (a, p), (b, q) in itertools.combinations(times, 2)
        if max(a, b) > DIFFERENT * min(a, b)
    ]
    return sum(agree) / len(agree) if agree else 1.0


def fit(
    pairs: Sequence[Pair], names: Sequence[str] = NAMES, constants: Constants = model.CONSTANTS
) -> Constants:
    """Constants with the smallest distance near the given ones, by Levenberg and Marquardt's steps
    in their logarithms: all at once, since several of them explain the same times.
    """
    import torch

    def moved(step: Sequence[float]) -> Constants:
        values = {
            name: min(getattr(constants, name) * math.exp(s), MOST.get(name, math.inf))
            for name, s in zip(names, step, strict=True)
        }
        return msgspec.structs.replace(constants, **values)

    best, damping = distance(pairs, constants), FIRST_DAMPING
    while damping < LAST_DAMPING:
        now = torch.tensor(errors(pairs, constants), dtype=torch.float64)
        columns = []
        for number in range(len(names)):
            # down, since shares may be at their most
            step = [-DIFFERENCE * (number == n) for n in range(len(names))]
            changed = torch.tensor(errors(pairs, moved(step)), dtype=torch.float64)
            columns.append((changed - now) / -DIFFERENCE)
        slope = torch.stack(columns, dim=1)
        normal = slope.T @ slope
        weight = damping * (normal.diagonal() + EPSILON).diag()
        solution = torch.linalg.solve(normal + weight, -slope.T @ now)
        other = moved(solution.clamp(-LONGEST, LONGEST).tolist())
        tried = distance(pairs, other)
        if tried < best * (1 - 1e-6):
            best, constants, damping = tried, other, max(damping / 3, FIRST_DAMPING / 100)
        else:
            damping *= 4
    return constants


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--fixed", default="", help="constants that stay, separated by commas")
    given = parser.parse_args()
    pairs = read(given.files)
    fixed = given.fixed.split(",") if given.fixed else []
    if unknown := set(fixed) - set(NAMES):
        parser.error(f"--fixed: got {', '.join(sorted(unknown))}, expected of {', '.join(NAMES)}")
    fitted = fit(pairs, [name for name in NAMES if name not in fixed])
    print(f"{len(pairs)} pairs of {', '.join(sorted({p.device.name for p in pairs}))}")
    print("| constant | before | after |\n|---|--:|--:|")
    for name in NAMES:
        print(f"| {name} | {getattr(model.CONSTANTS, name):.4g} | {getattr(fitted, name):.4g} |")
    for title, how in (("error, root of the mean square", distance), ("in order", in_order)):
        before, after = (100 * how(pairs, c) for c in (model.CONSTANTS, fitted))
        print(f"| {title} | {before:.1f} % | {after:.1f} % |")


if __name__ == "__main__":
    main()
