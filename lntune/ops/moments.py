"""Mean and variance of rows, and the rows normalized by them, in expressions of TVM's tensor
language (TE).

The variance is centred (two passes over a row that stays on chip), never E[x^2] - mean^2, which
loses all digits when |mean| >> sigma. The second pass also sums the deviations themselves: their
mean is what rounding took from the first mean, and taking it off again keeps rows with |mean| >>
sigma, and constant rows, exact (the corrected two-pass algorithm; Chan, Golub, LeVeque: *Algorithms
for Computing the Sample Variance*, The American Statistician 37(3), 1983, eq. 1.7).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lntune.ops.op import RowSum, Term, Total


@dataclass(frozen=True)
class Normalized:
    """A normalized row: its elements (x - mean) * rstd as an expression of row and element, and
    both moments of the row.
    """

    value: Term
    mean: Total
    rstd: Total


def normalize(
    row_sum: RowSum,
    rows: Any,
    hidden: int,
    x: Term,
    eps: Any,
    prefix: str = "",
    inside: Term | None = None,
) -> Normalized:
    """Rows of float32 expressions normalized over their `hidden` elements.

    Stages, in order, their names after `prefix`: sum, mean0, centred (the deviations and their
    squares), delta, variance, scale, shift. `inside` says which elements of what `row_sum` sums are
    the row's, where others, which are 0, are summed, too.
    """
    from tvm import te, tirx

    n, zero, one = (tirx.const(value, "float32") for value in (float(hidden), 0.0, 1.0))

    def per_row(name: str, f: Any) -> Any:
        return te.compute((rows,), f, name=prefix + name)

    (total,) = row_sum(rows, hidden, (x,), f"{prefix}sum")
    mean0 = per_row("mean0", lambda i: total(i) / n)

    def deviation(i: Any, k: Any) -> Any:
        return x(i, k) - mean0[i]

    def counted(i: Any, k: Any) -> Any:
        value = deviation(i, k)
        return value if inside is None else tirx.Select(inside(i, k), value, zero)

    deviations, squares = row_sum(
        rows,
        hidden,
        (counted, lambda i, k: counted(i, k) * counted(i, k)),
        f"{prefix}centred",
    )
    delta = per_row("delta", lambda i: deviations(i) / n)
    # Rounding may leave a variance just below 0; the comparison is written so that NaN stays NaN.
    raw = per_row("variance", lambda i: squares(i) / n - delta[i] * delta[i])
    scale = per_row(
        "scale", lambda i: one / tirx.sqrt(tirx.Select(raw[i] < zero, zero, raw[i]) + eps)
    )
    shift = per_row("shift", lambda i: delta[i] * scale[i])
    return Normalized(
        lambda i, k: deviation(i, k) * scale[i] - shift[i],
        lambda i: mean0[i] + delta[i],
        lambda i: scale[i],
    )
