"""Mean and variance of rows, and the rows normalized by them, in expressions of TVM's tensor
language (TE).

The variance is centred (two passes over a row that stays on chip), never E[x^2] - mean^2, which
loses all digits when |mean| >> sigma. The second pass also sums the deviations themselves: their
mean is what rounding took from the first mean, and taking it off again keeps rows with |mean| >>
sigma, and constant rows, exact (the corrected two-pass algorithm; Chan, Golub, LeVeque: *Algorithms
for Computing the Sample Variance*, The American Statistician 37(3), 1983, eq. 1.7).

The first mean may be that of a part of the row, which only shifts what is squared. Of n elements, m
of which have the mean a, the variance is at least m/n (a - mean)^2, whatever they are; so what is
taken off the mean square of the deviations from a, (a - mean)^2, is at most n/m times the variance,
and rounding grows 1 + n/m times at worst: of a fourth of the row, by two or three of float32's 24
bits, in rows whose first part is all of another size than the rest, and by nothing in others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lntune.ops.op import RowSum, Term, Total


@dataclass(frozen=True)
class Normalized:
    """A normalized row: its elements (x - mean) * rstd as expressions of row and column, one for
    each element of a column, and both moments of the row.
    """

    values: tuple[Term, ...]
    mean: Total
    rstd: Total

    @property
    def value(self) -> Term:
        """The only element of a column."""
        (value,) = self.values
        return value


def normalize(
    row_sum: RowSum,
    rows: Any,
    hidden: int,
    x: Term | tuple[Term, ...],
    eps: Any,
    prefix: str = "",
    inside: Term | None = None,
    sample: int = 0,
) -> Normalized:
    """Rows of float32 expressions normalized over their `hidden` elements.

    `x` is an element of a row, or all those of a column where a column has several (`row_sum` then
    has one total of so many terms). The first mean is that of the `sample` first elements of a row,
    or of all.

    Stages, in order, their names after `prefix`: sum, mean0, centred (the deviations and their
    squares), delta, variance, scale, shift. `inside` says which elements of what `row_sum` sums are
    the row's, where others, which are 0, are summed, too.
    """
    from tvm import te, tirx

    elements = x if isinstance(x, tuple) else (x,)
    columns, sampled = hidden // len(elements), sample or hidden
    n, zero, one = (tirx.const(value, "float32") for value in (float(hidden), 0.0, 1.0))

    def per_row(name: str, f: Any) -> Any:
        return te.compute((rows,), f, name=prefix + name)

    (total,) = row_sum(rows, sampled // len(elements), elements, f"{prefix}sum")
    mean0 = per_row("mean0", lambda i: total(i) / tirx.const(float(sampled), "float32"))

    def deviation_of(element: Term) -> Term:
        return lambda i, k: element(i, k) - mean0[i]

    deviations = tuple(map(deviation_of, elements))

    def counted(deviation: Term) -> Term:
        def value(i: Any, k: Any) -> Any:
            return (
                deviation(i, k)
                if inside is None
                else tirx.Select(inside(i, k), deviation(i, k), zero)
            )

        return value

    def squared(value: Term) -> Term:
        return lambda i, k: value(i, k) * value(i, k)

    summed = tuple(map(counted, deviations))
    of_deviations, of_squares = row_sum(
        rows, columns, (*summed, *map(squared, summed)), f"{prefix}centred"
    )
    delta = per_row("delta", lambda i: of_deviations(i) / n)
    # Rounding may leave a variance just below 0; the comparison is written so that NaN stays NaN.
    raw = per_row("variance", lambda i: of_squares(i) / n - delta[i] * delta[i])
    scale = per_row(
        "scale", lambda i: one / tirx.sqrt(tirx.Select(raw[i] < zero, zero, raw[i]) + eps)
    )
    shift = per_row("shift", lambda i: delta[i] * scale[i])

    def normalized(deviation: Term) -> Term:
        return lambda i, k: deviation(i, k) * scale[i] - shift[i]

    return Normalized(
        tuple(map(normalized, deviations)),
        lambda i: mean0[i] + delta[i],
        lambda i: scale[i],
    )
