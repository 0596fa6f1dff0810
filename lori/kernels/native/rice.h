// The code of a mask into indices; lori/rice.py says what it is, and is what this must agree with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace lori {

// Writes the indices (nnz,) of a mask over `num_entries` that its code of `num_bytes` keeps. Returns false where these bytes
// are no code of such a mask, whatever they are; `indices` may hold anything then. `scratch` is room that calls can share.
bool decode_mask(const uint8_t* code, size_t num_bytes, int64_t num_entries, int64_t nnz, int32_t* indices,
                 std::vector<uint8_t>& scratch);

}  // namespace lori
