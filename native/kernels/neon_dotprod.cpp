// Arm, from 8.2 with the dot-product extension: sdot sums four products of signed bytes into each of four int32.
#include <arm_neon.h>

#include "kernels.h"

namespace llamita {
namespace {

// clang-format off: in this order
#include "neon_floats.inc"
// clang-format on

// There is no dot product of unsigned with signed bytes. So the upper bit turns code + 128 into the code, and sums
// start at 128 times the sum of x.
I key_start(float query_sum) { return splat(static_cast<int32_t>(128.0f * query_sum)); }
I dot_bytes(I acc, B w, B x) {
  const int8x16_t flip = vdupq_n_s8(-128);
  return dot_small(acc, {veorq_s8(w.a, flip), veorq_s8(w.b, flip), veorq_s8(w.c, flip), veorq_s8(w.d, flip)}, x);
}

// clang-format off: in this order
#include "float_kernels.inc"
#include "attention.inc"
#include "attention_i8.inc"
#include "rounding.inc"
#include "hadamard.inc"
#include "low_rank.inc"
// clang-format on

// ---- 4- and 8-bit weights ----------------------------------------------------------------------------------------
// There is no dot product of unsigned with signed bytes. So the upper bit turns code + 128 into the code, and sums
// start at 0, without the correction in x_start.
template <int kLane>
int32x4_t dot_bytes(int32x4_t acc, uint8x16_t w, int8x8_t x) {
  return vdotq_lane_s32(acc, vreinterpretq_s8_u8(veorq_u8(w, vdupq_n_u8(0x80))), x, kLane);
}
int32_t byte_start(int32_t) { return 0; }

constexpr size_t kProbeProducts = 16;
int32x4_t probe_step(int32x4_t acc, uint8x16_t a, int8x16_t b) { return vdotq_s32(acc, vreinterpretq_s8_u8(a), b); }

// clang-format off: in this order
#include "neon_tiles.inc"
#include "memory_sums.inc"
// clang-format on

constexpr size_t kUnpackedTile = 6;  // x 4 quads: 24 sums, 6 registers of codes, the rest for weights
constexpr size_t kTileQuads = 4;

// Unpacked, the two halves of a panel's rows follow each other in each group, so that a tile reads one stream: (groups,
// 2 halves, steps of 4 inputs, 16 rows, 4 inputs).
const uint8_t* unpack(const QuantizedLinear& a, const uint8_t* w, size_t groups, uint8_t* bytes, float* scales) {
  const uint8x16_t low = vdupq_n_u8(15);
  const size_t half = kTileQuads * 4 * a.group_size;
  for (size_t g = 0; g < groups; g++, scales += kPanelRows, bytes += 2 * half) {
    for (size_t v = 0; v < kQuads; v++) vst1q_f32(scales + 4 * v, quad_scales(w, a.bf16_scales, v));
    w += kPanelRows * (a.bf16_scales ? 2 : 4);
    for (size_t s = 0; s < a.group_size / 8; s++, w += kStep) {
      for (size_t line = 0; line < kStep; line += 64) prefetch(w + kAhead + line);
      for (size_t v = 0; v < kQuads; v++) {
        const uint8x16_t both = vld1q_u8(w + v * 16);
        uint8_t* to = bytes + v / kTileQuads * half + s * kStep + v % kTileQuads * 16;
        vst1q_u8(to, vandq_u8(both, low));
        vst1q_u8(to + kTileQuads * 16, vshrq_n_u8(both, 4));
      }
    }
  }
  return w;
}

// 16 rows and T tokens of one group; acc: the first of the 16 rows in (T, 32)
template <size_t T>
void unpacked_half(const QuantizedLinear& a, const uint8_t* w, const float* scales, const int8_t* x,
                   const int32_t* start, float* acc) {
  int32x4_t dot[T][kTileQuads];
#pragma GCC unroll 6
  for (size_t i = 0; i < T; i++)
    for (int32x4_t& d : dot[i]) d = vdupq_n_s32(start[i * a.groups]);
  for (size_t s = 0; s < a.group_size / 8; s++, w += kStep, x += 8) {
    int8x8_t codes[T];
#pragma GCC unroll 6
    for (size_t i = 0; i < T; i++) codes[i] = vld1_s8(x + i * a.x_stride);
#pragma GCC unroll 4
    for (size_t v = 0; v < kTileQuads; v++) {
      const uint8x16_t first = vld1q_u8(w + v * 16);
#pragma GCC unroll 6
      for (size_t i = 0; i < T; i++) dot[i][v] = dot_nibbles<0>(dot[i][v], first, codes[i]);
    }
#pragma GCC unroll 4
    for (size_t v = 0; v < kTileQuads; v++) {
      const uint8x16_t second = vld1q_u8(w + kStep / 2 + v * 16);
#pragma GCC unroll 6
      for (size_t i = 0; i < T; i++) dot[i][v] = dot_nibbles<1>(dot[i][v], second, codes[i]);
    }
  }
#pragma GCC unroll 4
  for (size_t v = 0; v < kTileQuads; v++) {
    const float32x4_t scale = vld1q_f32(scales + v * 4);
#pragma GCC unroll 6
    for (size_t i = 0; i < T; i++) {
      float* sum = acc + i * kPanelRows + v * 4;
      vst1q_f32(sum, vfmaq_f32(vld1q_f32(sum), vcvtq_f32_s32(dot[i][v]), scale));
    }
  }
}

template <size_t T>
void add_groups(const QuantizedLinear& a, const Unpacked& part, size_t t, float* acc) {
  const uint8_t* w = part.bytes;
  const float* scales = part.scales;
  for (size_t g = part.group; g < part.group + part.groups; g++)
    for (size_t first = 0; first < kPanelRows; first += 4 * kTileQuads) {
      unpacked_half<T>(a, w, scales + first, a.x + t * a.x_stride + g * a.group_size, a.x_start + t * a.groups + g,
                       acc + first);
      w += 4 * kTileQuads * a.group_size;
      if (first > 0) scales += kPanelRows;
    }
}

#include "panels.inc"

}  // namespace

const Kernels neon_dotprod_kernels = {
    "neon-dotprod", linear_w4,  linear_w8, linear_float, kLinearRows, quantize,  rmsnorm,    swiglu,     hadamard,
    attention,      kQueryRows, to_f32,    to_f16,       low_rank_up, round_row, int8_probe, read_probe,
};

}  // namespace llamita
