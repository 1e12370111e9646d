// Keys and values of past tokens, and a step over several sequences.
#pragma once
#include <bit>
#include <memory>
#include <vector>

#include "kernels/kernels.h"
#include "memory.h"

namespace llamita {

// Blocks of kKeyBlock positions (kernels.h) in the order (blocks, layers, kv_heads). So the data of the first tokens is
// contiguous, and even huge pages are taken only as tokens are written. Keys are in tiles of 16 positions, so that a
// vector holds the scores of 16 keys. Of int8, four dimensions of a key and four positions of values lie side by side.
struct KVCache {
  KVCache(size_t layers, size_t kv_heads, size_t head_dim, size_t capacity, CacheDtype dtype,
          std::vector<float> inv_freq, float rope_scaling);
  uint8_t* block(size_t index, size_t layer, size_t head) const;
  uint8_t* keys(uint8_t* block) const { return block + (dtype == CacheDtype::i8 ? sizeof(Coding) : 0); }
  uint8_t* values(uint8_t* block) const { return keys(block) + kKeyBlock * key_dims * element(); }
  size_t layer_stride() const { return kv_heads * block_bytes; }
  size_t block_stride() const { return layers * layer_stride(); }
  // Copies positions [0, tokens) of every layer and head. source: another cache of this shape, dtype and rotation.
  void copy_prefix(const KVCache& source, size_t tokens);
  bool is_transformed() const { return dtype == CacheDtype::i8 && std::has_single_bit(head_dim); }  // R3
  size_t element() const { return dtype == CacheDtype::i8 ? 1 : dtype == CacheDtype::f16 ? 2 : 4; }
  size_t nbytes() const { return memory.taken(); }
  // The bytes of a block of all layers and heads, as they are; index: below capacity / kKeyBlock, rounded up.
  void read_block(size_t index, uint8_t* out) const;
  void write_block(size_t index, const uint8_t* bytes);

  void copy_positions(const KVCache& source, uint8_t* from, uint8_t* to, size_t count);

  size_t layers, kv_heads, head_dim, capacity;
  size_t key_dims;      // head_dim; for int8 rounded up to whole quads
  size_t value_stride;  // head_dim rounded up to whole vectors
  CacheDtype dtype;
  size_t block_bytes;
  std::vector<float> inv_freq;  // (head_dim / 2,)
  float rope_scaling;
  Memory memory;
};

struct Sequence {
  std::shared_ptr<KVCache> cache;
  size_t start, count;  // positions [start, start + count)
  size_t first = 0;     // index of its first token in the batch
};

// Tokens of several sequences, one after the other.
struct Batch {
  explicit Batch(std::vector<Sequence> sequences);  // with caches of one shape; the bindings check bounds

  std::vector<Sequence> sequences;
  size_t tokens = 0;
  std::vector<size_t> owner;    // (tokens,) the sequence of each
  std::vector<float> cos, sin;  // (tokens, head_dim / 2)
};

struct HeadShape {
  size_t heads, kv_heads, head_dim;
  size_t row() const { return (heads + 2 * kv_heads) * head_dim; }
};

void rope_and_cache(const Batch& batch, size_t layer, float* qkv, size_t heads, bool rotates);
// window: the most keys that a query sees, at least 1
void attention(const Batch& batch, size_t layer, const float* qkv, size_t heads, size_t window, float* out);

}  // namespace llamita
