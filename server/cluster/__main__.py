"""`python -m server.cluster`: serves on several replicas, on this machine or on a Ray cluster."""

import sys

from lori.interrupt import end_by_interrupt


def main() -> int:
    """Run the program and return its exit code, see `server.cluster.program`. Until it starts Ray, Ctrl+C ends it at once."""
    end_by_interrupt()
    from server.cluster.program import run  # noqa: PLC0415  # importing takes a while, and Ctrl+C must end it, too

    return run()


if __name__ == "__main__":
    sys.exit(main())
