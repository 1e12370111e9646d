#include "cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "dispatch.h"
#include "threads.h"

namespace llamita {
namespace {

constexpr size_t kItemRows = 64;  // query rows of one head that a thread takes at a time

size_t round_up(size_t value, size_t step) { return (value + step - 1) / step * step; }

HeadShape shape_of(const Batch& batch, size_t heads) {
  const KVCache& cache = *batch.sequences.front().cache;
  return {heads, cache.kv_heads, cache.head_dim};
}

// Pairs (i, i + dim / 2) turned by the angle of i, as Hugging Face lays heads out
void rotate(const float* x, const float* cos, const float* sin, size_t dim, float* out) {
  const size_t half = dim / 2;
  for (size_t i = 0; i < half; i++) {
    const float low = x[i], high = x[i + half];
    out[i] = low * cos[i] - high * sin[i];
    out[i + half] = high * cos[i] + low * sin[i];
  }
}

// Position p of a head: lane p % 16 of its tile
template <class T>
void scatter_key(const T* key, size_t dim, size_t position, T* keys) {
  T* lane = keys + position / kKeyTile * dim * kKeyTile + position % kKeyTile;
  for (size_t d = 0; d < dim; d++) lane[d * kKeyTile] = key[d];
}

void cache_token(const KVCache& cache, size_t layer, size_t position, const float* key_value, const float* cos,
                 const float* sin, float* scratch) {
  const Kernels& k = kernels();
  const size_t dim = cache.head_dim;
  for (size_t h = 0; h < cache.kv_heads; h++) {
    const float* value = key_value + (cache.kv_heads + h) * dim;
    rotate(key_value + h * dim, cos, sin, dim, scratch);
    uint8_t* to = cache.values(layer, h) + position * cache.value_stride * cache.element();
    if (!cache.half) {
      scatter_key(scratch, dim, position, reinterpret_cast<float*>(cache.keys(layer, h)));
      std::memcpy(to, value, dim * sizeof(float));
      continue;
    }
    uint16_t* key = reinterpret_cast<uint16_t*>(scratch + dim);
    k.to_f16(scratch, dim, key);
    scatter_key(key, dim, position, reinterpret_cast<uint16_t*>(cache.keys(layer, h)));
    k.to_f16(value, dim, reinterpret_cast<uint16_t*>(to));
  }
}

struct Item {
  size_t sequence, head, first, last;  // query rows of a key/value head
};

std::vector<Item> attention_items(const Batch& batch, const HeadShape& shape) {
  std::vector<Item> items;
  for (size_t s = 0; s < batch.sequences.size(); s++) {
    const size_t rows = batch.sequences[s].count * (shape.heads / shape.kv_heads);
    for (size_t first = 0; first < rows; first += kItemRows)
      for (size_t head = 0; head < shape.kv_heads; head++)
        items.push_back({s, head, first, std::min(first + kItemRows, rows)});
  }
  return items;
}

}  // namespace

KVCache::KVCache(size_t layers, size_t kv_heads, size_t head_dim, size_t capacity, bool half,
                 std::vector<float> inv_freq, float rope_scaling)
    : layers(layers),
      kv_heads(kv_heads),
      head_dim(head_dim),
      capacity(capacity),
      padded_capacity(round_up(capacity, kKeyBlock)),
      value_stride(round_up(head_dim, kLanes)),
      half(half),
      inv_freq(std::move(inv_freq)),
      rope_scaling(rope_scaling),
      memory(layers * kv_heads * padded_capacity * (head_dim + value_stride) * (half ? 2 : 4), false) {}

uint8_t* KVCache::keys(size_t layer, size_t head) const {
  return memory.data() + (layer * kv_heads + head) * padded_capacity * (head_dim + value_stride) * element();
}

uint8_t* KVCache::values(size_t layer, size_t head) const {
  return keys(layer, head) + padded_capacity * head_dim * element();
}

void KVCache::copy_prefix(const KVCache& source, size_t tokens) {
  const size_t token_bytes = head_dim * element(), tile_bytes = kKeyTile * token_bytes, lane_bytes = element();
  const size_t tiles = tokens / kKeyTile, rest = tokens % kKeyTile;
  parallel_for(layers * kv_heads, 1, 0, [&](size_t begin, size_t end, uint8_t*) {
    for (size_t i = begin; i < end; i++) {
      const size_t layer = i / kv_heads, head = i % kv_heads;
      const uint8_t* from = source.keys(layer, head);
      uint8_t* to = keys(layer, head);
      std::memcpy(to, from, tiles * tile_bytes);
      for (size_t d = 0; d < head_dim && rest > 0; d++) {  // of the last tile the first lanes
        const size_t offset = tiles * tile_bytes + d * kKeyTile * lane_bytes;
        std::memcpy(to + offset, from + offset, rest * lane_bytes);
      }
      std::memcpy(values(layer, head), source.values(layer, head), tokens * value_stride * element());
    }
  });
}

Batch::Batch(std::vector<Sequence> list) : sequences(std::move(list)) {
  for (size_t s = 0; s < sequences.size(); s++) {
    Sequence& sequence = sequences[s];
    const KVCache& cache = *sequence.cache;
    sequence.first = tokens;
    tokens += sequence.count;
    owner.insert(owner.end(), sequence.count, s);
    for (size_t i = 0; i < sequence.count; i++)
      for (const float frequency : cache.inv_freq) {
        const float angle = static_cast<float>(sequence.start + i) * frequency;
        cos.push_back(static_cast<float>(std::cos(static_cast<double>(angle))) * cache.rope_scaling);
        sin.push_back(static_cast<float>(std::sin(static_cast<double>(angle))) * cache.rope_scaling);
      }
  }
}

void rope_and_cache(const Batch& batch, size_t layer, float* qkv, size_t heads) {
  if (batch.tokens == 0) return;
  const HeadShape shape = shape_of(batch, heads);
  const size_t dim = shape.head_dim, grain = std::max<size_t>(1, 16384 / shape.row());
  parallel_for(batch.tokens, grain, 2 * dim * sizeof(float), [&](size_t begin, size_t end, uint8_t* scratch) {
    float* row = reinterpret_cast<float*>(scratch);
    for (size_t t = begin; t < end; t++) {
      const Sequence& sequence = batch.sequences[batch.owner[t]];
      const float *cos = &batch.cos[t * dim / 2], *sin = &batch.sin[t * dim / 2];
      float* q = qkv + t * shape.row();
      for (size_t h = 0; h < heads; h++) rotate(q + h * dim, cos, sin, dim, q + h * dim);
      cache_token(*sequence.cache, layer, sequence.start + t - sequence.first, q + heads * dim, cos, sin, row);
    }
  });
}

void attention(const Batch& batch, size_t layer, const float* qkv, size_t heads, float* out) {
  if (batch.tokens == 0) return;
  const Kernels& k = kernels();
  const HeadShape shape = shape_of(batch, heads);
  const size_t dim = shape.head_dim, group = heads / shape.kv_heads;
  const std::vector<Item> items = attention_items(batch, shape);
  const size_t stride = batch.sequences.front().cache->value_stride;
  const size_t scratch_bytes = k.query_rows * (kKeyBlock + 2 * stride) * sizeof(float);
  parallel_for(items.size(), 1, scratch_bytes, [&](size_t begin, size_t end, uint8_t* scratch) {
    for (size_t i = begin; i < end; i++) {
      const Item& item = items[i];
      const Sequence& sequence = batch.sequences[item.sequence];
      const KVCache& cache = *sequence.cache;
      const size_t query = sequence.first * shape.row() + item.head * group * dim;
      const AttentionHead a{cache.keys(layer, item.head),
                            cache.values(layer, item.head),
                            cache.half,
                            dim,
                            stride,
                            qkv + query,
                            shape.row(),
                            out + (sequence.first * heads + item.head * group) * dim,
                            heads * dim,
                            group,
                            sequence.start,
                            static_cast<float>(1.0 / std::sqrt(static_cast<double>(dim)))};
      k.attention(a, item.first, item.last, reinterpret_cast<float*>(scratch));
    }
  });
}

}  // namespace llamita
