// Products with bf16 weights by vdpbf16ps (AVX-512 BF16), which adds two products to each of 16 sums, the second
// first, rounds each time half to even and takes subnormal numbers as 0. An output has four sums; sum j adds the pairs
// of inputs (2i, 2i + 1) with i mod 4 = j one after the other. The output is (0 + 2) + (1 + 3). So its bits depend on
// no tile.
#include <immintrin.h>

#include "kernels.h"

namespace llamita {
namespace {

constexpr size_t kStep = kBf16Step, kQuarter = 8;  // inputs in a vector of one row, and of four rows
constexpr size_t kTile = 12;                       // tokens x 2 vectors of four rows: 24 accumulators
constexpr size_t kFewTokens = 8, kFewRows = 8;     // up to so many tokens, weights stay in registers, 8 rows at a time
constexpr size_t kInputs = 1024;  // of a tile at a time: 16 KiB of weights and 24 KiB of tokens stay in the L1 cache
constexpr size_t kAhead = 1024;   // inputs ahead to prefetch of each row
constexpr size_t kPair = 2 * 32;  // weights in the two vectors of a tile
constexpr size_t kSums = 2 * 4;   // vectors of sums of a panel and token

size_t min(size_t a, size_t b) { return a < b ? a : b; }
size_t padded(size_t columns) { return (columns + kStep - 1) / kStep * kStep; }

// In assembly: GCC 12 copies the accumulator around its intrinsic.
__m512 dot2(__m512 acc, __m512i w, __m512i x) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
  return acc;
}

__m512i broadcast8(const uint16_t* x) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}

// Four rows `stride` inputs apart, of which `count` exist
struct Four {
  const uint16_t* w;
  size_t stride, count;
};

// Loads 32 inputs from k of four rows: vector p holds inputs 8p to 8p + 7 of each. What does not exist is 0.
[[gnu::always_inline]] inline void load_four(const Four& rows, size_t k, size_t columns, __m512i (&out)[4]) {
  const uint16_t* w = rows.w + k;
  __m512i r[4];
  if (rows.count == 4 && k + kStep <= columns) {
#pragma GCC unroll 8
    for (size_t i = 0; i < 4; i++) {
      _mm_prefetch(reinterpret_cast<const char*>(w + i * rows.stride + kAhead), _MM_HINT_T0);
      r[i] = _mm512_loadu_si512(w + i * rows.stride);
    }
  } else {
    const size_t inputs = columns - k;
    const __mmask32 mask = inputs >= kStep ? ~__mmask32{0} : (__mmask32{1} << inputs) - 1u;
    for (size_t i = 0; i < 4; i++)
      r[i] = i < rows.count ? _mm512_maskz_loadu_epi16(mask, w + i * rows.stride) : _mm512_setzero_si512();
  }
  const __m512i low = _mm512_shuffle_i32x4(r[0], r[1], 0x44), high = _mm512_shuffle_i32x4(r[0], r[1], 0xee);
  const __m512i low2 = _mm512_shuffle_i32x4(r[2], r[3], 0x44), high2 = _mm512_shuffle_i32x4(r[2], r[3], 0xee);
  out[0] = _mm512_shuffle_i32x4(low, low2, 0x88);
  out[1] = _mm512_shuffle_i32x4(low, low2, 0xdd);
  out[2] = _mm512_shuffle_i32x4(high, high2, 0x88);
  out[3] = _mm512_shuffle_i32x4(high, high2, 0xdd);
}

// Adds up sums: lane 4q + j is of vector j's row q.
__m512 add_up(__m512 s0, __m512 s1, __m512 s2, __m512 s3) {
  const auto fold = [](__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x44), _mm512_shuffle_ps(x, y, 0xee));
  };
  const __m512 x = fold(s0, s1), y = fold(s2, s3);
  return _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x88), _mm512_shuffle_ps(x, y, 0xdd));
}

// Writes outputs [n, n + 16) of a token, as many as exist.
void write(const Bf16Linear& a, size_t t, size_t n, __m512 y) {
  const size_t count = a.count - n;
  const __mmask16 mask = static_cast<__mmask16>(count >= kLanes ? 0xffffu : (1u << count) - 1u);
  float* out = a.out + t * a.out_stride + n;
  if (a.bias) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, a.bias + n));
  if (a.accumulate) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, out));
  _mm512_mask_storeu_ps(out, mask, y);
}

