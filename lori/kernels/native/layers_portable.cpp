#include "layers_loops.h"

namespace lori {
LayerFunctions layers_portable(Dtype dtype) { return choose_layers(dtype); }
}  // namespace lori
