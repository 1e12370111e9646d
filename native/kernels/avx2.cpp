// AVX2 with FMA and F16C. With 4-bit weights vpmaddubsw never saturates (2 * 15 * 128 = 3840), and 8 of its results fit
// 16 bits. With 8-bit weights it would, so these are widened to 16 bits, even and odd inputs separately.
#include <immintrin.h>

#include "kernels.h"

namespace llamita {
namespace {

// Even bytes and odd ones, as 16-bit numbers
__m256i byte_products(__m256i sums, __m256i w, __m256i x) {
  const __m256i even =
      _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8));
  return _mm256_add_epi32(sums, _mm256_add_epi32(even, odd));
}
// A pair of products is at most 2 * 127 * 128, which 16 bits hold.
__m256i small_products(__m256i sums, __m256i w, __m256i x) {
  return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}

// clang-format off: in this order
#include "avx2_common.inc"
#include "memory_sums.inc"
// clang-format on

// ---- 4- and 8-bit weights ----------------------------------------------------------------------------------------
constexpr size_t kFusedTokens = 4, kFusedTile = 4, kUnpackedTile = 6,
                 kByteTile = 2;  // tokens whose sums fit into the registers

// sums += w (unsigned) * x (signed), pairs of products in 16 bits. In assembly, because GCC 12 copies the sums.
void multiply_add(__m256i& sums, __m256i w, __m256i x) {
  __m256i products;
  __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sums), "=&x"(products) : "x"(w), "x"(x));
}

__m256i widen_sums(__m256i sums, __m256i dot) {  // 16 sums of 16 bits into 8 of 32
  return _mm256_add_epi32(dot, _mm256_madd_epi16(sums, _mm256_set1_epi16(1)));
}

// Sums so far of T tokens for the 32 rows of a panel
template <size_t T>
struct Sums {
  __m256 acc[T][kVectors];
  __m256i dot[T][kVectors];
};

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

