"""The command `lntune`, and python -m lntune."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point. Ends with exit code 2 where what the command line is made of is not installed;
    calls from PyTorch need none of that.
    """
    try:
        from lntune import cli
    except ModuleNotFoundError as e:
        if e.name is None or e.name.partition(".")[0] == "lntune":
            raise
        sys.exit(_missing(e.name))
    cli.main()


def _missing(module: str) -> int:
    what = (
        f"lntune: the command line needs the package {module}, which is not installed here; calls"
        " from PyTorch do not. "
    )
    sys.stderr.write(
        what + "Install lntune with all that it asks for: pip install lntune, or pip install"
        " 'lntune[tune]' for tuning and building, too.\n"
    )
    return 2


if __name__ == "__main__":
    main()
