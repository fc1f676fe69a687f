"""What won cases that are like the one in hand: the first to be tried after the default knobs. Most
of what is best at one hidden size is good at the next.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping

from lntune.case import DTYPES, Case
from lntune.log.records import Key, Record
from lntune.measure.jobs import Candidate
from lntune.tune.earlier import candidate_of

MOST = 2
"""Winners that are tried; each is a trial."""
OTHER_WIDTH, OTHER_DTYPE = 2.0, 0.5
"""How far apart dtypes of several widths are, and others: in doublings of the hidden size, which a
row bucket counts as one of.
"""


def winners(
    finals: Mapping[Key, Record], case: Case, fitting: Container[Candidate]
) -> list[Candidate]:
    """The winners of the cases nearest to one, of the finals that count, that fit it; not that of
    the case itself, which is tried last (see run.Run.search).
    """
    own = Key.of(case)
    near = sorted((key for key in finals if key != own), key=lambda key: (distance(own, key), key))
    found = (candidate_of(finals[key]) for key in near)
    distinct = dict.fromkeys(c for c in found if c is not None and c in fitting)
    return list(distinct)[:MOST]


def distance(one: Key, other: Key) -> float:
    """How unlike two cases of an operator are."""
    apart = abs(math.log2(one.hidden) - math.log2(other.hidden)) + abs(one.bucket - other.bucket)
    if one.dtype == other.dtype:
        return apart
    return apart + (OTHER_DTYPE if DTYPES[one.dtype] == DTYPES[other.dtype] else OTHER_WIDTH)
