"""Whether the files that a kernel was built of are still what they were: what makes a checkout's cached kernels follow each change of its code.

A release is told by its versions (`lntune/versions.py`); somebody who works on a schedule does not raise a number at each attempt.
"""

from __future__ import annotations

import functools
import hashlib
import io
import tokenize
from collections.abc import Mapping
from pathlib import Path

from lntune import paths

_MAKE_CODE = ("ops/*.py", "gpu/*.py", "cuda/*.py", "loops.py", "streaming.py", "strides.py", "sums.py", "device_code.py", "build.py")
"""Where in the package the code of kernels comes from, besides schedules: more than any one of them uses."""
_TEXTS, _CODE = "texts", "code"


def text_of(path: Path) -> str:
    """A Python file's text, in the encoding that it says it is in."""
    with tokenize.open(path) as file:
        return file.read()


def file_hash(path: Path) -> str:
    """Hash of a Python file's code; of its content where that is no Python."""
    try:
        return hashlib.sha256(code_of(text_of(path)).encode()).hexdigest()[:12]
    except (SyntaxError, UnicodeError, tokenize.TokenError):
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def _files(schedule: Path) -> list[Path]:
    own = [schedule] if schedule.is_file() else []
    return [*own, *sorted(path for pattern in _MAKE_CODE for path in paths.PACKAGE.glob(pattern))]


@functools.cache
def _texts(schedule: Path) -> str:
    """Hash of the files as they are: quickly made, and another one after any change."""
    digest = hashlib.sha256()
    for path in _files(schedule):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@functools.cache
def _code(schedule: Path) -> str:
    """Hash of the files' code; words in them may change."""
    return hashlib.sha256("".join(file_hash(path) for path in _files(schedule)).encode()).hexdigest()[:12]


def stamp(schedule: Path) -> dict[str, str]:
    """What to keep with a kernel of the schedule in this file, for `unchanged`."""
    return {_TEXTS: _texts(schedule), _CODE: _code(schedule)}


def unchanged(kept: Mapping[str, str], schedule: Path) -> bool:
    """True when the code is what it was when `kept` was made by `stamp`."""
    return kept.get(_TEXTS) == _texts(schedule) or kept.get(_CODE) == _code(schedule)


@functools.cache
def code_of(text: str) -> str:
    """Python source without comments, docstrings and blank lines.

    Cut out by position: the text of tokens and syntax trees differs between Python versions.
    """
    lines = text.splitlines()
    cuts: list[tuple[tuple[int, int], tuple[int, int]]] = []
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING)
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    cuts += [(t.start, t.end) for t in tokens if t.type == tokenize.COMMENT]
    said = [t for t in tokens if t.type not in skipped]
    for before, token, after in zip([None, *said], said, said[1:], strict=False):
        if token.type == tokenize.STRING and after.type == tokenize.NEWLINE and (before is None or before.type == tokenize.NEWLINE):
            cuts.append((token.start, token.end))
    for (top, left), (bottom, right) in sorted(cuts, reverse=True):
        kept = lines[top - 1][:left] + lines[bottom - 1][right:]
        lines[top - 1 : bottom] = [kept]
    return "\n".join(line.rstrip() for line in lines if line.strip())
