"""The compiler's flags for each instruction set, as in the kernels' CMakeLists.txt."""

AVX512 = "-mfma -mavx512f -mavx512bw -mavx512vl -mavx512dq"
FLAGS = {"portable": "", "avx2": "-mavx2 -mfma", "avx512": AVX512, "avx512_bf16": f"{AVX512} -mavx512bf16 -mavx512vbmi"}
