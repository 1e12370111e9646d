// AArch64: asks the operating system which features the processor has.
#include "dispatch.h"

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace llamita {
namespace {

struct Features {
  bool dotprod = false, i8mm = false;
};

#if defined(__linux__)
Features detect() {  // by number: old headers lack the names of these bits
  constexpr unsigned long kDotProduct = 1ul << 20, kInt8Matrix = 1ul << 13;  // in AT_HWCAP, in AT_HWCAP2
  return {(getauxval(AT_HWCAP) & kDotProduct) != 0, (getauxval(AT_HWCAP2) & kInt8Matrix) != 0};
}
#elif defined(__APPLE__)
bool has(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
Features detect() { return {has("hw.optional.arm.FEAT_DotProd"), has("hw.optional.arm.FEAT_I8MM")}; }
#else
Features detect() { return {}; }
#endif

}  // namespace

std::vector<const Kernels*> supported_kernels() {
  static const Features features = detect();
  std::vector<const Kernels*> list;
  if (features.dotprod && features.i8mm) list.push_back(&neon_i8mm_kernels);  // its file uses sdot, too
  if (features.dotprod) list.push_back(&neon_dotprod_kernels);
  list.push_back(&scalar_kernels);
  return list;
}

}  // namespace llamita
