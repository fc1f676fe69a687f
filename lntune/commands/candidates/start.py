"""Measure the candidates of this folder here: `python measure.py`, as often as you like.

It takes PyTorch (with NumPy) and apache-tvm-ffi 0.1.14, and neither TVM nor a compiler nor an
installed lntune. Killed at any moment, the same command goes on. What is measured lies in records/;
`lntune import FOLDER` brings it home.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
NEEDED = {"torch": "PyTorch", "tvm_ffi": "apache-tvm-ffi==0.1.14.*", "numpy": "NumPy"}


def altered(files: dict[str, str]) -> list[str]:
    """The files that are not what was written."""
    return [
        name
        for name, digest in files.items()
        if not (HERE / name).is_file()
        or hashlib.sha256((HERE / name).read_bytes()).hexdigest() != digest
    ]


def main() -> int:
    """Look whether all is there and whole, then measure; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", default="", help="the device, where there are several: cuda:1")
    parser.add_argument(
        "--minutes", type=float, default=0, help="when to end; the next call goes on"
    )
    parser.add_argument("--trial-seconds", type=float, default=0.2, help="of each candidate")
    given = parser.parse_args()
    manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    if wrong := altered(manifest["files"]):
        print(f"measure.py: altered or missing: {', '.join(wrong[:5])}. Copy the folder again.")
        return 2
    sys.path[:0] = [str(HERE)]
    sys.path.append(str(HERE / "packages"))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    for module, name in NEEDED.items():
        try:
            __import__(module)
        except ImportError as e:
            print(f"measure.py: {name} cannot be imported here: {e}.")
            return 2
    try:
        import msgspec  # noqa: F401
    except ImportError as e:
        print(
            f"measure.py: msgspec cannot be imported: {e}. The one that came along is for Python"
            f" {manifest['python']}; use that, or pip install msgspec."
        )
        return 2
    own = [str(path) for path in sorted(HERE.glob("schedules_*"))]
    os.environ["LNTUNE_CACHE_DIR"] = str(HERE / "cache")
    os.environ["LNTUNE_LOG_DIR"] = str(HERE / "records")
    os.environ["LNTUNE_SHIPPED_LOGS"] = "0"
    os.environ["LNTUNE_SCHEDULES"] = os.pathsep.join(own)
    from lntune.commands.candidates import measure

    return measure.main(HERE, given.target, given.minutes, given.trial_seconds)


if __name__ == "__main__":
    sys.exit(main())
