// AVX-512 with VNNI: vpdpbusd multiplies unsigned weights (code + 8 or code + 128) by signed activations, 64 at a time.
#include <immintrin.h>

#include "kernels.h"

namespace llamita {
namespace {

// ---- 16 floats ---------------------------------------------------------------------------------------------------
struct V {
  __m512 f;
};

constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

V load(const float* p) { return {_mm512_loadu_ps(p)}; }
void store(float* p, V a) { _mm512_storeu_ps(p, a.f); }
V set1(float x) { return {_mm512_set1_ps(x)}; }
V operator+(V a, V b) { return {_mm512_add_ps(a.f, b.f)}; }
V operator-(V a, V b) { return {_mm512_sub_ps(a.f, b.f)}; }
V operator*(V a, V b) { return {_mm512_mul_ps(a.f, b.f)}; }
V operator/(V a, V b) { return {_mm512_div_ps(a.f, b.f)}; }
V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.f, b.f, c.f)}; }
V min(V a, V b) { return {_mm512_min_ps(a.f, b.f)}; }
V max(V a, V b) { return {_mm512_max_ps(a.f, b.f)}; }
V rint(V a) { return {_mm512_roundscale_ps(a.f, kNearest)}; }
V select_less(V a, V b, V yes, V no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.f, b.f, _CMP_LT_OQ), no.f, yes.f)};
}
V keep(V a, size_t count, V other) {
  return {_mm512_mask_blend_ps(static_cast<__mmask16>((1u << (count < kLanes ? count : kLanes)) - 1u), other.f, a.f)};
}
V exp2_whole(V n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n.f), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}

V times_exp2(V x, V n) { return {_mm512_scalef_ps(x.f, n.f)}; }

template <class F>
float tree(V a, F f) {
  const __m256 eight = f(_mm512_castps512_ps256(a.f), _mm512_extractf32x8_ps(a.f, 1));
  const __m256 four = f(eight, _mm256_castps128_ps256(_mm256_extractf128_ps(eight, 1)));
  const __m256 two = f(four, _mm256_permute_ps(four, 0x4e));
  return _mm256_cvtss_f32(f(two, _mm256_permute_ps(two, 0xb1)));
}
float sum(V a) {
  return tree(a, [](__m256 x, __m256 y) { return _mm256_add_ps(x, y); });
}
float min_lane(V a) {
  return tree(a, [](__m256 x, __m256 y) { return _mm256_min_ps(x, y); });
}
float max_lane(V a) {
  return tree(a, [](__m256 x, __m256 y) { return _mm256_max_ps(x, y); });
}

// Lane i is sum(a[i]), for 16 vectors at once, by the same tree of halves. After the two steps over quarters,
// quarter q of eight/four[j] belongs to vector j + 4 q (the order below). Then the quarters are transposed.
V sum_each(const V (&a)[kLanes]) {
  __m512 four[4];
  for (size_t j = 0; j < 4; j++) {
    // lanes 0-7: a[j] folded once; lanes 8-15: a[j + 4]; likewise a[j + 8] and a[j + 12]
    const auto fold8 = [](__m512 x, __m512 y) {
      return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
    };
    const __m512 x = fold8(a[j].f, a[j + 4].f), y = fold8(a[j + 8].f, a[j + 12].f);
    four[j] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
  }
  const auto fold2 = [](__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x44), _mm512_shuffle_ps(x, y, 0xee));
  };
  const __m512 x = fold2(four[0], four[1]), y = fold2(four[2], four[3]);
  const __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x88), _mm512_shuffle_ps(x, y, 0xdd));
  return {sums};  // lane 4 q + j: vector j + 4 q
}

void store_i8(int8_t* p, V a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.f)));
}
V load_f16(const void* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)))}; }
V load_bf16(const void* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
V load_i8(const void* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))))};
}
void store_f16(uint16_t* p, V a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.f, kNearest)); }
template <size_t H>
V swap_lanes(V a) {  // lane i: a's lane i ^ H
  if constexpr (H == 1) return {_mm512_permute_ps(a.f, 0xb1)};
  if constexpr (H == 2) return {_mm512_permute_ps(a.f, 0x4e)};
  if constexpr (H == 4) return {_mm512_shuffle_f32x4(a.f, a.f, 0xb1)};
  return {_mm512_shuffle_f32x4(a.f, a.f, 0x4e)};
}
void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// acc += w (unsigned) * x (signed), four at a time. In assembly: GCC 12 copies the accumulator around its intrinsic.
__m512i dot4(__m512i acc, __m512i w, __m512i x) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
  return acc;
}

