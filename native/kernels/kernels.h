// The table of pure functions (no allocation, no threads, no errors) that each instruction set provides.
// Only plain structs and constants: an inline function here, compiled with AVX-512 flags, could be the copy that the
// linker keeps for every machine.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace llamita {

constexpr size_t kPanelRows = 32;      // output rows that are stored and computed together
constexpr size_t kLanes = 16;          // floats in a logical vector, on every instruction set
constexpr size_t kSumInputs = 32;      // inputs per partial sum kept with quantized activations
constexpr size_t kKeyBlock = 128;      // keys per online-softmax update
constexpr size_t kKeyTile = 16;        // keys stored side by side
constexpr size_t kQuad = 4;            // dimensions of int8 keys, or positions of int8 values, side by side
constexpr size_t kBf16Step = 32;       // inputs of bf16 products are padded to a multiple of this
constexpr size_t kChunkInputs = 2048;  // inputs of a panel unpacked at a time: 64 KiB, a small part of the L2 cache

enum class Dtype : int { f32, f16, bf16 };

// y[t, n] = x_scale[t] * (sum_g scale[n, g] * dot[t, n, g] - x_zero[t] * colsum[n]) + bias[n] (+ y[t, n])
struct QuantizedLinear {
  // weights: panels of kPanelRows rows; pack.cpp describes the layout
  const uint8_t* panels;
  size_t panel_stride;   // bytes
  const float* scales;   // w8 only: (panels * 32,)
  const float* colsum;   // (panels * 32,)
  size_t rows, columns;  // columns with padding to whole steps (8 for w4, 4 for w8)
  size_t group_size, groups;
  bool bf16_scales;  // w4: the scales in the stream are bf16, else f32
  // activations
  const int8_t* x;  // (tokens, x_stride)
  size_t x_stride;
  const float* x_scale;    // (tokens,)
  const int32_t* x_zero;   // (tokens,)
  const int32_t* x_start;  // (tokens, groups): minus the weights' offset (8 or 128) times the sum of codes
  size_t tokens;
  float* out;         // (tokens, rows); gated: (tokens, rows / 2)
  const float* bias;  // (rows,) or null
  bool accumulate;
  bool gated;  // out = silu(y[:, :rows / 2]) * y[:, rows / 2:]; each panel holds 16 gates, then their 16 factors
};

// y[t, n] = sum_k x[t, k] * w[n, k] (+ bias[n]) (+ y[t, n]) for `count` consecutive rows of one array
struct FloatLinear {
  const void* w;  // (count, columns), of `dtype`, not necessarily aligned
  Dtype dtype;
  size_t count, columns;
  const float* x;  // (tokens, columns)
  size_t tokens;
  float* out;  // first of `count` columns of (tokens, out_stride)
  size_t out_stride;
  const float* bias;  // (count,) or null
  bool accumulate;
};

// The same for bf16 weights and for inputs as Bf16Kernels::round leaves them
struct Bf16Linear {
  const uint16_t* w;  // (count, columns)
  size_t count, columns;
  const uint16_t* x;
  size_t tokens;
  float* out;
  size_t out_stride;
  const float* bias;
  bool accumulate;
};

// out[t, n] += sum_r x[t, r] * w[n, r]; w is stored in panels of kLanes outputs, each (rank, kLanes)
struct LowRankUp {
  const void* w;  // of `dtype`
  Dtype dtype;
  size_t rank, outputs;
  const float* x;  // tokens x_stride apart
  size_t x_stride, tokens;
  float* out;  // tokens out_stride apart
  size_t out_stride;
};

struct QuantizedRow {
  int8_t* codes;  // (columns,)
  float* scale;
  int32_t* zero;
  int32_t* sums;  // (ceil(columns / kSumInputs),)
};

// A row is multiplied by H_outer (x) H_n / sqrt(size), n = size / outer a power of two.
struct Hadamard {
  size_t size, outer;
  const float* signs;  // (outer, outer), each 1 or -1; null: outer is 1
  float factor;        // 1 / sqrt(size)
};

enum class CacheDtype : int { f32, f16, i8 };

// Scales and zero points of one head's positions in a block: a code means scale * (code - zero).
struct Coding {
  float key_scales[kKeyBlock], value_scales[kKeyBlock];
  int8_t key_zeros[kKeyBlock], value_zeros[kKeyBlock];
};

