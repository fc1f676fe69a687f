"""One problem: an operator at a number of rows, a hidden size and a dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from lntune import bounds
from lntune.errors import InputError, got_expected, unknown

if TYPE_CHECKING:
    from lntune.device import Device

DTYPES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Element types kernels are built for, with their size in bytes."""

_SHORT = {"float": "float32", "double": "float64", "half": "float16"}
_SHORT |= {"f32": "float32", "fp32": "float32", "f64": "float64", "fp64": "float64"}
_SHORT |= {"f16": "float16", "fp16": "float16", "bf16": "bfloat16"}
"""What else people call dtypes."""

MAX_HIDDEN = 65_536

# One schedule rarely suits one row and 16k rows alike; within a factor of eight or so it does. A
# record serves its bucket. The last is for data beyond every cache, whose output is best written
# around it.
BUCKETS: tuple[tuple[int, int], ...] = (
    (1, 1),
    (2, 15),
    (16, 127),
    (128, 1023),
    (1024, 16_383),
    (16_384, 2**62),
)
"""Row buckets as (first, last), both included."""

TYPICAL_ROWS = (1, 8, 32, 512, 4096, 32_768)
"""For each bucket the number of rows that stands for it: what is tuned by default and what an
untuned call is planned as.
"""

MOST_BLOCKS = {"cpu": TYPICAL_ROWS, "gpu": tuple(last for _, last in BUCKETS)}
"""For each bucket the most blocks of rows that keep sums of their own, by the kind of device: as
many as typical rows on a CPU, where blocks without a row cost what the others do; as many as there
may be rows on a GPU, where such blocks end at once and blocks with several rows take as many turns.
"""


def dtype_name(name: str) -> str:
    """A dtype by PyTorch's name: "bfloat16" for "bf16", "BFloat16" or "torch.bfloat16"; what is not
    known stays as it is.
    """
    plain = name.strip().lower().removeprefix("torch.")
    plain = _SHORT.get(plain, plain)
    return plain if plain in DTYPES or plain == "float64" else name


def bucket_of(rows: int) -> int:
    """Index into BUCKETS of the bucket that holds `rows` (0 rows fall into the first)."""
    for index, (_, last) in enumerate(BUCKETS):
        if rows <= last:
            return index
    raise InputError(got_expected("rows", rows, f"at most {BUCKETS[-1][1]}"))


def bucket_label(bucket: int) -> str:
    """A bucket as a person reads it: "1", "2-15", "16384+"."""
    first, last = BUCKETS[bucket]
    if first == last:
        return str(first)
    return f"{first}+" if bucket == len(BUCKETS) - 1 else f"{first}-{last}"


class Case(msgspec.Struct, frozen=True, order=True):
    """One problem to build, check or measure.

    `rows` is the number of rows measured (kernels themselves take any number). `variant` names what
    is compiled in beside the shape, in the operator's own words (see its op file); the empty string
    is the operator's default. A short name of a dtype ("bf16") is taken for the whole one.
    """

    op: bounds.Identifier
    hidden: int
    dtype: bounds.Name
    rows: bounds.Rows
    variant: bounds.Name = ""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            self._understand(str(self.dtype))
        for name, size in (("hidden", self.hidden), ("rows", self.rows)):
            if not isinstance(size, int):
                raise InputError(got_expected(name, repr(size), "a whole number"))
        if not 1 <= self.hidden <= MAX_HIDDEN:
            remedy = "Larger rows are left to eager mode." if self.hidden > MAX_HIDDEN else ""
            raise InputError(got_expected("hidden", self.hidden, f"1 to {MAX_HIDDEN}", remedy))
        if self.rows < 0:
            raise InputError(got_expected("rows", self.rows, "0 or more"))

    def _understand(self, dtype: str) -> None:
        """Put PyTorch's name in the place of another name of a dtype."""
        name = dtype_name(dtype)
        if name == "float64":
            raise InputError(
                got_expected(
                    "dtype",
                    name,
                    ", ".join(DTYPES),
                    "No kernel is built for it: eager mode serves it.",
                )
            )
        if name not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
        msgspec.structs.force_setattr(self, "dtype", name)

    @property
    def bucket(self) -> int:
        """Index of the row bucket this case falls into."""
        return bucket_of(self.rows)

    @property
    def typical(self) -> Case:
        """The case that stands for this one's row bucket: what is decided or built for one is for
        all of them.
        """
        return msgspec.structs.replace(self, rows=TYPICAL_ROWS[self.bucket])

    def blocks(self, device: Device) -> int:
        """Blocks of rows that keep sums of their own from call to call on a device: one for each
        core, and no more than MOST_BLOCKS.

        The same for all of a row bucket, so that whoever keeps the sums knows their shape without
        knowing the kernel.
        """
        return max(1, min(device.cores, MOST_BLOCKS[device.kind][self.bucket]))

    @property
    def itemsize(self) -> int:
        """Bytes per element of the input."""
        return DTYPES[self.dtype]

    def __str__(self) -> str:
        variant = f" {self.variant}" if self.variant else ""
        return f"{self.op} {self.rows}x{self.hidden} {self.dtype}{variant}"
