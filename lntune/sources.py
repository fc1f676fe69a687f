"""The hash of everything that a schedule's kernels are made of: change it, and its records are stale and its kernels built anew."""

from __future__ import annotations

import functools
import hashlib
import io
import re
import tokenize
from pathlib import Path

from lntune import paths

MAKES_CODE: tuple[str, ...] = ("loops.py", "gpu/threads.py", "gpu/columns.py", "gpu/gates.py", "gpu/turns.py", "streaming.py", "sums.py")
MAKES_CODE += ("gpu/functions.py", "gpu/lowering.py", "gpu/phases.py", "gpu/ragged.py", "cuda/hints.py", "cuda/private.py")
MAKES_CODE += ("ops/activations.py", "ops/dtypes.py", "ops/moments.py")
"""Modules whose content decides what kernels are made of, where a schedule, an operator or another of them imports them."""
_EVERY_GPU_KERNEL = ("gpu/threads.py", "gpu/lowering.py", "device_code.py")
"""What every kernel of a GPU goes through."""
_IMPORTS = re.compile(r"^\s*from lntune\S* import (?:\([^)]*\)|.*)", re.MULTILINE)


def text_of(path: Path) -> str:
    """A Python file's text, in the encoding that it says it is in."""
    with tokenize.open(path) as file:
        return file.read()


def source_hash(path: Path, op: str, kind: str) -> str:
    """Hash of the schedule's file, its operator's file, the transformations that they import, directly or not, and for GPUs the way to CUDA
    source.
    """
    package = paths.PACKAGE
    texts = [text_of(part) for part in (path, package / "ops" / f"{op}.py") if part.is_file()]
    used: dict[str, str] = {}

    def use(name: str) -> None:
        if name not in used:
            used[name] = (package / name).read_text(encoding="utf-8")
            follow(used[name])

    def follow(text: str) -> None:
        imports = "\n".join(_IMPORTS.findall(text))
        for name in MAKES_CODE:
            if re.search(rf"\b{Path(name).stem}\b", imports):
                use(name)

    for text in texts:
        follow(text)
    for name in _EVERY_GPU_KERNEL if kind == "gpu" else ():
        use(name)
    digest = hashlib.sha256()
    for text in [*texts, *(used[name] for name in dict.fromkeys((*MAKES_CODE, *_EVERY_GPU_KERNEL)) if name in used)]:
        digest.update(code_of(text).encode())
    return digest.hexdigest()[:12]


@functools.cache  # most of the files are in several schedules' hashes
def code_of(text: str) -> str:
    """Python source without comments, docstrings and blank lines, so that rewording does not make measurements stale.

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
