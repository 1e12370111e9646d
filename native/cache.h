// Keys and values of past tokens, and a step over several sequences.
#pragma once
#include <memory>
#include <vector>

#include "kernels/kernels.h"
#include "memory.h"

namespace llamita {

// Per layer and key/value head: keys in tiles of 16 (tiles, head_dim, 16), so that a vector holds the scores of 16
// keys; values (capacity, value_stride). Memory is taken when tokens are written.
struct KVCache {
  KVCache(size_t layers, size_t kv_heads, size_t head_dim, size_t capacity, bool half, std::vector<float> inv_freq,
          float rope_scaling);
  uint8_t* keys(size_t layer, size_t head) const;
  uint8_t* values(size_t layer, size_t head) const;
  // Positions [0, tokens) of every layer and head; source: another cache of this shape, dtype and rotation
  void copy_prefix(const KVCache& source, size_t tokens);
  size_t element() const { return half ? 2 : 4; }
  size_t nbytes() const { return memory.size(); }

  size_t layers, kv_heads, head_dim, capacity;
  size_t padded_capacity;  // whole blocks of keys
  size_t value_stride;     // head_dim in whole vectors
  bool half;
  std::vector<float> inv_freq;  // (head_dim / 2,)
  float rope_scaling;
  Memory memory;
};

struct Sequence {
  std::shared_ptr<KVCache> cache;
  size_t start, count;  // positions [start, start + count)
  size_t first = 0;     // of its tokens among the batch's
};

// Tokens of several sequences, one after the other.
struct Batch {
  explicit Batch(std::vector<Sequence> sequences);  // of caches of one shape; bounds checked by the bindings

  std::vector<Sequence> sequences;
  size_t tokens = 0;
  std::vector<size_t> owner;    // (tokens,) the sequence of each
  std::vector<float> cos, sin;  // (tokens, head_dim / 2)
};

struct HeadShape {
  size_t heads, kv_heads, head_dim;
  size_t row() const { return (heads + 2 * kv_heads) * head_dim; }
};

void rope_and_cache(const Batch& batch, size_t layer, float* qkv, size_t heads);
void attention(const Batch& batch, size_t layer, const float* qkv, size_t heads, float* out);

}  // namespace llamita
