"""`python -m lori`: the adapters on this machine. Exits with 0, with 1 where something is wrong, or 2 where the options are."""

import sys

from lori.cli.program import main

if __name__ == "__main__":
    sys.exit(main())
