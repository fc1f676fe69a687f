"""Many objects of a few shapes as JSON in a fraction of its length: names of fields are written
once. `unpack` in templates/page.js is the way back.
"""

from __future__ import annotations

from typing import Any

Shapes = list[list[str]]
"""The names of fields of each shape, in the order in which its objects have their values."""

_LIST = -1


def pack(value: Any, shapes: Shapes) -> Any:
    """A value as it is, but a dictionary as [number of its shape, *values] and a list as
    [-1, *items]; shapes that are new are added.
    """
    if isinstance(value, dict):
        names = list(value)
        if names not in shapes:
            shapes.append(names)
        return [shapes.index(names), *(pack(one, shapes) for one in value.values())]
    if isinstance(value, (list, tuple)):
        return [_LIST, *(pack(one, shapes) for one in value)]
    return value
