"""Compiler flags of each instruction set, read from the kernels' CMakeLists.txt.

`python -m tests.lori.instruction_sets` prints the sets to which a test run can be limited.
"""

import re
from pathlib import Path

from lori import native
from lori.native import instruction_sets

LISTS = (Path(native.__file__).parent / "kernels" / "native" / "CMakeLists.txt").read_text(encoding="utf-8")
VARIABLES = dict(re.findall(r"set\((\w+) (-m[^)]*)\)", LISTS))
FLAGS = {"portable": ""} | {
    name: re.sub(r"\$\{(\w+)\}", lambda variable: VARIABLES[variable[1]], flags)
    for name, flags in re.findall(r"^ *add_instruction_set\((\w+) ([^)]*)\)", LISTS, re.MULTILINE)
}


def lower_sets() -> tuple[str, ...]:
    """Return the instruction sets below the best one that this process may use, the fastest first."""
    return instruction_sets()[1:]


if __name__ == "__main__":
    print(*lower_sets())
