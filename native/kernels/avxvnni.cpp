// AVX-VNNI: vpdpbusd in the VEX encoding, for processors without AVX-512.
#include <immintrin.h>

#include "kernels.h"

namespace llamita {
namespace {

// In assembly, because GCC 12 copies the accumulator around its intrinsic.
__m256i dot4(__m256i sums, __m256i w, __m256i x) {
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(w), "x"(x));
  return sums;
}

#include "vnni256.inc"

}  // namespace

const Kernels avxvnni_kernels = {
    "avxvnni", linear_w4,  linear_w8, linear_float, kLinearRows, quantize,  rmsnorm,    swiglu,     hadamard,
    attention, kQueryRows, to_f32,    to_f16,       low_rank_up, round_row, int8_probe, read_probe,
};

}  // namespace llamita
