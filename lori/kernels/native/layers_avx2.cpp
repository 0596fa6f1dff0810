#include "layers_loops.h"

namespace lori {
LayerFunctions layers_avx2(Dtype dtype) { return choose_layers(dtype); }
}  // namespace lori
