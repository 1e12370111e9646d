// Arm with the int8 matrix extension (8.6, optional from 8.2). usmmla multiplies 2 rows of 8 unsigned bytes by 2
// columns of 8 signed ones: 32 products an instruction, for prefill. usdot, unsigned by signed as on x86, is for 8-bit
// weights.
#include <arm_neon.h>

#include "kernels.h"

namespace llamita {
namespace {

// clang-format off: in this order
#include "neon_floats.inc"
// clang-format on

I key_start(float) { return splat(0); }
I dot_bytes(I acc, B w, B x) {
  const auto dot = [](int32x4_t sums, int8x16_t u, int8x16_t s) {
    return vusdotq_s32(sums, vreinterpretq_u8_s8(u), s);
  };
  return {dot(acc.a, w.a, x.a), dot(acc.b, w.b, x.b), dot(acc.c, w.c, x.c), dot(acc.d, w.d, x.d)};
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
template <int kLane>
int32x4_t dot_bytes(int32x4_t acc, uint8x16_t w, int8x8_t x) {
  return vusdotq_lane_s32(acc, w, x, kLane);
}
int32_t byte_start(int32_t x_start) { return x_start; }

constexpr size_t kProbeProducts = 32;
int32x4_t probe_step(int32x4_t acc, uint8x16_t a, int8x16_t b) { return vusmmlaq_s32(acc, a, b); }

// clang-format off: in this order
#include "neon_tiles.inc"
#include "memory_sums.inc"
// clang-format on

constexpr size_t kUnpackedTile = 8;  // 4 pairs x 4 pairs of rows: 16 sums, 4 + 4 registers of operands
constexpr size_t kBlockRows = 8, kRowPairs = kBlockRows / 2;
constexpr size_t kSpan = 512;  // inputs whose codes are paired at a time: 4 KiB of stack

// A panel's step holds four inputs of each row in low nibbles and the next four in high ones. Interleaving the two by
// 32 bits gives 8 consecutive inputs of one row, then of the next: the left operand of usmmla. The order is (groups, 4
// blocks of 8 rows, steps of 8 inputs, 4 pairs of rows, 2 rows, 8 inputs), so that a tile reads one stream.
const uint8_t* unpack(const QuantizedLinear& a, const uint8_t* w, size_t groups, uint8_t* bytes, float* scales) {
  const uint8x16_t low = vdupq_n_u8(15);
  const size_t block = kBlockRows * a.group_size;
  for (size_t g = 0; g < groups; g++, scales += kPanelRows, bytes += kPanelRows * a.group_size) {
    for (size_t v = 0; v < kQuads; v++) vst1q_f32(scales + 4 * v, quad_scales(w, a.bf16_scales, v));
    w += kPanelRows * (a.bf16_scales ? 2 : 4);
    for (size_t s = 0; s < a.group_size / 8; s++, w += kStep) {
      for (size_t line = 0; line < kStep; line += 64) prefetch(w + kAhead + line);
      for (size_t v = 0; v < kQuads; v++) {
        const uint8x16_t both = vld1q_u8(w + v * 16);
        const uint32x4_t first = vreinterpretq_u32_u8(vandq_u8(both, low));
        const uint32x4_t second = vreinterpretq_u32_u8(vshrq_n_u8(both, 4));
        uint8_t* to = bytes + v / 2 * block + s * kBlockRows * 8 + v % 2 * 32;
        vst1q_u8(to, vreinterpretq_u8_u32(vzip1q_u32(first, second)));
        vst1q_u8(to + 16, vreinterpretq_u8_u32(vzip2q_u32(first, second)));
      }
    }
  }
  return w;
}

// Pairs the codes of two tokens, eight each, into the right operands: (inputs / 8, pairs, 2 tokens, 8 inputs). An odd
// token is paired with itself, and the second sums are not used.
template <size_t T>
void pair_up(const int8_t* x, size_t x_stride, size_t inputs, int8_t* pairs) {
  for (size_t k = 0; k < inputs; k += 8)
#pragma GCC unroll 4
    for (size_t i = 0; i < T; i += 2, pairs += 16) {
      const int8_t* token = x + i * x_stride + k;
      vst1q_s8(pairs, vcombine_s8(vld1_s8(token), vld1_s8(token + (i + 1 < T ? x_stride : 0))));
    }
}

// The sums of usmmla: rows 2p and 2p + 1 of a block times tokens 2j and 2j + 1, row by row
template <size_t T>
struct Sums2x2 {
  static constexpr size_t kPairs = (T + 1) / 2;
  int32x4_t at[kPairs][kRowPairs];
};

template <size_t T>
void multiply(Sums2x2<T>& sums, const uint8_t* w, const int8_t* pairs, size_t inputs) {
  constexpr size_t kPairs = Sums2x2<T>::kPairs;
  for (size_t k = 0; k < inputs; k += 8, w += kBlockRows * 8, pairs += kPairs * 16) {
    uint8x16_t rows[kRowPairs];
#pragma GCC unroll 4
    for (size_t p = 0; p < kRowPairs; p++) rows[p] = vld1q_u8(w + p * 16);
#pragma GCC unroll 4
    for (size_t j = 0; j < kPairs; j++) {
      const int8x16_t tokens = vld1q_s8(pairs + j * 16);
#pragma GCC unroll 4
      for (size_t p = 0; p < kRowPairs; p++) sums.at[j][p] = vusmmlaq_s32(sums.at[j][p], rows[p], tokens);
    }
  }
}

// The sums of token i, four rows each: every other element of two registers
template <size_t T>
int32x4_t quad_of(const Sums2x2<T>& sums, size_t i, size_t quad) {
  const int32x4_t a = sums.at[i / 2][2 * quad], b = sums.at[i / 2][2 * quad + 1];
  return i % 2 == 0 ? vuzp1q_s32(a, b) : vuzp2q_s32(a, b);
}

// A group's sums of one block begin at x_start, or where the span before left them.
template <size_t T>
void begin_block(Sums2x2<T>& sums, const int32_t* start, size_t stride) {
#pragma GCC unroll 4
  for (size_t i = 0; i < T; i += 2) {
    const int32_t both[2] = {start[i * stride], start[(i + 1 < T ? i + 1 : i) * stride]};
    const int32x2_t two = vld1_s32(both);
    for (int32x4_t& v : sums.at[i / 2]) v = vcombine_s32(two, two);
  }
}

template <size_t T>
void end_block(const Sums2x2<T>& sums, const float* scales, float* acc) {
#pragma GCC unroll 2
  for (size_t quad = 0; quad < kBlockRows / 4; quad++) {
    const float32x4_t scale = vld1q_f32(scales + quad * 4);
#pragma GCC unroll 8
    for (size_t i = 0; i < T; i++) {
      float* sum = acc + i * kPanelRows + quad * 4;
      vst1q_f32(sum, vfmaq_f32(vld1q_f32(sum), vcvtq_f32_s32(quad_of(sums, i, quad)), scale));
    }
  }
}

// One group: w (4 blocks, inputs / 8, 64), scales (32,), x and start of the first token
template <size_t T>
void unpacked_group(const QuantizedLinear& a, const uint8_t* w, const float* scales, const int8_t* x,
                    const int32_t* start, float* acc) {
  constexpr size_t kBlocks = kPanelRows / kBlockRows;
  alignas(16) int8_t pairs[Sums2x2<T>::kPairs * 2 * kSpan];
  Sums2x2<T> waiting[kBlocks];  // sums between the spans of a group
  for (size_t k = 0; k < a.group_size; k += kSpan) {
    const size_t inputs = a.group_size - k < kSpan ? a.group_size - k : kSpan;
    pair_up<T>(x + k, a.x_stride, inputs, pairs);
    for (size_t block = 0; block < kBlocks; block++) {
      Sums2x2<T> sums;
      if (k == 0)
        begin_block(sums, start, a.groups);
      else
        sums = waiting[block];
      multiply(sums, w + (block * a.group_size + k) * kBlockRows, pairs, inputs);
      if (k + inputs < a.group_size)
        waiting[block] = sums;
      else
        end_block(sums, scales + block * kBlockRows, acc + block * kBlockRows);
    }
  }
}

template <size_t T>
void add_groups(const QuantizedLinear& a, const Unpacked& part, size_t t, float* acc) {
  const uint8_t* w = part.bytes;
  const float* scales = part.scales;
  for (size_t g = part.group; g < part.group + part.groups; g++, w += kPanelRows * a.group_size, scales += kPanelRows)
    unpacked_group<T>(a, w, scales, a.x + t * a.x_stride + g * a.group_size, a.x_start + t * a.groups + g, acc);
}

#include "panels.inc"

}  // namespace

const Kernels neon_i8mm_kernels = {
    "neon-i8mm", linear_w4,  linear_w8, linear_float, kLinearRows, quantize,  rmsnorm,    swiglu,     hadamard,
    attention,   kQueryRows, to_f32,    to_f16,       low_rank_up, round_row, int8_probe, read_probe,
};

}  // namespace llamita