// ---- 16 sums, and bytes by four for each -------------------------------------------------------------------------
struct I {
  __m512i i;
};
struct B {
  __m512i b;
};

I splat(int32_t x) { return {_mm512_set1_epi32(x)}; }
I operator-(I a, I b) { return {_mm512_sub_epi32(a.i, b.i)}; }
I shift_digit(I a) { return {_mm512_slli_epi32(a.i, 7)}; }
V to_float(I a) { return {_mm512_cvtepi32_ps(a.i)}; }
int32_t sum(I a) { return _mm512_reduce_add_epi32(a.i); }
B load_quads(const void* p) { return {_mm512_loadu_si512(p)}; }
B splat_quad(const void* p) {
  int32_t four;
  __builtin_memcpy(&four, p, sizeof four);
  return {_mm512_set1_epi32(four)};
}
I key_start(float) { return splat(0); }
I dot_bytes(I acc, B unsigned_bytes, B x) { return {dot4(acc.i, unsigned_bytes.b, x.b)}; }
I dot_small(I acc, B small, B x) { return {dot4(acc.i, small.b, x.b)}; }
void store_digit(V x, uint8_t* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.f)));
}
void store_digits(V x, uint8_t* high, uint8_t* low) {
  const __m512i whole = _mm512_cvtps_epi32(x.f);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 7)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(low),
                   _mm512_cvtepi32_epi8(_mm512_and_si512(whole, _mm512_set1_epi32(127))));
}

// Tiles: how much is computed together with 32 registers. Results do not depend on them.
constexpr size_t kLinearRows = 4, kLinearTokens = 6, kDecodeRows = 4;
constexpr size_t kCandidates = 16;
constexpr size_t kQueryRows = 6, kQueryTile = 24;
constexpr size_t kButterfly = 16;

// clang-format off: in this order
#include "float_kernels.inc"
#include "attention.inc"
#include "attention_i8.inc"
#include "rounding.inc"
#include "hadamard.inc"
#include "low_rank.inc"
// clang-format on

// ---- 4- and 8-bit weights ----------------------------------------------------------------------------------------
constexpr size_t kFusedTokens = 16, kFusedTile = 8;  // x 2 vectors: 16 integer accumulators, float ones in memory
constexpr size_t kUnpackedTile = 7, kByteTile = 7;   // x 2 vectors: 14 integer and 14 float accumulators
constexpr size_t kAhead = 16384;  // bytes ahead to prefetch: a panel is read faster than memory answers
constexpr size_t kStep = 128;     // bytes of panel per 8 (w4) or 4 (w8) inputs: 2 vectors

__m512i broadcast4(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, sizeof four);
  return _mm512_set1_epi32(four);
}

V scales_of(const uint8_t* scales, bool bf16, size_t half) {
  return bf16 ? load_bf16(scales + half * 32) : load(reinterpret_cast<const float*>(scales) + half * kLanes);
}

template <size_t T>
using Dots = __m512i[T][2];

// One step of 8 inputs: 128 bytes of nibbles against T tokens; the second four inputs go to `second`.
template <size_t T>
void nibble_step(Dots<T>& first, Dots<T>& second, const uint8_t* w, const int8_t* x, size_t x_stride) {
  const __m512i low = _mm512_set1_epi8(15);
  const __m512i w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + 64);
  const __m512i low0 = _mm512_and_si512(w0, low), low1 = _mm512_and_si512(w1, low);
  const __m512i high0 = _mm512_and_si512(_mm512_srli_epi16(w0, 4), low);
  const __m512i high1 = _mm512_and_si512(_mm512_srli_epi16(w1, 4), low);
#pragma GCC unroll 8
  for (size_t i = 0; i < T; i++) {
    const __m512i x0 = broadcast4(x + i * x_stride), x1 = broadcast4(x + i * x_stride + 4);
    first[i][0] = dot4(first[i][0], low0, x0);
    first[i][1] = dot4(first[i][1], low1, x0);
    second[i][0] = dot4(second[i][0], high0, x1);
    second[i][1] = dot4(second[i][1], high1, x1);
  }
}

