#include "cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "dispatch.h"
#include "threads.h"

namespace llamita {
namespace {

constexpr double kLog2e = 1.4426950408889634;
// Caches get huge pages from this size of a block of all layers on, because a sequence touches at least one block.
constexpr size_t kWorthHuge = size_t{1} << 21;
constexpr size_t kItemTiles = 32;  // tiles of query rows of one head that a thread takes at a time

size_t round_up(size_t value, size_t step) { return (value + step - 1) / step * step; }

HeadShape shape_of(const Batch& batch, size_t heads) {
  const KVCache& cache = *batch.sequences.front().cache;
  return {heads, cache.kv_heads, cache.head_dim};
}

// Of dim / 2 angles; null: a layer without rotary embedding
struct Rotation {
  const float *cos, *sin;
};

// Rotates pairs (i, i + dim / 2) by angle i, in the head layout of Hugging Face. x and out may be the same.
void rotate(const float* x, const Rotation& rotation, size_t dim, float* out) {
  const auto [cos, sin] = rotation;
  const size_t half = dim / 2;
  if (!cos) {
    std::memmove(out, x, dim * sizeof(float));
    return;
  }
  for (size_t i = 0; i < half; i++) {
    const float low = x[i], high = x[i + half];
    out[i] = low * cos[i] - high * sin[i];
    out[i + half] = high * cos[i] + low * sin[i];
  }
}

// Writes a key of a block: position p is lane p % 16 of its tile.
template <class T>
void scatter_key(const T* key, size_t dim, size_t position, uint8_t* keys) {
  T* lane = reinterpret_cast<T*>(keys) + position / kKeyTile * dim * kKeyTile + position % kKeyTile;
  for (size_t d = 0; d < dim; d++) lane[d * kKeyTile] = key[d];
}

// Quantizes a key and a value. scratch: room for a head in int8 and for the sums of `quantize`.
void cache_codes(const KVCache& cache, const float* key, const float* value, size_t position, uint8_t* block,
                 uint8_t* scratch) {
  const Kernels& k = kernels();
  const size_t dim = cache.head_dim;
  Coding& coding = *reinterpret_cast<Coding*>(block);
  int8_t* codes = reinterpret_cast<int8_t*>(scratch);
  int32_t* sums = reinterpret_cast<int32_t*>(scratch + cache.value_stride);
  int32_t zero;
  k.quantize(key, dim, {codes, &coding.key_scales[position], &zero, sums});
  coding.key_zeros[position] = static_cast<int8_t>(zero);
  uint8_t* tile = cache.keys(block) + position / kKeyTile * cache.key_dims * kKeyTile + position % kKeyTile * kQuad;
  for (size_t d = 0; d < dim; d += kQuad, tile += kKeyTile * kQuad)  // code + 128: unsigned, for products with queries
    for (size_t i = 0; i < kQuad && d + i < dim; i++) tile[i] = static_cast<uint8_t>(codes[d + i]) ^ 0x80u;
  k.quantize(value, dim, {codes, &coding.value_scales[position], &zero, sums});
  coding.value_zeros[position] = static_cast<int8_t>(zero);
  uint8_t* quad = cache.values(block) + position / kQuad * cache.value_stride * kQuad + position % kQuad;
  for (size_t d = 0; d < dim; d++) quad[d * kQuad] = static_cast<uint8_t>(codes[d]);
}

// Writes one head at one position of a block. scratch: as for cache_codes.
void cache_head(const KVCache& cache, const float* key, const float* value, size_t position, uint8_t* block,
                uint8_t* scratch) {
  if (cache.dtype == CacheDtype::i8) return cache_codes(cache, key, value, position, block, scratch);
  const Kernels& k = kernels();
  const size_t dim = cache.head_dim;
  uint8_t* keys = cache.keys(block);
  uint8_t* values = cache.values(block) + position * cache.value_stride * cache.element();
  if (cache.dtype == CacheDtype::f32) {
    scatter_key(key, dim, position, keys);
    std::memcpy(values, value, dim * sizeof(float));
  } else {
    uint16_t* half = reinterpret_cast<uint16_t*>(scratch);
    k.to_f16(key, dim, half);
    scatter_key(half, dim, position, keys);
    k.to_f16(value, dim, reinterpret_cast<uint16_t*>(values));
  }
}

// R3, the run-time rotation of queries and keys. An orthogonal transform of both does not change their products. It
// spreads the large values of a few dimensions over all, which suits int8 codes with one scale.
Hadamard head_transform(size_t dim) {
  return {dim, 1, nullptr, static_cast<float>(1 / std::sqrt(static_cast<double>(dim)))};
}

void cache_token(const KVCache& cache, size_t layer, size_t position, const float* key_value, const Rotation& rotation,
                 float* scratch) {
  const size_t dim = cache.head_dim;
  const Hadamard transform = head_transform(dim);
  for (size_t h = 0; h < cache.kv_heads; h++) {
    rotate(key_value + h * dim, rotation, dim, scratch);
    if (cache.is_transformed()) kernels().hadamard(scratch, transform, nullptr, scratch);
    cache_head(cache, scratch, key_value + (cache.kv_heads + h) * dim, position % kKeyBlock,
               cache.block(position / kKeyBlock, layer, h), reinterpret_cast<uint8_t*>(scratch + cache.value_stride));
  }
}

struct Item {
  size_t sequence, head, first, last;  // query rows [first, last) of a key/value head
};

// The longest items come first, so that the last ones to end are short.
std::vector<Item> attention_items(const Batch& batch, const HeadShape& shape, size_t most) {
  std::vector<Item> items;
  for (size_t s = 0; s < batch.sequences.size(); s++) {
    const size_t rows = batch.sequences[s].count * (shape.heads / shape.kv_heads);
    for (size_t last = rows; last > 0; last -= std::min(last, most))
      for (size_t head = 0; head < shape.kv_heads; head++)
        items.push_back({s, head, last - std::min(last, most), last});
  }
  return items;
}

size_t attention_scratch(const KVCache& cache, const Kernels& k, size_t rows) {
  const size_t wide = (kKeyBlock + rows) * (cache.head_dim + cache.value_stride);
  return (wide + rows * (2 * kLanes + 2) + k.query_rows * kKeyBlock) * sizeof(float);
}

// Copies `count` positions that are stored in tiles of `width` positions, each of `lines` lines of so many bytes.
void copy_part(const uint8_t* from, uint8_t* to, size_t line_bytes, size_t lines, size_t count, size_t width) {
  const size_t whole = count / width * lines * line_bytes, part = count % width * line_bytes / width;
  std::memcpy(to, from, whole);
  for (size_t i = 0; i < lines && part > 0; i++)  // the first positions of the last tile
    std::memcpy(to + whole + i * line_bytes, from + whole + i * line_bytes, part);
}

}  // namespace

KVCache::KVCache(size_t layers, size_t kv_heads, size_t head_dim, size_t capacity, CacheDtype dtype,
                 std::vector<float> inv_freq, float rope_scaling)
    : layers(layers),
      kv_heads(kv_heads),
      head_dim(head_dim),
      capacity(capacity),
      key_dims(dtype == CacheDtype::i8 ? round_up(head_dim, kQuad) : head_dim),
      value_stride(round_up(head_dim, kLanes)),
      dtype(dtype),
      block_bytes(kKeyBlock * (key_dims + value_stride) * element() + (dtype == CacheDtype::i8 ? sizeof(Coding) : 0)),
      inv_freq(std::move(inv_freq)),
      rope_scaling(rope_scaling),
      memory(round_up(capacity, kKeyBlock) / kKeyBlock * block_stride(),
             block_stride() >= kWorthHuge ? Pages::huge : Pages::small) {}

uint8_t* KVCache::block(size_t index, size_t layer, size_t head) const {
  return memory.data() + index * block_stride() + layer * layer_stride() + head * block_bytes;
}

void KVCache::read_block(size_t index, uint8_t* out) const { std::memcpy(out, block(index, 0, 0), block_stride()); }

void KVCache::write_block(size_t index, const uint8_t* bytes) {
  std::memcpy(block(index, 0, 0), bytes, block_stride());
}

// Copies whole blocks of all layers and heads at once, then each head's positions of the last block.
void KVCache::copy_prefix(const KVCache& source, size_t tokens) {
  const size_t whole = tokens / kKeyBlock, rest = tokens % kKeyBlock;
  parallel_for(whole, 1, 0, [&](size_t begin, size_t end, uint8_t*) {
    std::memcpy(block(begin, 0, 0), source.block(begin, 0, 0), (end - begin) * block_stride());
  });
  for (size_t i = 0; i < layers * kv_heads && rest > 0; i++)
    copy_positions(source, source.block(whole, 0, i), block(whole, 0, i), rest);
}

void KVCache::copy_positions(const KVCache& source, uint8_t* from, uint8_t* to, size_t count) {
  const size_t side = dtype == CacheDtype::i8 ? kQuad : 1;  // elements of a row that lie side by side
  if (dtype == CacheDtype::i8) {
    const Coding& c = *reinterpret_cast<Coding*>(from);
    Coding& mine = *reinterpret_cast<Coding*>(to);
    std::copy_n(c.key_scales, count, mine.key_scales);
    std::copy_n(c.value_scales, count, mine.value_scales);
    std::copy_n(c.key_zeros, count, mine.key_zeros);
    std::copy_n(c.value_zeros, count, mine.value_zeros);
  }
  copy_part(source.keys(from), keys(to), kKeyTile * side * element(), key_dims / side, count, kKeyTile);
  copy_part(source.values(from), values(to), side * element(), value_stride, count, side);
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

void rope_and_cache(const Batch& batch, size_t layer, float* qkv, size_t heads, bool rotates) {
  if (batch.tokens == 0) return;
  const HeadShape shape = shape_of(batch, heads);
  const size_t dim = shape.head_dim, grain = std::max<size_t>(1, 16384 / shape.row());
  const size_t scratch_bytes = 4 * round_up(dim, kLanes) * sizeof(float);
  const Hadamard transform = head_transform(dim);
  const Kernels& k = kernels();
  parallel_for(batch.tokens, grain, scratch_bytes, [&](size_t begin, size_t end, uint8_t* scratch) {
    float* row = reinterpret_cast<float*>(scratch);
    for (size_t t = begin; t < end; t++) {
      const Sequence& sequence = batch.sequences[batch.owner[t]];
      const Rotation rotation =
          rotates ? Rotation{&batch.cos[t * dim / 2], &batch.sin[t * dim / 2]} : Rotation{nullptr, nullptr};
      float* q = qkv + t * shape.row();
      for (size_t h = 0; h < heads; h++) {
        rotate(q + h * dim, rotation, dim, q + h * dim);
        if (sequence.cache->is_transformed()) k.hadamard(q + h * dim, transform, nullptr, q + h * dim);
      }
      cache_token(*sequence.cache, layer, sequence.start + t - sequence.first, q + heads * dim, rotation, row);
    }
  });
}

void attention(const Batch& batch, size_t layer, const float* qkv, size_t heads, size_t window, float* out) {
  if (batch.tokens == 0) return;
  const Kernels& k = kernels();
  const HeadShape shape = shape_of(batch, heads);
  const size_t dim = shape.head_dim, group = heads / shape.kv_heads, rows = kItemTiles * k.query_rows;
  const std::vector<Item> items = attention_items(batch, shape, rows);
  const size_t scratch_bytes = attention_scratch(*batch.sequences.front().cache, k, rows);
  parallel_for(items.size(), 1, scratch_bytes, [&](size_t begin, size_t end, uint8_t* scratch) {
    for (size_t i = begin; i < end; i++) {
      const Item& item = items[i];
      const Sequence& sequence = batch.sequences[item.sequence];
      const KVCache& cache = *sequence.cache;
      const size_t query = sequence.first * shape.row() + item.head * group * dim;
      const AttentionHead a{cache.block(0, layer, item.head),
                            cache.block_stride(),
                            cache.dtype,
                            dim,
                            cache.value_stride,
                            qkv + query,
                            shape.row(),
                            out + (sequence.first * heads + item.head * group) * dim,
                            heads * dim,
                            group,
                            sequence.start,
                            window,
                            static_cast<float>(kLog2e / std::sqrt(static_cast<double>(dim)))};
      k.attention(a, item.first, item.last, reinterpret_cast<float*>(scratch));
    }
  });
}

}  // namespace llamita