// The query rows that share one key/value head: row i is token i / group, query head i % group of the head.
// A block holds kKeyBlock positions: keys (tiles, head_dim, kKeyTile), then values (kKeyBlock, value_stride). For i8:
// their Coding, then keys (tiles, ceil(head_dim / 4), kKeyTile, 4) of code + 128, then values (kKeyBlock / 4,
// value_stride, 4): the operands of instructions that add up four products of bytes.
struct AttentionHead {
  const uint8_t* blocks;
  size_t block_stride;  // bytes
  CacheDtype dtype;
  size_t head_dim, value_stride;
  const float* query;  // first query head of the first token; tokens query_stride apart
  size_t query_stride;
  float* out;
  size_t out_stride;
  size_t group;   // query heads per key/value head
  size_t start;   // position of the first token
  size_t window;  // the most keys that a query sees, itself included: the last ones; at least 1
  float scale;    // log2(e) / sqrt(head_dim)
};

// The rule for the scale: torchao's formula, the same rounded to bf16, or least squared error on the bf16 grid.
enum class Rule : int { torchao, torchao_bf16, search };

struct Rounding {
  const float* importance;  // (columns,) factors of the search's squared errors, or null
  size_t columns, group_size;
  int qmax;  // 7 or 127; qmin is -qmax - 1
  Rule rule;
};

// Products by instructions that multiply bf16 and add in float32
struct Bf16Kernels {
  // scratch, 64-byte aligned: kPanelRows * columns (rounded up to kBf16Step)
  void (*linear)(const Bf16Linear&, uint16_t* scratch);
  // Rounds a tile of tokens, half to even, into the order of this kernel: `width` times `columns`, these rounded up to
  // kBf16Step, with zeros. A tile has `tile` tokens, and the last one what is left. width: min(tile, all tokens).
  void (*round)(const float* x, size_t tokens, size_t width, size_t columns, uint16_t* out);
  size_t tile;
};

struct Kernels {
  const char* name;
  // Panels [first, last). scratch, 64-byte aligned: 32 * n bytes, n / 8 * 32 floats and tokens * 32 floats, where n is
  // the larger of group_size and kChunkInputs.
  void (*linear_w4)(const QuantizedLinear&, size_t first, size_t last, uint8_t* scratch);
  void (*linear_w8)(const QuantizedLinear&, size_t first, size_t last);
  // scratch: float_scratch_rows * columns (rounded up to kLanes) floats
  void (*linear_float)(const FloatLinear&, float* scratch);
  size_t float_scratch_rows;
  void (*quantize)(const float* x, size_t columns, const QuantizedRow&);
  // x and out may be the same
  void (*rmsnorm)(const float* x, const float* gamma, size_t columns, float eps, float* out);
  void (*swiglu)(const float* gate, const float* up, size_t columns, float* out);
  // x and out may be the same. scratch: outer * kLanes floats
  void (*hadamard)(const float* x, const Hadamard&, float* scratch, float* out);
  // Query rows [first, last). scratch, 64-byte aligned, in floats: head_dim + value_stride for each of kKeyBlock
  // positions and for each row, 2 * kLanes + 2 for each row, and query_rows * kKeyBlock.
  void (*attention)(const AttentionHead&, size_t first, size_t last, float* scratch);
  size_t query_rows;  // rows that share a pass over the keys, at most kLanes
  void (*to_f32)(const void* source, Dtype, size_t count, float* out);
  void (*to_f16)(const float* source, size_t count, uint16_t* out);
  void (*low_rank_up)(const LowRankUp&, size_t first, size_t last);  // panels [first, last)
  // Returns false, and writes nothing, if w holds NaN or infinity. scratch: 2 * (group_size + kLanes) floats.
  bool (*round_row)(const float* w, const Rounding&, float* scratch, int8_t* codes, float* scales,
                    double* squared_error);
  // Probes: multiply-adds done in registers only; a checksum of everything read.
  double (*int8_probe)(size_t iterations, int variant);
  float (*read_probe)(const uint8_t* data, size_t bytes, int variant);
  const Bf16Kernels* bf16 = nullptr;  // null: this processor has no such instructions
};

constexpr int kProbeVariants = 3;

extern const Kernels scalar_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avxvnni_kernels;
extern const Kernels avxvnni_evex_kernels;  // replaces avxvnni on processors that cannot run it
extern const Kernels avx512vnni_kernels;
extern const Bf16Kernels avx512bf16_kernels;  // beside avx512vnni and amx
extern const Kernels amx_kernels;
extern const Kernels amx_portable_kernels;  // for tests: tiles in plain arrays
extern const Kernels neon_dotprod_kernels;
extern const Kernels neon_i8mm_kernels;

}  // namespace llamita
