"""`python -m lori`: commands for the adapters on this machine. Exit codes: 0 fine, 1 something is wrong, 2 bad options."""

import sys

from lori.cli.program import main

if __name__ == "__main__":
    sys.exit(main())
