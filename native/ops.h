// The engine's operations: kernels of the chosen instruction set, run by all threads. The bindings check shapes. Work
// is divided so that results do not depend on the number of threads.
#pragma once
#include "kernels/kernels.h"
#include "pack.h"

namespace llamita {

void quantize(const float* x, size_t tokens, Activations& acts);
void rmsnorm(const float* x, const float* gamma, size_t tokens, size_t columns, float eps, float* out);
// In place, of each head of `dim` numbers of rows (heads + 2 * kv_heads) * dim: queries and keys, not values
struct HeadNorms {
  const float *q_gamma, *k_gamma;  // (dim,)
  size_t heads, kv_heads, dim;
  float eps;
};
void rmsnorm_heads(const HeadNorms& norms, size_t tokens, float* qkv);
void rmsnorm_quantize(const float* x, const float* gamma, size_t tokens, float eps, Activations& acts);
void hadamard(const Hadamard& h, const float* x, size_t tokens, float* out);  // x and out may be the same
void hadamard_quantize(const Hadamard& h, const float* x, size_t tokens, Activations& acts);
void swiglu(const float* gate_up, size_t tokens, size_t columns, float* out);

struct Output {
  float* out;         // (tokens, rows); gated: (tokens, rows / 2)
  const float* bias;  // (rows,) or null
  bool accumulate;
};
void linear_quantized(const Weights& weights, Activations& acts, const Output& output);
void linear_float(const Weights& weights, const float* x, size_t tokens, const Output& output);

// B of an adapter, in panels, for outputs [first, first + count). It reads `rank` inner values from `inner` on.
struct LowRankPart {
  const void* panels;
  Dtype dtype;
  size_t rank, count, first, inner;
};
struct LowRank {
  Weights down;  // the A of all parts, stacked
  std::vector<LowRankPart> ups;
  size_t outputs;
  float scaling;
};
void low_rank(const LowRank& a, const float* x, size_t tokens, float* out);  // adds scaling * B (A x)
void embed(const Weights& weights, const int64_t* ids, size_t tokens, float* out);

struct RoundedRows {
  int8_t* codes;
  float* scales;
  double* squared_error;
};
// Returns the first row with NaN or infinity, or `rows` if there is none.
size_t round_weights(const void* w, Dtype dtype, size_t rows, const Rounding& rounding, const RoundedRows& out);

double read_bandwidth(size_t bytes);  // GB/s
double int8_rate(const Kernels& k);   // 10^9 multiply-adds per second

}  // namespace llamita
