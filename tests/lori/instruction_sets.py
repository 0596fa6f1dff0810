"""The compiler's flags: for each instruction set, as in the kernels' CMakeLists.txt.

`python -m tests.lori.instruction_sets` prints the sets that a test run can be forced down to.
"""

from lori.kernels.native import has_amx, instruction_sets

AVX512 = "-mfma -mavx512f -mavx512bw -mavx512vl -mavx512dq"
FLAGS = {"portable": "", "avx2": "-mavx2 -mfma", "avx512": AVX512, "avx512_bf16": f"{AVX512} -mavx512bf16 -mavx512vbmi"}


def lower_sets() -> tuple[str, ...]:
    """Return the instruction sets below the best that this process may use, the fastest first."""
    return instruction_sets() if has_amx() else instruction_sets()[1:]


if __name__ == "__main__":
    print(*lower_sets())
