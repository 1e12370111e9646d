// AVX2 with FMA and F16C. 4-bit weights: vpmaddubsw never saturates (2 * 15 * 128 = 3840), and 8 of its results fit
// 16 bits. 8-bit weights would: they are widened to 16 bits, even and odd inputs apart.
#include <immintrin.h>

#include "kernels.h"

namespace llamita {
namespace {

// ---- 16 floats ---------------------------------------------------------------------------------------------------
struct V {
  __m256 lo, hi;
};

constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
void store(float* p, V a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
V set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
V operator+(V a, V b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
V operator-(V a, V b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
V operator*(V a, V b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
V operator/(V a, V b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
V min(V a, V b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
V max(V a, V b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
V rint(V a) { return {_mm256_round_ps(a.lo, kNearest), _mm256_round_ps(a.hi, kNearest)}; }
V select_less(V a, V b, V yes, V no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
V keep(V a, size_t count, V other) {
  const V lane = {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_ps(8, 9, 10, 11, 12, 13, 14, 15)};
  return select_less(lane, set1(static_cast<float>(count)), a, other);
}
__m256 exp2_half(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
V exp2_whole(V n) { return {exp2_half(n.lo), exp2_half(n.hi)}; }

template <class F>
float tree(V a, F f) {
  const __m256 eight = f(a.lo, a.hi);
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

// Lane i: sum(a[i]), for eight vectors: the same tree of halves, the vectors side by side.
__m256 sum_eight(const V* a) {
  const auto fold8 = [](V x, V y) {  // halves of 4: x, y
    const __m256 s = _mm256_add_ps(x.lo, x.hi), t = _mm256_add_ps(y.lo, y.hi);
    return _mm256_add_ps(_mm256_permute2f128_ps(s, t, 0x20), _mm256_permute2f128_ps(s, t, 0x31));
  };
  const auto two = [](__m256 x, __m256 y) {
    return _mm256_add_ps(_mm256_shuffle_ps(x, y, 0x44), _mm256_shuffle_ps(x, y, 0xee));
  };
  const auto one = [](__m256 x, __m256 y) {
    return _mm256_add_ps(_mm256_shuffle_ps(x, y, 0x88), _mm256_shuffle_ps(x, y, 0xdd));
  };
  const __m256 x = two(fold8(a[0], a[4]), fold8(a[1], a[5]));
  const __m256 y = two(fold8(a[2], a[6]), fold8(a[3], a[7]));
  return one(x, y);
}
V sum_each(const V (&a)[kLanes]) { return {sum_eight(a), sum_eight(a + 8)}; }

void store_i8(int8_t* p, V a) {
  const __m256i words =
      _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
V load_f16(const void* p) {
  const __m128i* halves = static_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
__m256 from_bf16(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
V load_bf16(const void* p) {
  const __m128i* halves = static_cast<const __m128i*>(p);
  return {from_bf16(_mm_loadu_si128(halves)), from_bf16(_mm_loadu_si128(halves + 1))};
}
V load_i8(const void* p) {
  const __m128i codes = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(codes, 8)))};
}
void store_f16(uint16_t* p, V a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, kNearest));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.hi, kNearest));
}
void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// Tiles: how much is computed together, of 16 registers of 8 floats. Results do not depend on them.
constexpr size_t kLinearRows = 2, kLinearTokens = 3, kDecodeRows = 4;
constexpr size_t kCandidates = 4;
constexpr size_t kQueryRows = 6, kQueryTile = 6;

// clang-format off: in this order
#include "float_kernels.inc"
#include "attention.inc"
#include "rounding.inc"
// clang-format on

// ---- 4- and 8-bit weights ----------------------------------------------------------------------------------------
constexpr size_t kAhead = 8192;  // bytes of prefetch: beyond the pages where the hardware's own stops
constexpr size_t kStep = 128;    // bytes of panel per 8 (w4) or 4 (w8) inputs: 4 vectors
constexpr size_t kVectors = 4;   // of 8 rows each
constexpr size_t kUnpackedTokens = 3, kByteTokens = 2;  // tokens whose sums fit into the registers

__m256i load_bytes(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
__m256i broadcast4(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, sizeof four);
  return _mm256_set1_epi32(four);
}
__m256i widen_sums(__m256i sums, __m256i dot) {  // 16 sums of 16 bits into 8 of 32
  return _mm256_add_epi32(dot, _mm256_madd_epi16(sums, _mm256_set1_epi16(1)));
}

// What T tokens have summed so far for the 32 rows of a panel
template <size_t T>
struct Sums {
  __m256 acc[T][kVectors];
  __m256i dot[T][kVectors];
};

template <size_t T>
void load_sums(Sums<T>& sums, const float* acc) {
  for (size_t i = 0; i < T; i++)
    for (size_t v = 0; v < kVectors; v++) sums.acc[i][v] = _mm256_loadu_ps(acc + i * kPanelRows + v * 8);
}

template <size_t T>
void store_sums(const Sums<T>& sums, float* acc) {
  for (size_t i = 0; i < T; i++)
    for (size_t v = 0; v < kVectors; v++) _mm256_storeu_ps(acc + i * kPanelRows + v * 8, sums.acc[i][v]);
}

template <size_t T>
void clear(Sums<T>& sums) {
  for (auto& row : sums.acc)
    for (__m256& v : row) v = _mm256_setzero_ps();
}

template <size_t T>
void start_group(Sums<T>& sums, const QuantizedLinear& a, size_t t, size_t g) {
  for (size_t i = 0; i < T; i++)
    for (__m256i& v : sums.dot[i]) v = _mm256_set1_epi32(a.x_start[(t + i) * a.groups + g]);
}

template <size_t T>
void end_group(Sums<T>& sums, const V& s0, const V& s1) {
  const __m256 scales[kVectors] = {s0.lo, s0.hi, s1.lo, s1.hi};
  for (size_t i = 0; i < T; i++)
    for (size_t v = 0; v < kVectors; v++)
      sums.acc[i][v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums.dot[i][v]), scales[v], sums.acc[i][v]);
}

template <size_t T>
void finish_tile(const Sums<T>& sums, const QuantizedLinear& a, size_t panel, size_t t) {
  for (size_t i = 0; i < T; i++)
    finish(a, t + i, panel, {sums.acc[i][0], sums.acc[i][1]}, {sums.acc[i][2], sums.acc[i][3]});
}

V scales_of(const uint8_t* scales, bool bf16, size_t half) {
  return bf16 ? load_bf16(scales + half * 32) : load(reinterpret_cast<const float*>(scales) + half * kLanes);
}

// kSteps steps of 8 inputs (at most 4: 16-bit sums) of nibbles, all 4 vectors of rows
template <size_t T, size_t kSteps>
void nibbles(Sums<T>& sums, const uint8_t* w, const int8_t* x, size_t x_stride) {
  const __m256i low = _mm256_set1_epi8(15);
#pragma GCC unroll 4
  for (size_t v = 0; v < kVectors; v++) {
    __m256i part[T];
    for (auto& p : part) p = _mm256_setzero_si256();
#pragma GCC unroll 1
    for (size_t s = 0; s < kSteps; s++) {  // unrolled, GCC keeps too much in registers
      const __m256i both = load_bytes(w + s * kStep + v * 32);
      const __m256i first = _mm256_and_si256(both, low), second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
#pragma GCC unroll 4
      for (size_t i = 0; i < T; i++) {
        const int8_t* codes = x + i * x_stride + s * 8;
        part[i] = _mm256_add_epi16(part[i], _mm256_maddubs_epi16(first, broadcast4(codes)));
        part[i] = _mm256_add_epi16(part[i], _mm256_maddubs_epi16(second, broadcast4(codes + 4)));
      }
    }
    for (size_t i = 0; i < T; i++) sums.dot[i][v] = widen_sums(part[i], sums.dot[i][v]);
  }
}

// f.operator()<kSteps>() in runs of kMost steps, then one by one
template <size_t kMost, class F>
void for_steps(size_t steps, F f) {
  for (; steps >= kMost; steps -= kMost) f.template operator()<kMost>();
  for (; steps > 0; steps--) f.template operator()<1>();
}

template <size_t T>
void fused_tile(const QuantizedLinear& a, size_t panel) {
  const uint8_t* w = a.panels + panel * a.panel_stride;
  const int8_t* x = a.x;
  Sums<T> sums;
  clear(sums);
  for (size_t g = 0; g < a.groups; g++) {
    const V s0 = scales_of(w, a.bf16_scales, 0), s1 = scales_of(w, a.bf16_scales, 1);
    prefetch(w + kAhead);
    w += kPanelRows * (a.bf16_scales ? 2 : 4);
    start_group(sums, a, 0, g);
    for_steps<4>(a.group_size / 8, [&]<size_t kSteps>() {
      for (size_t line = 0; line < kSteps * kStep; line += 64) prefetch(w + kAhead + line);
      nibbles<T, kSteps>(sums, w, x, a.x_stride);
      w += kSteps * kStep;
      x += kSteps * 8;
    });
    end_group(sums, s0, s1);
  }
  finish_tile(sums, a, panel, 0);
}

// kSteps steps of 4 inputs of unpacked nibbles (at most 8), two vectors of rows at a time
template <size_t T, size_t kSteps>
void small_bytes(Sums<T>& sums, const uint8_t* w, const int8_t* x, size_t x_stride) {
  for (size_t v = 0; v < kVectors; v += 2) {
    __m256i part[T][2];
    for (auto& p : part) p[0] = p[1] = _mm256_setzero_si256();
#pragma GCC unroll 1
    for (size_t s = 0; s < kSteps; s++) {  // unrolled, GCC keeps too much in registers
      const __m256i w0 = load_bytes(w + s * kStep + v * 32), w1 = load_bytes(w + s * kStep + v * 32 + 32);
#pragma GCC unroll 4
      for (size_t i = 0; i < T; i++) {
        const __m256i four = broadcast4(x + i * x_stride + s * 4);
        part[i][0] = _mm256_add_epi16(part[i][0], _mm256_maddubs_epi16(w0, four));
        part[i][1] = _mm256_add_epi16(part[i][1], _mm256_maddubs_epi16(w1, four));
      }
    }
    for (size_t i = 0; i < T; i++) {
      sums.dot[i][v] = widen_sums(part[i][0], sums.dot[i][v]);
      sums.dot[i][v + 1] = widen_sums(part[i][1], sums.dot[i][v + 1]);
    }
  }
}

template <size_t T>
void unpacked_tile(const QuantizedLinear& a, const uint8_t* w, const float* scales, size_t group, size_t groups,
                   size_t t, float* acc) {
  const int8_t* x = a.x + t * a.x_stride + group * a.group_size;
  Sums<T> sums;
  load_sums(sums, acc);
  for (size_t g = group; g < group + groups; g++, scales += kPanelRows) {
    start_group(sums, a, t, g);
    for_steps<8>(a.group_size / 4, [&]<size_t kSteps>() {
      small_bytes<T, kSteps>(sums, w, x, a.x_stride);
      w += kSteps * kStep;
      x += kSteps * 4;
    });
    end_group(sums, load(scales), load(scales + kLanes));
  }
  store_sums(sums, acc);
}

// 8-bit weights: 16-bit products of even inputs (0 and 2 of 4) and of odd ones, summed in pairs to 32 bits
template <size_t T>
void byte_tile(const QuantizedLinear& a, size_t panel, size_t t) {
  const uint8_t* w = a.panels + panel * a.panel_stride;
  const int8_t* x = a.x + t * a.x_stride;
  Sums<T> sums;
  clear(sums);
  start_group(sums, a, t, 0);
  for (size_t k = 0; k < a.columns; k += 4, w += kStep) {
    __m256i x_even[T], x_odd[T];
    for (size_t i = 0; i < T; i++) {
      const __m256i four = broadcast4(x + i * a.x_stride + k);
      x_even[i] = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8);
      x_odd[i] = _mm256_srai_epi16(four, 8);
    }
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; v++) {
      const __m256i bytes = load_bytes(w + v * 32);
      const __m256i even = _mm256_and_si256(bytes, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(bytes, 8);
      for (size_t i = 0; i < T; i++) {
        const __m256i pairs = _mm256_add_epi32(_mm256_madd_epi16(even, x_even[i]), _mm256_madd_epi16(odd, x_odd[i]));
        sums.dot[i][v] = _mm256_add_epi32(sums.dot[i][v], pairs);
      }
    }
  }
  const float* scales = a.scales + panel * kPanelRows;
  end_group(sums, load(scales), load(scales + kLanes));
  finish_tile(sums, a, panel, t);
}

const uint8_t* unpack(const QuantizedLinear& a, const uint8_t* w, size_t groups, uint8_t* bytes, float* scales) {
  const __m256i low = _mm256_set1_epi8(15);
  for (size_t g = 0; g < groups; g++, scales += kPanelRows) {
    store(scales, scales_of(w, a.bf16_scales, 0));
    store(scales + kLanes, scales_of(w, a.bf16_scales, 1));
    w += kPanelRows * (a.bf16_scales ? 2 : 4);
    for (size_t s = 0; s < a.group_size / 8; s++, w += kStep, bytes += 2 * kStep)
      for (size_t v = 0; v < kStep; v += 32) {
        const __m256i both = load_bytes(w + v);
        _mm256_store_si256(reinterpret_cast<__m256i*>(bytes + v), _mm256_and_si256(both, low));
        _mm256_store_si256(reinterpret_cast<__m256i*>(bytes + kStep + v),
                           _mm256_and_si256(_mm256_srli_epi16(both, 4), low));
      }
  }
  return w;
}

#include "panels.inc"

// ---- probe -------------------------------------------------------------------------------------------------------
template <size_t N>
double probe(size_t iterations) {
  __m256i acc[N], a = _mm256_set1_epi8(1), b = _mm256_set1_epi8(1);
  for (auto& v : acc) v = _mm256_setzero_si256();
  for (size_t i = 0; i < iterations; i++)
#pragma GCC unroll 12
    for (size_t j = 0; j < N; j++) {
      acc[j] = _mm256_add_epi16(acc[j], _mm256_maddubs_epi16(a, b));
      asm volatile("" : "+x"(a));  // each product is to be made anew
    }
  for (size_t j = 1; j < N; j++) acc[0] = _mm256_add_epi16(acc[0], acc[j]);
  volatile int32_t sink = _mm256_extract_epi32(acc[0], 0);
  static_cast<void>(sink);
  return 32.0 * N * static_cast<double>(iterations);
}

double int8_probe(size_t iterations, int variant) {
  if (variant == 0) return probe<8>(iterations);
  if (variant == 1) return probe<10>(iterations);
  return probe<12>(iterations);
}

}  // namespace

const Kernels avx2_kernels = {
    "avx2",    linear_w4,  linear_w8, linear_float, kLinearRows, quantize,   rmsnorm,    swiglu,
    attention, kQueryRows, to_f32,    to_f16,       round_row,   int8_probe, read_probe,
};

}  // namespace llamita
