"""python -m lntune."""

from lntune.cli import main

main()
