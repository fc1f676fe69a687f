"""Whether the source files that a kernel was built of have changed, so that a checkout's cached
kernels follow each edit of its code.

Records are told apart by versions (`lntune/versions.py`), but somebody who works on a schedule does
not raise a number at each attempt.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import io
import sys
import tokenize
from collections.abc import Mapping, Sequence
from pathlib import Path

from lntune.system import paths

_MAKE_CODE = (
    "ops/*.py",
    "transforms/**/*.py",
    "backends/cpu/*.py",
    "backends/cuda/*.py",
    "kernels/compiler.py",
)
"""Where in the package the code of kernels comes from: more than any one schedule uses."""
_TEXTS, _CODE = "texts", "code"


def text_of(path: Path) -> str:
    """A Python file's text, in the encoding that it says it is in."""
    with tokenize.open(path) as file:
        return file.read()


def code_hash(schedule: Path) -> str:
    """Hash of the code of a schedule's file and of the modules of its author that it imports."""
    return _joined([schedule, *imported(schedule)])


def imported(path: Path) -> list[Path]:
    """The files that a Python file imports, directly or not, also inside functions, and that are
    neither Python's, nor of an installed package, nor lntune's: what the author of a schedule may
    edit as well.
    """
    files: list[Path] = []

    def follow(file: Path, package: str) -> None:
        try:
            tree = ast.parse(file.read_bytes())
        except (OSError, SyntaxError, ValueError):
            return
        names = [name for node in ast.walk(tree) for name in _names(node, package)]
        for name in dict.fromkeys(names):
            origin, inside = _origin(name)
            if origin is not None and origin not in (path, *files) and _editable(origin):
                files.append(origin)
                follow(origin, inside)

    follow(path, "")
    return files


def _names(node: ast.AST, package: str) -> list[str]:
    """The modules that a statement may import, by their whole names; `package` is that of the file
    it is in.
    """
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    if not node.level:
        base = node.module or ""
    elif package:
        parents = package.split(".")
        modules = [node.module] if node.module else []
        base = ".".join([*parents[: len(parents) - node.level + 1], *modules])
    else:
        return []
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


def _origin(name: str) -> tuple[Path | None, str]:
    """(a module's file, the package it is in); no file where there is no such module, or it is no
    file of Python's.
    """
    python = (*sys.stdlib_module_names, *sys.builtin_module_names)
    if name.partition(".")[0] in (*python, "lntune", "tvm", "torch"):
        return None, ""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, AttributeError, ValueError):  # a name in a module, say
        return None, ""
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None, ""
    is_package = spec.submodule_search_locations is not None
    return Path(spec.origin), spec.name if is_package else spec.parent or ""


def _editable(path: Path) -> bool:
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return not installed and paths.PACKAGE not in path.parents


def _joined(files: Sequence[Path]) -> str:
    return hashlib.sha256("".join(map(_hash_of, files)).encode()).hexdigest()[:12]


def _hash_of(path: Path) -> str:
    """Hash of a Python file's code; of its content where that is no Python."""
    try:
        return hashlib.sha256(code_of(text_of(path)).encode()).hexdigest()[:12]
    except (SyntaxError, UnicodeError, tokenize.TokenError):
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def _package() -> list[Path]:
    return sorted(path for pattern in _MAKE_CODE for path in paths.PACKAGE.glob(pattern))


def _own(schedule: Path) -> list[Path]:
    return [*([schedule] if schedule.is_file() else []), *imported(schedule)]


def _bytes_hash(files: Sequence[Path]) -> str:
    """Hash of files as they are: quickly made, and another one after any change."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@functools.cache
def _package_texts() -> str:
    return _bytes_hash(_package())


@functools.cache
def _texts(schedule: Path) -> str:
    """Hash of the files as they are."""
    return f"{_bytes_hash(_own(schedule))}-{_package_texts()}"


@functools.cache
def _code(schedule: Path) -> str:
    """Hash of the files' code; words in them may change."""
    return _joined([*_own(schedule), *_package()])


def stamp(schedule: Path) -> dict[str, str]:
    """What to keep with a kernel of the schedule in this file, for `unchanged`."""
    return {_TEXTS: _texts(schedule), _CODE: _code(schedule)}


def unchanged(hashes: Mapping[str, str], schedule: Path) -> bool:
    """True when the code is what it was when `stamp` gave these hashes."""
    return hashes.get(_TEXTS) == _texts(schedule) or hashes.get(_CODE) == _code(schedule)


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
    words = [t for t in tokens if t.type not in skipped]
    for before, token, after in zip([None, *words], words, words[1:], strict=False):
        begins = before is None or before.type == tokenize.NEWLINE
        if token.type == tokenize.STRING and begins and after.type == tokenize.NEWLINE:
            cuts.append((token.start, token.end))
    for (top, left), (bottom, right) in sorted(cuts, reverse=True):
        rest = lines[top - 1][:left] + lines[bottom - 1][right:]
        lines[top - 1 : bottom] = [rest]
    return "\n".join(line.rstrip() for line in lines if line.strip())
