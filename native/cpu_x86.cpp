// x86-64: asks which features the processor has (CPUID) and which registers the system saves on a switch (XGETBV).
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>

#include "dispatch.h"

namespace llamita {
namespace {

struct Features {
  bool avx2 = false, avxvnni = false, avx512vnni = false, avx512bf16 = false, amx = false;
};

// Asks the system for the 8 KB of tiles that it must save for every thread of this process.
#ifdef __linux__
bool may_use_tiles() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#else
bool may_use_tiles() { return false; }
#endif

// Returns whether tiles keep what is in them while threads take turns; see check.cpp.
bool tiles_are_kept() {
  constexpr double kSeconds = 0.005;
  constexpr size_t kMostThreads = 16;
  return check_products(amx_kernels, kSeconds, std::min(2 * usable_cpus(), kMostThreads)).wrong == 0;
}

// Bits of XCR0: 1 SSE, 2 AVX, 5 to 7 AVX-512, 17 and 18 AMX.
uint64_t saved_state() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

bool all(uint32_t value, std::initializer_list<int> bits) {
  for (int bit : bits)
    if (!(value >> bit & 1u)) return false;
  return true;
}

Features detect() {
  Features f;
  uint32_t a, b, c, d, b1, c1, d1, b7, c7, d7;
  if (!__get_cpuid(1, &a, &b1, &c1, &d1) || !all(c1, {12, 27, 28, 29})) return f;  // FMA, OSXSAVE, AVX, F16C
  if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return f;
  const uint64_t state = saved_state();
  f.avx2 = (state & 0x06) == 0x06 && all(b7, {5});
  const uint32_t subleaves = a;
  if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
    f.avxvnni = f.avx2 && all(a, {4});
    f.avx512bf16 = all(a, {5});
  }
  // F, DQ, BW, VL; VNNI
  f.avx512vnni = f.avx2 && (state & 0xe6) == 0xe6 && all(b7, {16, 17, 30, 31}) && all(c7, {11});
  f.amx = f.avx512vnni && (state & 0x60000) == 0x60000 && all(d7, {24, 25}) && may_use_tiles() && tiles_are_kept();
  return f;
}

}  // namespace

std::vector<const Kernels*> supported_kernels() {
  static const Features features = detect();
  const auto with_bf16 = [](Kernels table) {
    if (features.avx512bf16) table.bf16 = &avx512bf16_kernels;
    return table;
  };
  static const Kernels avx512 = with_bf16(avx512vnni_kernels), amx = with_bf16(amx_kernels);
  std::vector<const Kernels*> list;
  if (features.amx) list.push_back(&amx);
  if (features.avx512vnni) list.push_back(&avx512);
  if (features.avxvnni)
    list.push_back(&avxvnni_kernels);
  else if (features.avx512vnni)
    list.push_back(&avxvnni_evex_kernels);
  if (features.avx2) list.push_back(&avx2_kernels);
  if (features.avx512vnni) list.push_back(&amx_portable_kernels);
  list.push_back(&scalar_kernels);
  return list;
}

}  // namespace llamita
