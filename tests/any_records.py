"""Records of any content that a log may have, for tests of properties."""

from __future__ import annotations

import datetime
import math
import string
from typing import get_args

from hypothesis import strategies as st

from lntune.case import DTYPES, MAX_HIDDEN, Case
from lntune.device import Device
from lntune.log.records import Record, Setting, Status, Timing
from lntune.versions import Code
from lntune.words import visible

names = st.text(string.ascii_lowercase + "_", min_size=1, max_size=12)
microseconds = st.floats(1e-6, 1e15)
any_text = st.text(max_size=40)
plain_text = any_text.map(visible)
moments = st.sampled_from(["", "2026-01-02"]) | st.datetimes(
    datetime.datetime(2026, 1, 1), datetime.datetime(2026, 2, 1)
).map(lambda at: f"{at.isoformat(timespec='milliseconds')}+00:00")
any_timing = st.builds(Timing, st.lists(microseconds, max_size=5).map(tuple), microseconds)
any_case = st.builds(
    Case,
    op=names,
    hidden=st.integers(1, MAX_HIDDEN),
    dtype=st.sampled_from(sorted(DTYPES)),
    rows=st.integers(0, 2**40),
    variant=names | st.just(""),
)
any_device = st.builds(
    Device,
    kind=st.sampled_from(["cpu", "gpu"]),
    name=st.text(string.printable, max_size=60).map(visible),
    isa=names,
    cores=st.integers(1, 512),
    features=st.lists(names, max_size=3).map(tuple),
    l1=st.integers(0, 2**31),
)
any_record = st.builds(
    Record,
    role=st.sampled_from(["trial", "final"]),
    case=any_case,
    device=any_device,
    threads=st.integers(1, 512),
    schedule=names,
    code=st.builds(Code, st.integers(0, 99) | names, st.integers(0, 99), st.integers(0, 99)),
    knobs=st.dictionaries(
        names, st.integers(-(2**62), 2**62) | st.booleans() | plain_text, max_size=6
    ),
    status=st.sampled_from(get_args(Status)),
    message=any_text,
    timings=st.dictionaries(
        names,
        st.builds(Timing, st.lists(microseconds, max_size=5).map(tuple), microseconds),
        max_size=4,
    ),
    errors=st.dictionaries(names, st.floats(0) | st.just(math.nan), max_size=3),
    versus_eager=st.dictionaries(names, st.floats(0), max_size=3),
    busy=st.none() | st.booleans(),
    default=st.none()
    | st.builds(Setting, names, st.dictionaries(names, st.integers(0, 9), max_size=2)),
    versions=st.dictionaries(plain_text, plain_text, max_size=3),
    run=plain_text,
    time=moments,
)
