"""How the programs of this package end: what was raised on purpose, and what the system refuses, is said in a line."""

import os
import sys
from collections.abc import Callable

from safetensors import SafetensorError

from lori.errors import LoriError


def ended(program: Callable[[], str], interrupted: str = "interrupted") -> int:
    """Runs `program`, prints what it returns, and returns the exit code.

    Of processes of `torchrun` the first one speaks; the others say errors alone, which may be theirs alone, and which they are.
    """
    process = os.environ.get("RANK", "0")
    speaks = process == "0"
    try:
        said = program()
    except (LoriError, OSError, SafetensorError) as error:
        print("error:" if speaks else f"error of process {process}:", error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if speaks:
            print(interrupted, file=sys.stderr)
        return 130
    if speaks:
        print(said)
    return 0
