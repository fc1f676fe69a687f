"""An environment in which there is only what a plain `pip install lntune` brings: no TVM, no
NumPy of ours, no compiler on PATH.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import venv
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


def requirements() -> dict[str, list[Requirement]]:
    """What lntune asks for by extra; by the empty string, what it asks for without any."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    by_extra = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: [Requirement(r) for r in asked] for extra, asked in by_extra.items()}


def distributions() -> dict[str, importlib.metadata.Distribution]:
    """The installed packages that come with a plain install of lntune, those that they ask for
    among them.
    """
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = list(requirements()[""])
    while waiting:
        one = waiting.pop()
        if one.name in found or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        found[one.name] = importlib.metadata.distribution(one.name)
        waiting += map(Requirement, found[one.name].requires or ())
    return found


def make(folder: Path) -> Path:
    """A Python in a new environment that has these packages, as links, and lntune as it is here;
    the answer is the interpreter.
    """
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    show = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.check_output([python, "-c", show], text=True).strip())
    for one in distributions().values():
        tops = {file.parts[0] for file in one.files or () if file.parts[0] != ".."}
        for top in tops - {"__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(one.locate_file(top))))
    (site / "lntune.pth").write_text(f"{ROOT}\n")
    return python


def run(python: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the interpreter where PATH leads nowhere and no compiler is named."""
    empty = python.parent.parent / "empty"
    empty.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if name not in ("CXX", "PYTHONPATH")}
    return subprocess.run(
        [python, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**kept, "PATH": str(empty), **environment},
        cwd=empty,
    )