// Few tokens: one pass over the stream of nibbles, with prefetch.
template <size_t T>
void fused_tile(const QuantizedLinear& a, size_t panel, size_t t) {
  constexpr size_t kChains = T <= 2 ? 2 : 1;  // few tokens: two chains of sums hide vpdpbusd's latency
  constexpr bool kInMemory = T > 4;           // more float sums than registers: L1 holds them between groups
  const uint8_t* w = a.panels + panel * a.panel_stride;
  const int8_t* x = a.x + t * a.x_stride;
  const int32_t* start = a.x_start + t * a.groups;
  const size_t scale_bytes = kPanelRows * (a.bf16_scales ? 2 : 4);
  V acc[T][2];
  for (auto& row : acc) row[0] = row[1] = zero();
  for (size_t g = 0; g < a.groups; g++) {
    const V s0 = scales_of(w, a.bf16_scales, 0), s1 = scales_of(w, a.bf16_scales, 1);
    prefetch(w + kAhead);
    w += scale_bytes;
    Dots<T> dot[kChains];
    for (size_t i = 0; i < T; i++) {
      dot[0][i][0] = dot[0][i][1] = _mm512_set1_epi32(start[i * a.groups + g]);
      if constexpr (kChains == 2) dot[1][i][0] = dot[1][i][1] = _mm512_setzero_si512();
    }
    for (size_t s = 0; s < a.group_size / 8; s++, w += kStep, x += 8) {
      prefetch(w + kAhead);
      prefetch(w + kAhead + 64);
      nibble_step<T>(dot[0], dot[kChains - 1], w, x, a.x_stride);
    }
    for (size_t i = 0; i < T; i++) {
      if constexpr (kChains == 2)
        for (size_t v = 0; v < 2; v++) dot[0][i][v] = _mm512_add_epi32(dot[0][i][v], dot[1][i][v]);
      acc[i][0] = fma({_mm512_cvtepi32_ps(dot[0][i][0])}, s0, acc[i][0]);
      acc[i][1] = fma({_mm512_cvtepi32_ps(dot[0][i][1])}, s1, acc[i][1]);
    }
    if constexpr (kInMemory) __asm__ volatile("" : "+m"(acc));  // else GCC spills registers of the inner loop
  }
  finish_all<T>(a, t, panel, acc);
}

// kSteps unpacked steps of 4 inputs times T tokens
template <size_t T, size_t kSteps>
void byte_steps(Dots<T>& dot, const uint8_t* w, const int8_t* x, size_t x_stride) {
#pragma GCC unroll 8
  for (size_t s = 0; s < kSteps; s++) {
    const __m512i w0 = _mm512_load_si512(w + s * kStep), w1 = _mm512_load_si512(w + s * kStep + 64);
#pragma GCC unroll 8
    for (size_t i = 0; i < T; i++) {
      const __m512i four = broadcast4(x + i * x_stride + 4 * s);
      dot[i][0] = dot4(dot[i][0], w0, four);
      dot[i][1] = dot4(dot[i][1], w1, four);
    }
  }
}

template <size_t T>
using Sums = V[T][2];

// Adds the products of T tokens with unpacked groups. Loops of 8 steps keep branches few: a misprediction at the end of
// each group costs 4 %.
template <size_t T>
[[gnu::always_inline]] inline void add_groups(const QuantizedLinear& a, const Unpacked& part, size_t t, Sums<T>& sums) {
  const uint8_t* w = part.bytes;
  const float* scales = part.scales;
  const int8_t* x = a.x + t * a.x_stride + part.group * a.group_size;
  const int32_t* start = a.x_start + t * a.groups + part.group;
  const size_t lines = (part.lines + part.groups - 1) / part.groups;
  const bool ends = part.lines > 0 && part.ends(a);
  for (size_t g = 0; g < part.groups; g++, scales += kPanelRows, start++) {
    fetch_next(part, g * lines, (g + 1) * lines);  // a few at a time, because pending misses are limited
    if (ends && g < T) fetch_output(a, part.panel, t + g);
    Dots<T> dot;
#pragma GCC unroll 8
    for (size_t i = 0; i < T; i++) dot[i][0] = dot[i][1] = _mm512_set1_epi32(start[i * a.groups]);
    size_t steps = a.group_size / 4;
    for (; steps >= 8; steps -= 8, w += 8 * kStep, x += 32) byte_steps<T, 8>(dot, w, x, a.x_stride);
    for (; steps > 0; steps--, w += kStep, x += 4) byte_steps<T, 1>(dot, w, x, a.x_stride);
    const V s0 = load(scales), s1 = load(scales + kLanes);
#pragma GCC unroll 8
    for (size_t i = 0; i < T; i++) {
      sums[i][0] = fma({_mm512_cvtepi32_ps(dot[i][0])}, s0, sums[i][0]);
      sums[i][1] = fma({_mm512_cvtepi32_ps(dot[i][1])}, s1, sums[i][1]);
    }
  }
}