// kSteps steps of 8 inputs (at most 4: 16-bit sums) of nibbles, all 4 vectors of rows
template <size_t T, size_t kSteps>
void nibbles(Sums<T>& sums, const uint8_t* w, const int8_t* x, size_t x_stride) {
  const __m256i low = _mm256_set1_epi8(15);
#pragma GCC unroll 4
  for (size_t v = 0; v < kVectors; v++) {
    __m256i part[T];
    for (auto& p : part) p = _mm256_setzero_si256();
#pragma GCC unroll 1
    for (size_t s = 0; s < kSteps; s++) {  // not unrolled: GCC would run out of registers
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

// Calls f.operator()<kSteps>() for runs of kMost steps, then one by one.
template <size_t kMost, class F>
void for_steps(size_t steps, F f) {
  for (; steps >= kMost; steps -= kMost) f.template operator()<kMost>();
  for (; steps > 0; steps--) f.template operator()<1>();
}

template <size_t T>
void fused_tile(const QuantizedLinear& a, size_t panel, size_t t) {
  const uint8_t* w = a.panels + panel * a.panel_stride;
  const int8_t* x = a.x + t * a.x_stride;
  Sums<T> sums;
  clear(sums);
  for (size_t g = 0; g < a.groups; g++) {
    const V s0 = scales_of(w, a.bf16_scales, 0), s1 = scales_of(w, a.bf16_scales, 1);
    prefetch(w + kAhead);
    w += kPanelRows * (a.bf16_scales ? 2 : 4);
    start_group(sums, a, t, g);
    for_steps<4>(a.group_size / 8, [&]<size_t kSteps>() {
      for (size_t line = 0; line < kSteps * kStep; line += 64) prefetch(w + kAhead + line);
      nibbles<T, kSteps>(sums, w, x, a.x_stride);
      w += kSteps * kStep;
      x += kSteps * 8;
    });
    end_group(sums, s0, s1);
  }
  finish_tile(sums, a, panel, t);
}

// One group of unpacked nibbles (w: steps of 4 inputs, 128 bytes each) times T tokens, for 16 rows
template <size_t T>
void small_bytes(__m256i (&dot)[T][2], const uint8_t* w, const int8_t* x, size_t x_stride, size_t steps) {
  constexpr size_t kMost = 8;  // steps whose sum fits 16 bits
  while (steps > 0) {
    const size_t count = steps < kMost ? steps : kMost;
    steps -= count;
    __m256i part[T][2];
#pragma GCC unroll 6
    for (size_t i = 0; i < T; i++) part[i][0] = part[i][1] = _mm256_setzero_si256();
    for (const uint8_t* end = w + count * kStep; w != end; w += kStep, x += 4) {
      const __m256i w0 = load_bytes(w), w1 = load_bytes(w + 32);
#pragma GCC unroll 6
      for (size_t i = 0; i < T; i++) {
        const __m256i four = broadcast4(x + i * x_stride);
        multiply_add(part[i][0], w0, four);
        multiply_add(part[i][1], w1, four);
      }
    }
#pragma GCC unroll 6
    for (size_t i = 0; i < T; i++)
#pragma GCC unroll 2
      for (size_t v = 0; v < 2; v++) dot[i][v] = widen_sums(part[i][v], dot[i][v]);
  }
}

template <size_t T>
void add_groups(const QuantizedLinear& a, const Unpacked& part, size_t t, float* acc) {
  const uint8_t* w = part.bytes;
  const float* scales = part.scales;
  const int8_t* x = a.x + t * a.x_stride + part.group * a.group_size;
  const int32_t* start = a.x_start + t * a.groups + part.group;
  const size_t steps = a.group_size / 4;
  for (size_t g = 0; g < part.groups; g++, w += steps * kStep, x += steps * 4, scales += kPanelRows, start++)
    for (size_t half = 0; half < 2; half++) {
      __m256i dot[T][2];
#pragma GCC unroll 6
      for (size_t i = 0; i < T; i++) dot[i][0] = dot[i][1] = _mm256_set1_epi32(start[i * a.groups]);
      small_bytes<T>(dot, w + half * 64, x, a.x_stride, steps);
      const V scale = load(scales + half * kLanes);
#pragma GCC unroll 6
      for (size_t i = 0; i < T; i++) {
        float* sums = acc + i * kPanelRows + half * kLanes;
        store(sums, fma({_mm256_cvtepi32_ps(dot[i][0]), _mm256_cvtepi32_ps(dot[i][1])}, scale, load(sums)));
      }
      __asm__ volatile("" ::: "memory");
    }
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

#include "panels.inc"

// ---- probe -------------------------------------------------------------------------------------------------------
// Multiply and add, the least that a product of nibbles needs. In assembly, because GCC keeps some sums on the stack.
template <size_t N>
double probe(size_t iterations) {
  __m256i acc[N], a = _mm256_set1_epi8(1), b = _mm256_set1_epi8(1);
#pragma GCC unroll 12
  for (size_t j = 0; j < N; j++) acc[j] = _mm256_setzero_si256();
  for (size_t i = 0; i < iterations; i++) {
#pragma GCC unroll 12
    for (size_t j = 0; j < N; j++) multiply_add(acc[j], a, b);
    __asm__ volatile("" : "+x"(a), "+x"(b));  // keeps the loop
  }
#pragma GCC unroll 12
  for (size_t j = 1; j < N; j++) acc[0] = _mm256_add_epi16(acc[0], acc[j]);
  volatile int32_t sink = _mm256_extract_epi32(acc[0], 0);
  static_cast<void>(sink);
  return 32.0 * N * static_cast<double>(iterations);
}

double int8_probe(size_t iterations, int variant) {
  if (variant == 0) return probe<6>(iterations);
  if (variant == 1) return probe<8>(iterations);
  return probe<12>(iterations);
}

}  // namespace

const Kernels avx2_kernels = {
    "avx2",    linear_w4,  linear_w8, linear_float, kLinearRows, quantize,  rmsnorm,    swiglu,     hadamard,
    attention, kQueryRows, to_f32,    to_f16,       low_rank_up, round_row, int8_probe, read_probe,
};

}  // namespace llamita
