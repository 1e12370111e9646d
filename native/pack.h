// Weights in the order in which kernels read them, and quantized activations.
#pragma once
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "memory.h"

namespace llamita {

constexpr size_t kMaxColumns = 65536;  // |dot| <= 128 * 128 * columns stays far inside int32

enum class Kind { w4, w8, f32, f16, bf16 };

// Contiguous rows in the caller's memory and, for w4, their scales, f32 or bf16 bits.
struct Part {
  const void* data;
  size_t rows;
  const void* scales = nullptr;
  bool bf16_scales = false;
};

struct Weights {
  Kind kind;
  size_t rows, columns, group_size, groups;
  bool bf16_scales = false;
  bool gated = false;  // w4: a panel holds 16 rows of the first half, then the 16 of the second that they gate
  Memory panels;
  size_t panel_stride = 0;
  std::vector<float> scales, colsum;  // (padded rows,); scales: w8 only
  std::vector<Part> parts;            // float: the rows themselves
  bool bf16_products = false;         // bf16: round inputs to bf16, where the processor multiplies it

  size_t outputs() const { return gated ? rows / 2 : rows; }  // per token
  size_t padded_rows() const {
    const size_t step = gated ? kLanes : kPanelRows;
    return (outputs() + step - 1) / step * kPanelRows;
  }
  size_t nbytes() const { return panels.size() + (scales.size() + colsum.size()) * sizeof(float); }
};

// Packs the rows of all parts one after the other. packed: (rows, columns / 8) words of 8 codes + 8, lowest bits first.
// gated: the first half of the rows are gates (silu) of the second half, and only their products come out.
Weights pack_w4(const std::vector<Part>& parts, size_t columns, size_t group_size, bool gated);
Weights pack_w8(const int8_t* codes, size_t rows, size_t columns, const float* scales);
Weights wrap_float(std::vector<Part> parts, size_t columns, Kind kind);

// The int8 codes, scale, zero point and sums of codes of each token, one token a row.
struct Activations {
  Activations(size_t max_tokens, size_t columns);
  int8_t* codes(size_t token) const { return reinterpret_cast<int8_t*>(memory.data()) + token * stride; }
  QuantizedRow row(size_t token);
  // (tokens, groups): -offset times the sum of a group's codes
  const int32_t* starts(size_t group_size, size_t groups, int32_t offset);
  void add_up(size_t token);  // computes the sums from the codes

  size_t max_tokens, columns, stride, sums_stride, tokens = 0;
  Memory memory;
  std::vector<float> scales;
  std::vector<int32_t> zero_points, sums, start;
};

// Packs (rows, columns) codes in [-8, 7] into (rows, columns / 8) words; false if a code is out of range.
bool codes_to_packed(const int8_t* codes, size_t rows, size_t columns, uint32_t* packed);

}  // namespace llamita
