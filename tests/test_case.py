"""Cases: what is refused, and which row bucket holds what."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lntune import backends
from lntune.case import BUCKETS, DTYPES, MAX_HIDDEN, TYPICAL_ROWS, Case, bucket_label, bucket_of
from lntune.errors import InputError, UnknownNameError

GOOD: dict[str, Any] = {"op": "layer_norm", "hidden": 768, "dtype": "float32", "rows": 64}


@pytest.mark.parametrize(
    "change",
    [
        {"hidden": 1},
        {"hidden": MAX_HIDDEN},
        {"rows": 0},
        {"rows": 2**40},
        *({"dtype": d} for d in DTYPES),
    ],
)
def test_the_limits_are_included(change: dict[str, Any]) -> None:
    """The smallest and the largest sizes and every dtype make a case."""
    case = Case(**{**GOOD, **change})
    assert all(getattr(case, name) == value for name, value in change.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 0}, f"hidden: got 0, expected 1 to {MAX_HIDDEN}."),
        ({"hidden": -5}, f"hidden: got -5, expected 1 to {MAX_HIDDEN}."),
        (
            {"hidden": MAX_HIDDEN + 1},
            (
                f"hidden: got {MAX_HIDDEN + 1}, expected 1 to {MAX_HIDDEN}. Larger rows are left to"
                " eager mode."
            ),
        ),
        ({"rows": -1}, "rows: got -1, expected 0 or more."),
        ({"hidden": 768.0}, "hidden: got 768.0, expected a whole number."),
        ({"hidden": "768"}, "hidden: got '768', expected a whole number."),
        ({"rows": 1.5}, "rows: got 1.5, expected a whole number."),
        ({"rows": None}, "rows: got None, expected a whole number."),
    ],
)
def test_sizes_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    """A size outside its limits, or no whole number, is an InputError (a ValueError) saying
    argument, got and expected.
    """
    with pytest.raises(InputError) as caught:
        Case(**{**GOOD, **change})
    assert str(caught.value) == message
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float23", "float32"), ("bfloat", "bfloat16"), ("fp31", "")]
)
def test_a_dtype_that_is_none(dtype: str, expected: str) -> None:
    """An unknown dtype is answered with the one that was probably meant and all there are."""
    hint = rf" Did you mean '{expected}'\?" if expected else ""
    with pytest.raises(
        UnknownNameError, match=rf"unknown dtype '{dtype}'.{hint} Known: bfloat16, float16, float32"
    ):
        Case(**{**GOOD, "dtype": dtype})


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("bf16", "bfloat16"),
        ("fp32", "float32"),
        ("fp16", "float16"),
        ("half", "float16"),
        ("Float16", "float16"),
        ("torch.bfloat16", "bfloat16"),
    ],
)
def test_a_dtype_by_another_name(dtype: str, expected: str) -> None:
    """What people call a dtype is understood: the case is the one of PyTorch's name, also as a
    key.
    """
    assert Case(**{**GOOD, "dtype": dtype}) == Case(**{**GOOD, "dtype": expected})
    assert {Case(**{**GOOD, "dtype": dtype}): 1}[Case(**{**GOOD, "dtype": expected})]


@pytest.mark.parametrize("dtype", ["float64", "double", "fp64"])
def test_float64_is_eagers(dtype: str) -> None:
    """float64 is no typing mistake: the error says who serves it."""
    with pytest.raises(InputError) as caught:
        Case(**{**GOOD, "dtype": dtype})
    assert (
        str(caught.value)
        == "dtype: got float64, expected float32, float16, bfloat16. No kernel is built for it:"
        " eager mode serves it."
    )


def test_a_decoded_case_is_checked_too() -> None:
    """A case read from JSON passes the same checks as one made in Python."""
    good = msgspec.json.encode(Case(**GOOD))
    assert msgspec.json.decode(good, type=Case) == Case(**GOOD)
    with pytest.raises((InputError, msgspec.ValidationError), match="hidden: got 0"):
        msgspec.json.decode(good.replace(b"768", b"0"), type=Case)


def test_buckets_are_a_partition() -> None:
    """The buckets begin at 1 and follow one another without gap or overlap."""
    assert BUCKETS[0][0] == 1
    assert all(first <= last for first, last in BUCKETS)
    assert all(after[0] == before[1] + 1 for before, after in pairwise(BUCKETS))


@given(rows=st.integers(1, 2**62) | st.integers(1, 3000))
def test_rows_lie_in_their_bucket(rows: int) -> None:
    """Any number of rows lies between the ends of the bucket it is said to be in, and in no
    other.
    """
    first, last = BUCKETS[bucket_of(rows)]
    assert first <= rows <= last
    assert sum(a <= rows <= b for a, b in BUCKETS) == 1
    assert Case("layer_norm", 8, "float32", rows).bucket == bucket_of(rows)


def test_no_rows_and_too_many() -> None:
    """No rows fall into the first bucket; more than a machine can address are refused."""
    assert bucket_of(0) == 0
    with pytest.raises(InputError, match="rows: got"):
        bucket_of(2**62 + 1)


def test_bucket_labels() -> None:
    """Buckets read as a person writes them: one number, a range, an open end; no two alike."""
    labels = [bucket_label(i) for i in range(len(BUCKETS))]
    assert labels[0] == "1"
    assert labels[1] == f"2-{BUCKETS[1][1]}"
    assert labels[-1] == f"{BUCKETS[-1][0]}+"
    assert len(set(labels)) == len(labels)


def test_a_case_on_one_line() -> None:
    """A case prints as operator, rows x hidden, dtype and, where there is one, the variant."""
    assert str(Case(**GOOD)) == "layer_norm 64x768 float32"
    assert str(Case(**GOOD, variant="plain")) == "layer_norm 64x768 float32 plain"


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_itemsize(dtype: str, size: int) -> None:
    """`itemsize` is the bytes of one input element."""
    assert Case(**{**GOOD, "dtype": dtype}).itemsize == size


@pytest.mark.parametrize("bucket", range(len(BUCKETS)))
@pytest.mark.parametrize("target", ["cpu", *(f"{name}:sm_90" for name in ("cuda", "emulated"))])
def test_blocks_of_sums(target: str, bucket: int) -> None:
    """As many as the device has cores for, alike in all of a bucket: on a GPU no more than the
    bucket has rows, so that each row may have a block; on a CPU no more than the typical rows.
    """
    of_rows = BUCKETS[bucket][1] if "sm_90" in target else TYPICAL_ROWS[bucket]
    for cores in (1, 2, 100, 132):
        device = msgspec.structs.replace(backends.device_of(target), cores=cores)
        for rows in (*BUCKETS[bucket], TYPICAL_ROWS[bucket]):
            case = Case("lnlstm_step_backward", 64, "float32", rows)
            assert case.blocks(device) == min(cores, of_rows)