template <size_t T>
void unpacked_tile(const QuantizedLinear& a, const Unpacked& part, size_t t, float* acc) {
  Sums<T> sums;
#pragma GCC unroll 8
  for (size_t i = 0; i < T; i++)
    for (size_t v = 0; v < 2; v++) sums[i][v] = part.begins() ? zero() : load(acc + i * kPanelRows + v * kLanes);
  add_groups<T>(a, part, t, sums);
  if (part.ends(a)) return finish_all<T>(a, t, part.panel, sums);
#pragma GCC unroll 8
  for (size_t i = 0; i < T; i++) {
    store(acc + i * kPanelRows, sums[i][0]);
    store(acc + i * kPanelRows + kLanes, sums[i][1]);
  }
}

template <size_t T>
void byte_tile(const QuantizedLinear& a, size_t panel, size_t t) {
  Sums<T> sums;
  for (auto& row : sums) row[0] = row[1] = zero();
  add_groups<T>(a, {panel, a.panels + panel * a.panel_stride, a.scales + panel * kPanelRows, 0, 1, nullptr, 0}, t,
                sums);
  finish_all<T>(a, t, panel, sums);
}

const uint8_t* unpack(const QuantizedLinear& a, const uint8_t* w, size_t groups, uint8_t* bytes, float* scales) {
  const __m512i low = _mm512_set1_epi8(15);
  for (size_t g = 0; g < groups; g++, scales += kPanelRows) {
    store(scales, scales_of(w, a.bf16_scales, 0));
    store(scales + kLanes, scales_of(w, a.bf16_scales, 1));
    w += kPanelRows * (a.bf16_scales ? 2 : 4);
    for (size_t s = 0; s < a.group_size / 8; s++, w += kStep, bytes += 2 * kStep)
      for (size_t v = 0; v < kStep; v += 64) {
        prefetch(w + kAhead + v);
        const __m512i both = _mm512_load_si512(w + v);
        _mm512_store_si512(bytes + v, _mm512_and_si512(both, low));
        _mm512_store_si512(bytes + kStep + v, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
      }
  }
  return w;
}

#include "panels.inc"

// ---- probe -------------------------------------------------------------------------------------------------------
template <size_t N>
double probe(size_t iterations) {
  __m512i acc[N], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
  for (auto& v : acc) v = _mm512_setzero_si512();
  for (size_t i = 0; i < iterations; i++) {
#pragma GCC unroll 24
    for (size_t j = 0; j < N; j++) acc[j] = _mm512_dpbusd_epi32(acc[j], a, b);
    asm volatile("" : "+v"(a), "+v"(b));  // keeps the loop
  }
  for (size_t j = 1; j < N; j++) acc[0] = _mm512_add_epi32(acc[0], acc[j]);
  volatile int32_t sink = _mm512_reduce_add_epi32(acc[0]);
  static_cast<void>(sink);
  return 64.0 * N * static_cast<double>(iterations);
}

double int8_probe(size_t iterations, int variant) {
  if (variant == 0) return probe<8>(iterations);
  if (variant == 1) return probe<12>(iterations);
  return probe<16>(iterations);
}

}  // namespace

const Kernels avx512vnni_kernels = {
    "avx512vnni", linear_w4,  linear_w8, linear_float, kLinearRows, quantize,  rmsnorm,    swiglu,     hadamard,
    attention,    kQueryRows, to_f32,    to_f16,       low_rank_up, round_row, int8_probe, read_probe,
};

}  // namespace llamita
