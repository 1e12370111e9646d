// A machine without instruction-set files: only the portable kernels.
#include "dispatch.h"

namespace llamita {

std::vector<const Kernels*> supported_kernels() { return {&scalar_kernels}; }

}  // namespace llamita
