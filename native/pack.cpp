// The order of quantized weights in memory: panels of 32 rows, 64-byte aligned, the same for every instruction set.
//
// w4, for each group: 32 scales (f32 or bf16), then for each step of 8 inputs 128 bytes, 4 per row. Byte j of a row
// holds code + 8 of input j in the low nibble and of input 4 + j in the high one. Masking a vector, or shifting and
// masking it, then gives four consecutive inputs per row, the operand of a dot-product instruction.
// w8: for each step of 4 inputs 128 bytes, 4 per row, code + 128.
//
// Gated w4 weights: the rows of a panel are 16 gates, then the 16 rows that they gate.
//
// So a panel is one stream of memory. Rows beyond the last have code 0 and scale 0.
#include "pack.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "threads.h"

namespace llamita {
namespace {

constexpr size_t kLineWords = 16;  // words of a row copied at a time: a cache line of the source
constexpr size_t kStepBytes = 4 * kPanelRows;

// Reorders nibbles n0..n7 (lowest first) to n0 n4 n1 n5 n2 n6 n3 n7: byte j becomes n[j] | n[4 + j] << 4.
uint32_t interleave(uint32_t word) {
  uint32_t low = word & 0xffffu, high = word >> 16;
  low = (low | low << 8) & 0x00ff00ffu;
  low = (low | low << 4) & 0x0f0f0f0fu;
  high = (high | high << 8) & 0x00ff00ffu;
  high = (high | high << 4) & 0x0f0f0f0fu;
  return low | high << 4;
}

uint32_t sum_bytes(uint32_t word) {
  word = (word & 0x00ff00ffu) + (word >> 8 & 0x00ff00ffu);
  return (word & 0xffffu) + (word >> 16);
}

uint32_t sum_nibbles(uint32_t word) { return sum_bytes((word & 0x0f0f0f0fu) + (word >> 4 & 0x0f0f0f0fu)); }

// Words of 32 rows, transposed: the words of one step are contiguous, so that the compiler vectorizes loops over them.
using Words = uint32_t[kLineWords][kPanelRows];

// Copies words [first, first + count) of each row. rows[r]: `bytes` bytes or null. Missing words become `fill`.
void gather(const void* const* rows, size_t bytes, size_t first, size_t count, uint32_t fill, Words& words) {
  for (size_t r = 0; r < kPanelRows; r++) {
    uint32_t line[kLineWords];
    std::fill(line, line + count, fill);
    if (rows[r])
      std::memcpy(line, static_cast<const char*>(rows[r]) + 4 * first, std::min(4 * count, bytes - 4 * first));
    for (size_t i = 0; i < count; i++) words[i][r] = line[i];
  }
}

float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

const char* at(const void* data, size_t bytes) { return static_cast<const char*>(data) + bytes; }

bool on_bf16_grid(const Part& part, size_t groups) {
  if (part.bf16_scales) return true;
  uint32_t low = 0;
  for (size_t i = 0; i < part.rows * groups; i++) {
    uint32_t bits;
    std::memcpy(&bits, at(part.scales, 4 * i), sizeof bits);
    low |= bits & 0xffffu;
  }
  return low == 0;
}

// The scales of one packed row. Without data, beyond the last row, they are 0.
struct ScaleRow {
  const void* data = nullptr;
  bool bf16 = false;

