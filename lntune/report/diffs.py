"""Two texts of code and what differs in them: side by side where the terminal is wide enough, else
as a unified diff.
"""

from __future__ import annotations

import difflib

CONTEXT = 3
_GAP = 3


def unified(a: str, b: str, names: tuple[str, str]) -> list[str]:
    """What differs, with a few lines around it, as patches have it; nothing where nothing does."""
    lines = difflib.unified_diff(a.splitlines(), b.splitlines(), *names, lineterm="", n=CONTEXT)
    return list(lines)


def side_by_side(a: str, b: str, names: tuple[str, str], width: int) -> list[str] | None:
    """Both texts, whole, each line beside its own in the other: `|` between lines that differ, `<`
    and `>` beside those that one has alone. None where they do not fit into the width.
    """
    left, right = a.splitlines(), b.splitlines()
    column = max(map(len, [*left, names[0]]))
    if column + _GAP + max(map(len, [*right, names[1]])) > width:
        return None

    def line(one: str, sign: str, other: str) -> str:
        return f"{one:<{column}} {sign} {other}".rstrip()

    lines = [line(names[0], " ", names[1])]
    for _, i, end_i, j, end_j in difflib.SequenceMatcher(None, left, right, False).get_opcodes():
        same = left[i:end_i] == right[j:end_j]
        for n in range(max(end_i - i, end_j - j)):
            has_left, has_right = i + n < end_i, j + n < end_j
            sign = " " if same else "|" if has_left and has_right else "<" if has_left else ">"
            lines.append(
                line(left[i + n] if has_left else "", sign, right[j + n] if has_right else "")
            )
    return lines
