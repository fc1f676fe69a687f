"""What is read from files may be anybody's: types that say how long, how many and how large, held
to while JSON is decoded. Values made in this process are not looked at.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from msgspec import Meta

Identifier: TypeAlias = Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,99}\Z")]
"""A name that files and folders may be called by: nothing that leads elsewhere."""
_PLAIN = r"^[^\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]*\Z"
Name: TypeAlias = Annotated[str, Meta(max_length=200, pattern=_PLAIN)]
"""Words on one line that do nothing to a terminal."""
Text: TypeAlias = Annotated[str, Meta(max_length=10_000, pattern=_PLAIN)]
Sentence: TypeAlias = Annotated[str, Meta(max_length=10_000)]
Moment: TypeAlias = Annotated[str, Meta(max_length=40, pattern=r"^[0-9TZ:.+ -]*\Z")]
"""A time in ISO 8601, or nothing where it is not known."""
Count: TypeAlias = Annotated[int, Meta(ge=0, le=1 << 50)]
Cores: TypeAlias = Annotated[int, Meta(ge=1, le=1 << 20)]
Rows: TypeAlias = Annotated[int, Meta(ge=0, le=1 << 62)]
Whole: TypeAlias = Annotated[int, Meta(ge=-(1 << 62), le=1 << 62)]
Error: TypeAlias = Annotated[float, Meta(ge=0)]
Microseconds: TypeAlias = Annotated[float, Meta(ge=1e-6, le=1e15)]
"""A time that something took: nobody divides by nothing."""
Ratio: TypeAlias = Annotated[float, Meta(ge=1e-12, le=1e24)]
FEW = Meta(max_length=64)
"""Of a mapping or a sequence of what a person could name."""
SAMPLES = Meta(max_length=1 << 16)