// `count` rows n, n + step, ..., times T tokens. Weights stay in registers.
template <size_t T>
void few_rows(const Bf16Linear& a, size_t n, size_t step, size_t count) {
  const uint16_t* w = a.w + n * a.columns;
  const size_t stride = step * a.columns;
  const Four rows[2] = {{w, 2 * stride, (count + 1) / 2}, {w + stride, 2 * stride, count / 2}};
  __m512 acc[T][2];
#pragma GCC unroll 8
  for (size_t i = 0; i < T; i++) acc[i][0] = acc[i][1] = _mm512_setzero_ps();
  const auto add = [&](const Four& four, size_t v, size_t k) __attribute__((always_inline)) {
    __m512i part[4];
    load_four(four, k, a.columns, part);
#pragma GCC unroll 8
    for (size_t i = 0; i < T; i++)
#pragma GCC unroll 8
      for (size_t p = 0; p < 4; p++)
        acc[i][v] = dot2(acc[i][v], part[p], broadcast8(a.x + (k + p * kQuarter) * T + i * kQuarter));
  };
  size_t k = 0;
  if (count == kFewRows)
    for (const Four whole[2] = {{w, 2 * stride, 4}, {w + stride, 2 * stride, 4}}; k + kStep <= a.columns; k += kStep) {
      add(whole[0], 0, k);
      add(whole[1], 1, k);
    }
  for (; k < a.columns; k += kStep) {
    add(rows[0], 0, k);
    add(rows[1], 1, k);
  }
#pragma GCC unroll 8
  for (size_t i = 0; i < T; i++) {
    float y[kLanes];
    _mm512_storeu_ps(y, add_up(acc[i][0], acc[i][1], acc[i][0], acc[i][1]));
    for (size_t r = 0; r < count; r++) {
      const size_t row = n + r * step;
      float* out = a.out + i * a.out_stride + row;
      float sum = y[r / 2 * 4 + r % 2];
      if (a.bias) sum += a.bias[row];
      if (a.accumulate) sum += *out;
      *out = sum;
    }
  }
}

// Few tokens: memory sets the pace. The rows computed together are far apart, which gives memory long streams.
template <size_t T>
void few_tokens(const Bf16Linear& a) {
  const size_t step = a.count / kFewRows;
  for (size_t n = 0; n < step; n++) few_rows<T>(a, n, step, kFewRows);
  if (step * kFewRows < a.count) few_rows<T>(a, step * kFewRows, 1, a.count - step * kFewRows);
}

// T tokens times `count` inputs from k of two vectors of rows. w: (count / 8, 2, 32). sums: tokens kSums vectors apart,
// those of earlier inputs.
template <size_t T>
void tile(const Bf16Linear& a, const uint16_t* w, size_t k, size_t count, size_t t, float* sums) {
  const size_t width = min(a.tokens, kTile);
  const uint16_t* x = a.x + t * padded(a.columns) + k * width;
  __m512 acc[T][2];
#pragma GCC unroll 12
  for (size_t i = 0; i < T; i++)
#pragma GCC unroll 2
    for (size_t v = 0; v < 2; v++)
      acc[i][v] = k == 0 ? _mm512_setzero_ps() : _mm512_load_ps(sums + (i * kSums + v) * kLanes);
  for (size_t j = 0; j < count; j += kStep, w += 4 * kPair)
#pragma GCC unroll 8
    for (size_t p = 0; p < 4; p++) {
      const __m512i w0 = _mm512_load_si512(w + p * kPair), w1 = _mm512_load_si512(w + p * kPair + kPair / 2);
#pragma GCC unroll 12
      for (size_t i = 0; i < T; i++) {
        const __m512i v = broadcast8(x + i * kQuarter);
        acc[i][0] = dot2(acc[i][0], w0, v);
        acc[i][1] = dot2(acc[i][1], w1, v);
      }
      x += width * kQuarter;
    }
#pragma GCC unroll 12
  for (size_t i = 0; i < T; i++)
#pragma GCC unroll 2
    for (size_t v = 0; v < 2; v++) _mm512_store_ps(sums + (i * kSums + v) * kLanes, acc[i][v]);
}

