"""The compiler's flags: for each instruction set, as in the kernels' CMakeLists.txt, and for the sanitizers."""

AVX512 = "-mfma -mavx512f -mavx512bw -mavx512vl -mavx512dq"
FLAGS = {"portable": "", "avx2": "-mavx2 -mfma", "avx512": AVX512, "avx512_bf16": f"{AVX512} -mavx512bf16 -mavx512vbmi"}
SANITIZE = "-O1 -g1 -fira-region=one -std=c++17 -fsanitize=address,undefined -fno-sanitize-recover=all"
"""Lines alone (-g1), and registers given out for a function at once: with variables and by loop a file took 40 s, not 17."""
