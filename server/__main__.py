"""`python -m server`: serves the embedded model and the demo adapters, or whatever its flags name."""

import sys

from lori.interrupt import end_by_interrupt


def main() -> int:
    """Run the program and return its exit code, see `server.program`. Until the server listens, Ctrl+C ends it at once."""
    end_by_interrupt()
    from server.program import run  # noqa: PLC0415  # importing takes a while, and Ctrl+C must end it, too

    return run()


if __name__ == "__main__":
    sys.exit(main())
