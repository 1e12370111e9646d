// The specification of what every instruction set computes, bit for bit, in plain C++ for any machine.
#include "kernels.h"

namespace llamita {
namespace {

// ---- 16 floats -------------------------------------------------------------------------------------------------
struct V {
  float f[kLanes];
};

template <class F>
V each(F f) {
  V r;
  for (size_t i = 0; i < kLanes; i++) r.f[i] = f(i);
  return r;
}

V load(const float* p) {
  V r;
  __builtin_memcpy(&r, p, sizeof r);
  return r;
}
void store(float* p, V a) { __builtin_memcpy(p, &a, sizeof a); }
V set1(float x) {
  return each([=](size_t) { return x; });
}
V operator+(V a, V b) {
  return each([&](size_t i) { return a.f[i] + b.f[i]; });
}
V operator-(V a, V b) {
  return each([&](size_t i) { return a.f[i] - b.f[i]; });
}
V operator*(V a, V b) {
  return each([&](size_t i) { return a.f[i] * b.f[i]; });
}
V operator/(V a, V b) {
  return each([&](size_t i) { return a.f[i] / b.f[i]; });
}
V fma(V a, V b, V c) {
  return each([&](size_t i) { return __builtin_fmaf(a.f[i], b.f[i], c.f[i]); });
}
// Returns the second operand if either is NaN, as the x86 instructions do.
V min(V a, V b) {
  return each([&](size_t i) { return a.f[i] < b.f[i] ? a.f[i] : b.f[i]; });
}
V max(V a, V b) {
  return each([&](size_t i) { return a.f[i] > b.f[i] ? a.f[i] : b.f[i]; });
}
V rint(V a) {
  return each([&](size_t i) { return __builtin_rintf(a.f[i]); });
}
V select_less(V a, V b, V yes, V no) {
  return each([&](size_t i) { return a.f[i] < b.f[i] ? yes.f[i] : no.f[i]; });
}
V keep(V a, size_t count, V other) {  // the first `count` lanes of a, the rest of other
  return each([&](size_t i) { return i < count ? a.f[i] : other.f[i]; });
}
// 2^n for whole n in [-126, 127], infinity for 128; anything for NaN (callers multiply it by NaN)
V exp2_whole(V n) {
  return each([&](size_t i) {
    const float clamped = n.f[i] > -127.0f ? n.f[i] : -127.0f;
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(clamped < 128.0f ? clamped : 128.0f) + 127) << 23;
    float r;
    __builtin_memcpy(&r, &bits, sizeof r);
    return r;
  });
}
V times_exp2(V x, V n) { return x * exp2_whole(n); }
template <class F>
float tree(V a, F f) {
  for (size_t half = kLanes / 2; half > 0; half /= 2)
    for (size_t i = 0; i < half; i++) a.f[i] = f(a.f[i], a.f[i + half]);
  return a.f[0];
}
float sum(V a) {
  return tree(a, [](float x, float y) { return x + y; });
}
float min_lane(V a) {
  return tree(a, [](float x, float y) { return x < y ? x : y; });
}
float max_lane(V a) {
  return tree(a, [](float x, float y) { return x > y ? x : y; });
}
V sum_each(const V (&a)[kLanes]) {  // lane i: sum(a[i])
  return each([&](size_t i) { return sum(a[i]); });
}
void store_i8(int8_t* p, V a) {
  for (size_t i = 0; i < kLanes; i++) p[i] = static_cast<int8_t>(a.f[i]);
}

float f16_to_f32(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
  uint32_t bits = sign | (exponent + 112u) << 23 | mantissa << 13;  // 112 = 127 - 15
  if (exponent == 31) bits = sign | 0x7f800000u | (mantissa ? 0x400000u | mantissa << 13 : 0u);
  float r;
  __builtin_memcpy(&r, &bits, sizeof r);
  if (exponent == 0) {
    r = static_cast<float>(mantissa) * 0x1p-24f;
    if (sign) r = -r;
  }
  return r;
}

uint16_t f32_to_f16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | (bits >> 13 & 0x3ffu));
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above round to infinity
  float magnitude;
  __builtin_memcpy(&magnitude, &bits, sizeof magnitude);
  if (bits < 0x38800000u)  // below 2^-14: whole multiples of 2^-24
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(__builtin_rintf(magnitude * 0x1p24f)));
  bits += 0xfffu + (bits >> 13 & 1u);  // half to even on the 13 dropped bits
  return static_cast<uint16_t>(sign | (bits - 0x38000000u) >> 13);
}

