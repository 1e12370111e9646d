// AVX-512 with VNNI.
#include <immintrin.h>

#include "kernels.h"

namespace llamita {
namespace {

#include "avx512.inc"

}  // namespace

const Kernels avx512vnni_kernels = {
    "avx512vnni", linear_w4,  linear_w8, linear_float, kLinearRows, quantize,  rmsnorm,    swiglu,     hadamard,
    attention,    kQueryRows, to_f32,    to_f16,       low_rank_up, round_row, int8_probe, read_probe,
};

}  // namespace llamita
