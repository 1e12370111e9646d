// Any machine without its own instruction-set files.
#include "dispatch.h"

namespace llamita {

std::vector<const Kernels*> supported_kernels() { return {&scalar_kernels}; }

}  // namespace llamita
