"""Gates of an LSTM that are all but fully open or shut: what is left of them, and of their
derivatives, is next to nothing, and counts beside nothing else.

Columns of a row differ in how far each of their gates is saturated (`COLUMNS`, in turn), and a
kernel is held to each kind by itself (`parts`): what is right to 1e-6 of the largest element may
still have lost all of a gate near 1e-6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lntune.case import Case
from lntune.ops.op import DEFAULT_EPS, Arg, drawn

if TYPE_CHECKING:
    import torch

ROWS = 5
"""Rows of such inputs: a block of four and one left over."""
SHUT, OPEN, TURNED = (-13.0, -17.0, -60.0), 12.0, 7.4
"""What sigmoids are given that are saturated below (2e-6, 4e-8, 9e-27) and above, where 1 minus
them is a hundred roundings of float32; and tanh, of which as little is left as ten roundings.
"""
GATES = {"i": "the input gate", "f": "the forget gate", "g": "the cell's gate", "o": "the output"}
INNER = "tanh of the cell"
_NOISE, _BESIDE = 0.01, 0.01
"""By how much gates differ from row to row, as a share; and what else is added to them."""


class Column(NamedTuple):
    """What a column's gates are given, and tanh of its cell where that is saturated (0: it is not).

    What multiplies a derivative that is judged is about 1: the cell where the forget gate is, its
    tanh where the output gate is, so that not both i and f are shut there.
    """

    i: float = -1.0
    f: float = 2.0
    g: float = 0.9
    o: float = 1.0
    inner: float = 0.0


COLUMNS = (
    Column(i=SHUT[0], f=SHUT[0]),
    Column(i=OPEN, f=OPEN, o=SHUT[0]),
    Column(i=2.0, g=TURNED, o=SHUT[1]),
    Column(i=SHUT[1], f=SHUT[1]),
    Column(inner=TURNED),
    Column(i=0.0, g=-TURNED, o=SHUT[2]),
    Column(i=SHUT[2], f=SHUT[2]),
    Column(inner=-TURNED),
    Column(o=OPEN),
)
"""They come in turn in a row: from nine elements on it has all of them."""


def _signs(hidden: int) -> torch.Tensor:
    """Of the cell, and of the columns' g and inner: either in every kind of column."""
    import torch

    k = torch.arange(hidden, device="cpu", dtype=torch.float64)
    return 1.0 - 2.0 * ((k + k // len(COLUMNS)) % 2)


def _given(hidden: int, name: str) -> torch.Tensor:
    """What is given to a gate in each column, in float64."""
    import torch

    kinds = torch.tensor([getattr(c, name) for c in COLUMNS], dtype=torch.float64, device="cpu")
    given = kinds.repeat(-(-hidden // len(COLUMNS)))[:hidden]
    return given * _signs(hidden) if name in ("g", "inner") else given


def inputs(case: Case, arguments: Sequence[Arg], rows: int, seed: int) -> dict[str, Any]:
    """The forward's inputs by name. Normalized, gates_h is plus and minus 1 with little noise;
    weight_h makes of it what COLUMNS say, all else that is added is small, and weight_c turns tanh.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    hidden, dtype = case.hidden, getattr(torch, case.dtype)
    shaped = {a.name: a.sizes(rows, hidden) for a in arguments if a.role == "in"}
    values = {name: drawn(*sizes, generator=generator) for name, sizes in shaped.items()}
    turns = 1.0 - 2.0 * (torch.arange(4 * hidden, device="cpu", dtype=torch.float64) % 2)
    values["gates_h"] = turns * (1 + _NOISE * values["gates_h"])
    values["c"] = _signs(hidden) * (1 + _NOISE * values["c"])
    given = torch.cat([_given(hidden, name) for name in GATES])
    values["weight_h"] = (given * turns).float()
    for name in ("weight_x", "bias", "bias_c"):
        if name in values:
            values[name] = _BESIDE * values[name]
    if "weight_x" not in values:
        values["gates_x"] = _BESIDE * values["gates_x"]
    i, f, g = (_given(hidden, name) for name in "ifg")
    cell = f.sigmoid() * _signs(hidden) + i.sigmoid() * g.tanh()
    normalized = (cell - cell.mean()) / (cell.var(unbiased=False) + DEFAULT_EPS).sqrt()
    inner = _given(hidden, "inner")
    turned = torch.where(normalized.abs() > 0.1, inner / normalized, inner)  # noqa: PLR2004
    plain = 1 + 0.1 * values["weight_c"]
    values["weight_c"] = torch.where(inner == 0, plain.double(), turned).float()
    return {n: v.to(dtype) for n, v in values.items()} | {"eps": DEFAULT_EPS}


def cotangents(case: Case, rows: int, weight_c: torch.Tensor, seed: int) -> dict[str, Any]:
    """dh and dc_new: 1 or -1 in one row of each column, of one sign in what they add up to, and 0
    in the others, so that a sum over rows is as exact as what it is of. Where tanh is saturated its
    derivative is alone.
    """
    import torch

    hidden, dtype = case.hidden, getattr(torch, case.dtype)
    k = torch.arange(hidden, device="cpu")
    one = torch.zeros(rows, hidden, dtype=torch.float32, device="cpu")
    # of either sign from column to column: else the layer norm takes all from them, their mean
    signs = drawn(hidden, generator=torch.Generator().manual_seed(seed)).sign()
    one[(k + k // len(COLUMNS)) % rows, k] = signs
    into_cell = one * weight_c.float().sign() * (_given(hidden, "inner") == 0)
    return {"dh": one.to(dtype), "dc_new": into_cell.to(dtype)}


def parts(
    case: Case, of_gates: Sequence[str], of_inner: Sequence[str], shut: Mapping[str, str]
) -> dict[str, tuple[str, slice]]:
    """What is judged by itself: a name -> an output and its columns. `of_gates` are outputs as wide
    as the gates, `of_inner` those that have the derivative of the cell's tanh, and `shut` has for
    a gate ("f") the output that is next to nothing where that is shut.
    """
    hidden = case.hidden

    def columns(kind: int, gate: int = 0) -> slice:
        return slice(gate * hidden + kind, (gate + 1) * hidden, len(COLUMNS))

    chosen: dict[str, tuple[str, slice]] = {}
    for kind, column in enumerate(COLUMNS[:hidden]):
        for number, (gate, said) in enumerate(GATES.items()):
            level = getattr(column, gate)
            at = f"{said} near {level:g}"
            if level in (*SHUT, OPEN, TURNED, -TURNED):
                chosen |= {f"{name} of {at}": (name, columns(kind, number)) for name in of_gates}
            if level in SHUT and gate in shut:
                chosen[f"{shut[gate]} of {at}"] = (shut[gate], columns(kind))
        if column.inner:
            at = f"{INNER} near {column.inner:g}"
            chosen |= {f"{name} of {at}": (name, columns(kind)) for name in of_inner}
    return chosen