template <size_t T, class F>
void for_rest(size_t t, size_t count, F f) {
  if (count == T) return f.template operator()<T>(t);
  if constexpr (T > 1) for_rest<T - 1>(t, count, f);
}

// Reorders inputs [k, k + count) of a panel: (4, count / 8, 2, 32), where 4 x 2 are its vectors of four rows.
void reorder(const Bf16Linear& a, size_t n, size_t k, size_t count, uint16_t* out) {
  for (size_t v = 0; v < kSums; v++) {
    const size_t row = n + v / 4 * kLanes + v % 4;  // and row + 4, row + 8, row + 12
    const Four rows{a.w + row * a.columns, 4 * a.columns, row < a.count ? min(4, (a.count - row + 3) / 4) : 0};
    uint16_t* to = out + v / 2 * count * kQuarter + v % 2 * kPair / 2;
    for (size_t i = k; i < k + count; i += kStep) {
      __m512i w[4];
      load_four(rows, i, a.columns, w);
      for (size_t p = 0; p < 4; p++, to += kPair) _mm512_store_si512(to, w[p]);
    }
  }
}

// A panel of reordered weights times T tokens. One part of the inputs after the other, which stays in the L1 cache.
template <size_t T>
void panel_tile(const Bf16Linear& a, const uint16_t* w, size_t n, size_t t) {
  alignas(64) float sums[T * kSums * kLanes];
  for (size_t k = 0; k < padded(a.columns); k += kInputs) {
    const size_t count = min(kInputs, padded(a.columns) - k);
    for (size_t v = 0; v < kSums; v += 2)
      tile<T>(a, w + k * kPanelRows + v / 2 * count * kQuarter, k, count, t, sums + v * kLanes);
  }
  for (size_t i = 0; i < T; i++)
    for (size_t half = 0; half < 2 && n + half * kLanes < a.count; half++) {
      const float* from = sums + (i * kSums + half * 4) * kLanes;
      write(a, t + i, n + half * kLanes,
            add_up(_mm512_load_ps(from), _mm512_load_ps(from + kLanes), _mm512_load_ps(from + 2 * kLanes),
                   _mm512_load_ps(from + 3 * kLanes)));
    }
}

// Many tokens: a panel is reordered into cache and used for every token.
void many_tokens(const Bf16Linear& a, size_t n, uint16_t* w) {
  const size_t columns = padded(a.columns);
  for (size_t k = 0; k < columns; k += kInputs) reorder(a, n, k, min(kInputs, columns - k), w + k * kPanelRows);
  for (size_t t = 0; t < a.tokens; t += kTile)
    for_rest<kTile>(t, min(kTile, a.tokens - t), [&]<size_t T>(size_t first) { panel_tile<T>(a, w, n, first); });
}

void linear(const Bf16Linear& a, uint16_t* scratch) {
  if (a.tokens > kFewTokens)
    for (size_t n = 0; n < a.count; n += kPanelRows) many_tokens(a, n, scratch);
  else
    for_rest<kFewTokens>(0, a.tokens, [&]<size_t T>(size_t) { few_tokens<T>(a); });
}

void round(const float* x, size_t tokens, size_t width, size_t columns, uint16_t* out) {
  for (size_t t = 0; t < tokens; t++, x += columns, out += kQuarter)
    for (size_t k = 0; k < padded(columns); k += kLanes) {
      const size_t rest = k < columns ? columns - k : 0;
      const __mmask16 mask = static_cast<__mmask16>(rest >= kLanes ? 0xffffu : (1u << rest) - 1u);
      const __m256i both = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x + k)));
      __m128i* to = reinterpret_cast<__m128i*>(out + k * width);
      _mm_storeu_si128(to, _mm256_castsi256_si128(both));
      _mm_storeu_si128(to + width, _mm256_extracti128_si256(both, 1));
    }
}

}  // namespace

const Bf16Kernels avx512bf16_kernels = {linear, round, kTile};

}  // namespace llamita
