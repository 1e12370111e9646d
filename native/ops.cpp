#include "ops.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

#include "dispatch.h"
#include "threads.h"

namespace llamita {
namespace {

constexpr size_t kRowWork = 16384;  // elements that make waking a thread worth it

size_t grain(size_t columns) { return std::max<size_t>(1, kRowWork / std::max<size_t>(columns, 1)); }

// Returns the panels of a chunk: about 64 KB of weights, or as much arithmetic.
size_t panel_grain(size_t tokens, size_t columns) {
  return std::max<size_t>(1, 4096 / (std::max<size_t>(columns, 1) * std::min<size_t>(tokens, 4)));
}

// Returns how many tokens use a part of a panel while it is in cache. They are few enough for their codes to stay in
// cache, too. Blocks are about equal, and multiples of 48: whole tiles of 3, 6 and 16 tokens.
size_t token_block(size_t tokens, size_t columns) {
  constexpr size_t kMultiple = 48, kCodes = 640 * 1024;
  const size_t most = std::max<size_t>(48, kCodes / std::min(columns, kChunkInputs));
  const size_t blocks = (tokens + most - 1) / most;
  return (tokens + blocks * kMultiple - 1) / (blocks * kMultiple) * kMultiple;
}

Dtype dtype_of(Kind kind) {
  if (kind == Kind::f16) return Dtype::f16;
  return kind == Kind::bf16 ? Dtype::bf16 : Dtype::f32;
}

}  // namespace

void quantize(const float* x, size_t tokens, Activations& acts) {
  const Kernels& k = kernels();
  acts.tokens = tokens;
  parallel_for(tokens, grain(acts.columns), 0, [&](size_t begin, size_t end, uint8_t*) {
    for (size_t t = begin; t < end; t++) k.quantize(x + t * acts.columns, acts.columns, acts.row(t));
  });
}

void rmsnorm(const float* x, const float* gamma, size_t tokens, size_t columns, float eps, float* out) {
  const Kernels& k = kernels();
  parallel_for(tokens, grain(columns), 0, [&](size_t begin, size_t end, uint8_t*) {
    for (size_t t = begin; t < end; t++) k.rmsnorm(x + t * columns, gamma, columns, eps, out + t * columns);
  });
}

void rmsnorm_heads(const HeadNorms& norms, size_t tokens, float* qkv) {
  const Kernels& k = kernels();
  const size_t normed = norms.heads + norms.kv_heads, columns = (normed + norms.kv_heads) * norms.dim;
  parallel_for(tokens, grain(columns), 0, [&](size_t begin, size_t end, uint8_t*) {
    for (size_t t = begin; t < end; t++)
      for (size_t h = 0; h < normed; h++) {
        float* head = qkv + t * columns + h * norms.dim;
        k.rmsnorm(head, h < norms.heads ? norms.q_gamma : norms.k_gamma, norms.dim, norms.eps, head);
      }
  });
}

void rmsnorm_quantize(const float* x, const float* gamma, size_t tokens, float eps, Activations& acts) {
  const Kernels& k = kernels();
  const size_t columns = acts.columns;
  acts.tokens = tokens;
  parallel_for(tokens, grain(columns), columns * sizeof(float), [&](size_t begin, size_t end, uint8_t* scratch) {
    float* row = reinterpret_cast<float*>(scratch);
    for (size_t t = begin; t < end; t++) {
      k.rmsnorm(x + t * columns, gamma, columns, eps, row);
      k.quantize(row, columns, acts.row(t));
    }
  });
}

void hadamard(const Hadamard& h, const float* x, size_t tokens, float* out) {
  const Kernels& k = kernels();
  const size_t scratch_bytes = h.outer * kLanes * sizeof(float);
  parallel_for(tokens, grain(h.size), scratch_bytes, [&](size_t begin, size_t end, uint8_t* scratch) {
    for (size_t t = begin; t < end; t++)
      k.hadamard(x + t * h.size, h, reinterpret_cast<float*>(scratch), out + t * h.size);
  });
}

void hadamard_quantize(const Hadamard& h, const float* x, size_t tokens, Activations& acts) {
  const Kernels& k = kernels();
  const size_t scratch_bytes = (h.outer * kLanes + h.size) * sizeof(float);
  acts.tokens = tokens;
  parallel_for(tokens, grain(h.size), scratch_bytes, [&](size_t begin, size_t end, uint8_t* scratch) {
    float *vectors = reinterpret_cast<float*>(scratch), *row = vectors + h.outer * kLanes;
    for (size_t t = begin; t < end; t++) {
      k.hadamard(x + t * h.size, h, vectors, row);
      k.quantize(row, h.size, acts.row(t));
    }
  });
}

void swiglu(const float* gate_up, size_t tokens, size_t columns, float* out) {
  const Kernels& k = kernels();
  parallel_for(tokens, grain(columns), 0, [&](size_t begin, size_t end, uint8_t*) {
    for (size_t t = begin; t < end; t++) {
      const float* gate = gate_up + t * 2 * columns;
      k.swiglu(gate, gate + columns, columns, out + t * columns);
    }
  });
}

void linear_quantized(const Weights& weights, Activations& acts, const Output& output) {
  if (acts.tokens == 0) return;
  const Kernels& k = kernels();
  const bool w4 = weights.kind == Kind::w4;
  const int32_t* starts = acts.starts(weights.group_size, weights.groups, w4 ? 8 : 128);
  const size_t columns = w4 ? weights.columns : weights.group_size;  // of w8 with the padding to whole steps
  const size_t chunk = std::max(weights.group_size, kChunkInputs), outputs = weights.outputs();
  const size_t block = token_block(acts.tokens, columns);
  for (size_t t = 0; t < acts.tokens; t += block) {
    const size_t tokens = std::min(block, acts.tokens - t);
    const QuantizedLinear a{weights.panels.data(),
                            weights.panel_stride,
                            weights.scales.data(),
                            weights.colsum.data(),
                            weights.rows,
                            columns,
                            weights.group_size,
                            weights.groups,
                            weights.bf16_scales,
                            acts.codes(t),
                            acts.stride,
                            &acts.scales[t],
                            &acts.zero_points[t],
                            starts + t * weights.groups,
                            tokens,
                            output.out + t * outputs,
                            output.bias,
                            output.accumulate,
                            weights.gated};
    const size_t floats = (chunk / 8 + tokens) * kPanelRows;
    const size_t scratch_bytes = w4 ? kPanelRows * chunk + floats * sizeof(float) : 0;
    parallel_for(weights.padded_rows() / kPanelRows, panel_grain(tokens, columns), scratch_bytes,
                 [&](size_t begin, size_t end, uint8_t* scratch) {
                   if (w4)
                     k.linear_w4(a, begin, end, scratch);
                   else
                     k.linear_w8(a, begin, end);
                 });
  }
}

namespace {

// Calls f(w, first, count, scratch) for pieces of the rows of float weights, each within one part: w is its row
// `first`. Kernels compute rows in groups of `group`.
template <class F>
void for_pieces(const Weights& weights, size_t group, size_t scratch_bytes, F f) {
  const size_t row_bytes = weights.columns * (weights.kind == Kind::f32 ? 4 : 2);
  parallel_for((weights.rows + group - 1) / group, 1, scratch_bytes, [&](size_t begin, size_t end, uint8_t* scratch) {
    size_t first = begin * group, start = 0;
    const size_t last = std::min(end * group, weights.rows);
    for (const Part& part : weights.parts) {  // the piece of [first, last) in this part
      const size_t stop = std::min(last, start + part.rows);
      if (first < stop) {
        f(static_cast<const uint8_t*>(part.data) + (first - start) * row_bytes, first, stop - first, scratch);
        first = stop;
      }
      start += part.rows;
    }
  });
}

void linear_bf16(const Bf16Kernels& k, const Weights& weights, const float* x, size_t tokens, const Output& output) {
  const size_t columns = weights.columns;
  const size_t padded = (columns + kBf16Step - 1) / kBf16Step * kBf16Step, width = std::min(tokens, k.tile);
  const size_t tiles = (tokens + width - 1) / width;
  const std::unique_ptr<uint16_t[]> rounded(new uint16_t[tiles * width * padded]);
  parallel_for(tiles, grain(width * columns), 0, [&](size_t begin, size_t end, uint8_t*) {
    for (size_t t = begin * width; t < std::min(end * width, tokens); t += width)
      k.round(x + t * columns, std::min(width, tokens - t), width, columns, &rounded[t * padded]);
  });
  const size_t scratch_bytes = kPanelRows * padded * sizeof(uint16_t);
  for_pieces(weights, kPanelRows, scratch_bytes, [&](const void* w, size_t first, size_t count, uint8_t* scratch) {
    k.linear({static_cast<const uint16_t*>(w), count, columns, rounded.get(), tokens, output.out + first, weights.rows,
              output.bias ? output.bias + first : nullptr, output.accumulate},
             reinterpret_cast<uint16_t*>(scratch));
  });
}

}  // namespace

void linear_float(const Weights& weights, const float* x, size_t tokens, const Output& output) {
  if (tokens == 0) return;
  const Kernels& k = kernels();
  if (weights.bf16_products && k.bf16) return linear_bf16(*k.bf16, weights, x, tokens, output);
  const Dtype dtype = dtype_of(weights.kind);
  const size_t scratch_bytes = k.float_scratch_rows * (weights.columns + kLanes) * sizeof(float);
  for_pieces(weights, 8, scratch_bytes, [&](const void* w, size_t first, size_t count, uint8_t* scratch) {
    k.linear_float({w, dtype, count, weights.columns, x, tokens, output.out + first, weights.rows,
                    output.bias ? output.bias + first : nullptr, output.accumulate},
                   reinterpret_cast<float*>(scratch));
  });
}

void low_rank(const LowRank& a, const float* x, size_t tokens, float* out) {
  if (tokens == 0) return;
  const Kernels& k = kernels();
  const size_t inner = a.down.rows;
  std::vector<float> t(tokens * inner);
  linear_float(a.down, x, tokens, {t.data(), nullptr, false});
  for (float& value : t) value *= a.scaling;
  std::vector<size_t> starts;  // index of each part's first panel
  size_t panels = 0;
  for (const LowRankPart& part : a.ups) {
    starts.push_back(panels);
    panels += (part.count + kLanes - 1) / kLanes;
  }
  parallel_for(panels, std::max<size_t>(1, 64 / tokens), 0, [&](size_t begin, size_t end, uint8_t*) {
    for (size_t i = 0; i < a.ups.size(); i++) {
      const LowRankPart& part = a.ups[i];
      const size_t stop = starts[i] + (part.count + kLanes - 1) / kLanes;
      const size_t first = std::max(begin, starts[i]), last = std::min(end, stop);
      if (first >= last) continue;
      const LowRankUp up{part.panels, part.dtype, part.rank,        part.count, t.data() + part.inner,
                         inner,       tokens,     out + part.first, a.outputs};
      k.low_rank_up(up, first - starts[i], last - starts[i]);
    }
  });
}

void embed(const Weights& weights, const int64_t* ids, size_t tokens, float* out) {
  const Kernels& k = kernels();
  const Dtype dtype = dtype_of(weights.kind);
  const size_t columns = weights.columns;
  parallel_for(tokens, grain(columns), 0, [&](size_t begin, size_t end, uint8_t*) {
    for (size_t t = begin; t < end; t++) {
      size_t row = static_cast<size_t>(ids[t]);
      float* to = out + t * columns;
      if (weights.kind == Kind::w8) {
        const uint8_t* from = weights.panels.data() + row / kPanelRows * weights.panel_stride + row % kPanelRows * 4;
        for (size_t i = 0; i < columns; i++)
          to[i] = static_cast<float>(from[i / 4 * 4 * kPanelRows + i % 4] - 128) * weights.scales[row];
        continue;
      }
      size_t part = 0;
      for (; row >= weights.parts[part].rows; part++) row -= weights.parts[part].rows;
      const size_t row_bytes = columns * (dtype == Dtype::f32 ? 4 : 2);
      k.to_f32(static_cast<const uint8_t*>(weights.parts[part].data) + row * row_bytes, dtype, columns, to);
    }
  });
}

size_t round_weights(const void* w, Dtype dtype, size_t rows, const Rounding& rounding, const RoundedRows& out) {
  const Kernels& k = kernels();
  const size_t columns = rounding.columns, groups = columns / rounding.group_size;
  const size_t row_bytes = columns * (dtype == Dtype::f32 ? 4 : 2);
  std::atomic<size_t> bad{rows};
  const size_t scratch_bytes = (columns + 2 * (rounding.group_size + kLanes)) * sizeof(float);
  parallel_for(rows, 1, scratch_bytes, [&](size_t begin, size_t end, uint8_t* scratch) {
    float *row = reinterpret_cast<float*>(scratch), *rest = row + columns;
    for (size_t r = begin; r < end; r++) {
      k.to_f32(static_cast<const uint8_t*>(w) + r * row_bytes, dtype, columns, row);
      const bool finite =
          k.round_row(row, rounding, rest, out.codes + r * columns, out.scales + r * groups, out.squared_error + r);
      if (finite) continue;
      size_t least = bad.load();
      while (r < least && !bad.compare_exchange_weak(least, r)) continue;
    }
  });
  return bad;
}

}  // namespace llamita