V load_f16(const void* p) {
  uint16_t h[kLanes];
  __builtin_memcpy(h, p, sizeof h);
  return each([&](size_t i) { return f16_to_f32(h[i]); });
}
V load_bf16(const void* p) {
  uint16_t h[kLanes];
  __builtin_memcpy(h, p, sizeof h);
  return each([&](size_t i) {
    const uint32_t bits = static_cast<uint32_t>(h[i]) << 16;
    float r;
    __builtin_memcpy(&r, &bits, sizeof r);
    return r;
  });
}
V load_i8(const void* p) {
  const int8_t* codes = static_cast<const int8_t*>(p);
  return each([=](size_t i) { return static_cast<float>(codes[i]); });
}
void store_f16(uint16_t* p, V a) {
  for (size_t i = 0; i < kLanes; i++) p[i] = f32_to_f16(a.f[i]);
}
template <size_t H>
V swap_lanes(V a) {  // lane i: a's lane i ^ H
  return each([&](size_t i) { return a.f[i ^ H]; });
}
void prefetch(const void*) {}

// ---- 16 sums, and bytes by four for each -------------------------------------------------------------------------
struct I {
  int32_t i[kLanes];
};
struct B {
  uint8_t b[kLanes][4];
};

template <class F>
I each_sum(F f) {
  I r;
  for (size_t i = 0; i < kLanes; i++) r.i[i] = f(i);
  return r;
}

I splat(int32_t x) {
  return each_sum([=](size_t) { return x; });
}
I operator-(I a, I b) {
  return each_sum([&](size_t i) { return a.i[i] - b.i[i]; });
}
I shift_digit(I a) {
  return each_sum([&](size_t i) { return a.i[i] * 128; });
}
V to_float(I a) {
  return each([&](size_t i) { return static_cast<float>(a.i[i]); });
}
int32_t sum(I a) {
  int32_t total = 0;
  for (const int32_t x : a.i) total += x;
  return total;
}
B load_quads(const void* p) {
  B r;
  __builtin_memcpy(&r, p, sizeof r);
  return r;
}
B splat_quad(const void* p) {
  B r;
  for (auto& four : r.b) __builtin_memcpy(four, p, sizeof four);
  return r;
}
I key_start(float) { return splat(0); }
I dot_bytes(I acc, B w, B x) {  // w unsigned, x signed
  for (size_t i = 0; i < kLanes; i++)
    for (size_t j = 0; j < 4; j++) acc.i[i] += w.b[i][j] * static_cast<int8_t>(x.b[i][j]);
  return acc;
}
I dot_small(I acc, B w, B x) { return dot_bytes(acc, w, x); }  // w below 128
uint32_t to_whole(float x) {  // nearest even, of numbers from 0 to 2^14; NaN: anything that a byte holds
  const float rounded = __builtin_rintf(x);
  return rounded >= 0 && rounded <= 16384.0f ? static_cast<uint32_t>(rounded) : 0;
}
void store_digit(V x, uint8_t* p) {
  for (size_t i = 0; i < kLanes; i++) p[i] = static_cast<uint8_t>(to_whole(x.f[i]));
}
void store_digits(V x, uint8_t* high, uint8_t* low) {
  for (size_t i = 0; i < kLanes; i++) {
    high[i] = static_cast<uint8_t>(to_whole(x.f[i]) >> 7);
    low[i] = static_cast<uint8_t>(to_whole(x.f[i]) & 127);
  }
}