  float operator[](size_t g) const {
    if (!data) return 0.0f;
    if (bf16) {
      uint16_t bits;
      std::memcpy(&bits, at(data, 2 * g), sizeof bits);
      return from_bf16(bits);
    }
    float x;
    std::memcpy(&x, at(data, 4 * g), sizeof x);
    return x;
  }
};

// Finds the words and scales of a row; null if it is beyond the last.
void find_row(const std::vector<Part>& parts, size_t row, const Weights& w, const void*& words, ScaleRow& scales) {
  words = nullptr;
  for (const Part& part : parts) {
    if (row < part.rows) {
      words = at(part.data, row * w.columns / 2);
      scales = {at(part.scales, row * w.groups * (part.bf16_scales ? 2 : 4)), part.bf16_scales};
      return;
    }
    row -= part.rows;
  }
}

// Returns the row that is packed as row r of a panel, w.rows if there is none.
size_t row_of(const Weights& w, size_t panel, size_t r) {
  if (!w.gated) return std::min(panel * kPanelRows + r, w.rows);
  const size_t output = panel * kLanes + r % kLanes;
  return output < w.outputs() ? r / kLanes * w.outputs() + output : w.rows;
}

void write_scale(const Weights& w, uint8_t* scales, size_t r, float scale) {
  if (w.bf16_scales)
    std::memcpy(scales + 2 * r, reinterpret_cast<const char*>(&scale) + 2, 2);  // little-endian: the upper half
  else
    std::memcpy(scales + 4 * r, &scale, 4);
}

// sums: (groups, 32) sums of codes + 8, scratch
void pack_panel(const std::vector<Part>& parts, Weights& w, size_t panel, uint32_t* sums) {
  const size_t steps = w.columns / 8, group_steps = w.group_size / 8;
  const size_t scale_bytes = kPanelRows * (w.bf16_scales ? 2 : 4), group_bytes = scale_bytes + group_steps * kStepBytes;
  uint8_t* base = w.panels.data() + panel * w.panel_stride;
  const void* rows[kPanelRows];
  ScaleRow scales[kPanelRows];
  for (size_t r = 0; r < kPanelRows; r++) find_row(parts, row_of(w, panel, r), w, rows[r], scales[r]);
  std::fill(sums, sums + w.groups * kPanelRows, 0u);
  for (size_t first = 0; first < steps; first += kLineWords) {
    Words words;
    const size_t count = std::min(kLineWords, steps - first);
    gather(rows, w.columns / 2, first, count, 0x88888888u, words);  // eight codes 0
    for (size_t i = 0; i < count; i++) {
      const size_t g = (first + i) / group_steps, step = (first + i) % group_steps;
      uint32_t *sum = sums + g * kPanelRows, out[kPanelRows];
      for (size_t r = 0; r < kPanelRows; r++) sum[r] += sum_nibbles(words[i][r]);
      for (size_t r = 0; r < kPanelRows; r++) out[r] = interleave(words[i][r]);
      std::memcpy(base + g * group_bytes + scale_bytes + step * kStepBytes, out, kStepBytes);
    }
  }
  const double offset = 8.0 * static_cast<double>(w.group_size);
  for (size_t r = 0; r < kPanelRows; r++) {
    double colsum = 0.0;
    for (size_t g = 0; g < w.groups; g++) {
      const float scale = scales[r][g];
      write_scale(w, base + g * group_bytes, r, scale);
      colsum += static_cast<double>(scale) * (sums[g * kPanelRows + r] - offset);
    }
    w.colsum[panel * kPanelRows + r] = static_cast<float>(colsum);
  }
}

// columns: without the padding to whole steps that w.columns has
void pack_panel_w8(const int8_t* codes, Weights& w, size_t columns, size_t panel) {
  const size_t steps = w.columns / 4;
  uint8_t* base = w.panels.data() + panel * w.panel_stride;
  const void* rows[kPanelRows];
  uint32_t sums[kPanelRows] = {};
  for (size_t r = 0; r < kPanelRows; r++) {
    const size_t row = panel * kPanelRows + r;
    rows[r] = row < w.rows ? codes + row * columns : nullptr;
  }
  for (size_t first = 0; first < steps; first += kLineWords) {
    Words words;
    const size_t count = std::min(kLineWords, steps - first);
    gather(rows, columns, first, count, 0, words);
    for (size_t i = 0; i < count; i++) {
      for (uint32_t& word : words[i]) word ^= 0x80808080u;  // code + 128
      for (size_t r = 0; r < kPanelRows; r++) sums[r] += sum_bytes(words[i][r]);
      std::memcpy(base + (first + i) * kStepBytes, words[i], kStepBytes);
    }
  }
  const double offset = 128.0 * static_cast<double>(w.columns);
  for (size_t r = 0; r < kPanelRows; r++) {
    const size_t row = panel * kPanelRows + r;
    w.colsum[row] = static_cast<float>(static_cast<double>(w.scales[row]) * (sums[r] - offset));
  }
}

}  // namespace

Weights pack_w4(const std::vector<Part>& parts, size_t columns, size_t group_size, bool gated) {
  Weights w{Kind::w4, 0, columns, group_size, columns / group_size, true, gated, {}, 0, {}, {}, {}};
  for (const Part& part : parts) {
    w.rows += part.rows;
    w.bf16_scales = w.bf16_scales && on_bf16_grid(part, w.groups);  // the same values in half the bytes
  }
  w.panel_stride = w.groups * kPanelRows * (w.bf16_scales ? 2 : 4) + columns / 8 * kStepBytes;
  w.panels = Memory(w.padded_rows() / kPanelRows * w.panel_stride, Pages::huge);
  w.colsum.resize(w.padded_rows());
  parallel_for(w.padded_rows() / kPanelRows, 1, w.groups * kPanelRows * sizeof(uint32_t),
               [&](size_t begin, size_t end, uint8_t* scratch) {
                 for (size_t panel = begin; panel < end; panel++)
                   pack_panel(parts, w, panel, reinterpret_cast<uint32_t*>(scratch));
               });
  return w;
}

Weights pack_w8(const int8_t* codes, size_t rows, size_t columns, const float* scales) {
  const size_t padded = (columns + 3) / 4 * 4;
  Weights w{Kind::w8, rows, padded, padded, 1, false, false, {}, 0, {}, {}, {}};
  w.panel_stride = padded / 4 * kStepBytes;
  w.panels = Memory(w.padded_rows() / kPanelRows * w.panel_stride, Pages::huge);
  w.scales.resize(w.padded_rows());
  w.colsum.resize(w.padded_rows());
  std::copy(scales, scales + rows, w.scales.begin());
  parallel_for(w.padded_rows() / kPanelRows, 1, 0, [&](size_t begin, size_t end, uint8_t*) {
    for (size_t panel = begin; panel < end; panel++) pack_panel_w8(codes, w, columns, panel);
  });
  w.columns = columns;
  return w;
}

Weights wrap_float(std::vector<Part> parts, size_t columns, Kind kind) {
  Weights w{kind, 0, columns, columns, 1, false, false, {}, 0, {}, {}, std::move(parts)};
  for (const Part& part : w.parts) w.rows += part.rows;
  return w;
}

Activations::Activations(size_t max_tokens, size_t columns)
    : max_tokens(max_tokens),
      columns(columns),
      stride((columns + 63) / 64 * 64 + 64),  // one line more: rows a power of two apart would share cache sets
      sums_stride((columns + kSumInputs - 1) / kSumInputs),
      memory(max_tokens * stride, Pages::huge),
      scales(max_tokens),
      zero_points(max_tokens),
      sums(max_tokens * sums_stride) {}

QuantizedRow Activations::row(size_t token) {
  return {codes(token), &scales[token], &zero_points[token], &sums[token * sums_stride]};
}

void Activations::add_up(size_t token) {
  for (size_t i = 0; i < sums_stride; i++) {
    const size_t last = std::min((i + 1) * kSumInputs, columns);
    int32_t sum = 0;
    for (size_t k = i * kSumInputs; k < last; k++) sum += codes(token)[k];
    sums[token * sums_stride + i] = sum;
  }
}

const int32_t* Activations::starts(size_t group_size, size_t groups, int32_t offset) {
  start.resize(tokens * groups);
  const bool whole = group_size % kSumInputs == 0 || groups == 1;  // else add up the codes
  for (size_t t = 0; t < tokens; t++)
    for (size_t g = 0; g < groups; g++) {
      const size_t first = g * group_size, last = std::min(first + group_size, columns);
      int32_t sum = 0;
      if (whole)
        for (size_t i = first / kSumInputs; i * kSumInputs < last; i++) sum += sums[t * sums_stride + i];
      else
        for (size_t k = first; k < last; k++) sum += codes(t)[k];
      start[t * groups + g] = -offset * sum;
    }
  return start.data();
}

bool codes_to_packed(const int8_t* codes, size_t rows, size_t columns, uint32_t* packed) {
  std::atomic<bool> valid{true};
  parallel_for(rows, 16, 0, [&](size_t begin, size_t end, uint8_t*) {
    uint32_t out_of_range = 0;
    for (size_t word = begin * columns / 8; word < end * columns / 8; word++) {
      uint32_t bits = 0;
      for (size_t i = 0; i < 8; i++) {
        const uint32_t code = static_cast<uint32_t>(codes[8 * word + i] + 8);
        out_of_range |= code & ~15u;
        bits |= code << 4 * i;
      }
      packed[word] = bits;
    }
    if (out_of_range) valid = false;
  });
  return valid;
}

}  // namespace llamita
