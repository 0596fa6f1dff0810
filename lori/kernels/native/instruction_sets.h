// One function a file of the kernel, each compiled for another instruction set, that returns the kernel for some operands.
#pragma once

#include "layout.h"

namespace lori {

Expand choose_portable(const Operands&);
Expand choose_avx2(const Operands&);
Expand choose_avx512(const Operands&);
Expand choose_avx512_bf16(const Operands&);

}  // namespace lori