// Tiles: how much is computed together. Results do not depend on them.
constexpr size_t kLinearRows = 2, kLinearTokens = 2, kDecodeRows = 2;
constexpr size_t kCandidates = 1;
constexpr size_t kQueryRows = 4, kQueryTile = 4;
constexpr size_t kButterfly = 2;

// clang-format off: in this order
#include "float_kernels.inc"
#include "attention.inc"
#include "attention_i8.inc"
#include "rounding.inc"
#include "hadamard.inc"
#include "low_rank.inc"
// clang-format on

// ---- 4- and 8-bit weights ----------------------------------------------------------------------------------------
float stream_scale(const uint8_t* scales, bool bf16, size_t row) {
  uint32_t bits = 0;
  if (bf16)  // the upper half of an f32
    __builtin_memcpy(reinterpret_cast<uint8_t*>(&bits) + 2, scales + 2 * row, 2);
  else
    __builtin_memcpy(&bits, scales + 4 * row, 4);
  float scale;
  __builtin_memcpy(&scale, &bits, sizeof scale);
  return scale;
}

// Byte j of row r of step s: code + 8 of input 8s+j in the low nibble, of input 8s+4+j in the high one.
void linear_w4(const QuantizedLinear& a, size_t first, size_t last, uint8_t*) {
  const size_t scale_bytes = kPanelRows * (a.bf16_scales ? 2 : 4);
  for (size_t panel = first; panel < last; panel++)
    for (size_t t = 0; t < a.tokens; t++) {
      const uint8_t* w = a.panels + panel * a.panel_stride;
      const int8_t* x = a.x + t * a.x_stride;
      float acc[kPanelRows] = {};
      for (size_t g = 0; g < a.groups; g++) {
        const uint8_t* scales = w;
        int32_t dot[kPanelRows] = {};
        w += scale_bytes;
        for (size_t s = 0; s < a.group_size / 8; s++, w += 4 * kPanelRows, x += 8)
          for (size_t r = 0; r < kPanelRows; r++)
            for (size_t j = 0; j < 4; j++)
              dot[r] += x[j] * ((w[4 * r + j] & 15) - 8) + x[4 + j] * ((w[4 * r + j] >> 4) - 8);
        for (size_t r = 0; r < kPanelRows; r++)
          acc[r] = __builtin_fmaf(static_cast<float>(dot[r]), stream_scale(scales, a.bf16_scales, r), acc[r]);
      }
      finish(a, t, panel, load(acc), load(acc + kLanes));
    }
}

void linear_w8(const QuantizedLinear& a, size_t first, size_t last) {
  for (size_t panel = first; panel < last; panel++)
    for (size_t t = 0; t < a.tokens; t++) {
      const uint8_t* w = a.panels + panel * a.panel_stride;
      const int8_t* x = a.x + t * a.x_stride;
      int32_t dot[kPanelRows] = {};
      float acc[kPanelRows];
      for (size_t k = 0; k < a.columns; k += 4, w += 4 * kPanelRows)
        for (size_t r = 0; r < kPanelRows; r++)
          for (size_t j = 0; j < 4; j++) dot[r] += x[k + j] * (w[4 * r + j] - 128);
      for (size_t r = 0; r < kPanelRows; r++)
        acc[r] = __builtin_fmaf(static_cast<float>(dot[r]), a.scales[panel * kPanelRows + r], 0.0f);
      finish(a, t, panel, load(acc), load(acc + kLanes));
    }
}

double int8_probe(size_t iterations, int) {
  volatile int8_t a[64] = {}, b[64] = {};
  int32_t total = 0;
  for (size_t i = 0; i < iterations; i++)
    for (size_t j = 0; j < 64; j++) total += a[j] * b[j];
  a[0] = static_cast<int8_t>(total);
  return 64.0 * static_cast<double>(iterations);
}

}  // namespace

const Kernels scalar_kernels = {
    "scalar",  linear_w4,  linear_w8, linear_float, kLinearRows, quantize,  rmsnorm,    swiglu,     hadamard,
    attention, kQueryRows, to_f32,    to_f16,       low_rank_up, round_row, int8_probe, read_probe,
};

}  // namespace llamita
