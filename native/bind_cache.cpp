// KVCache, Batch and the operations over them.
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "arrays.h"
#include "cache.h"

namespace llamita {
namespace {

using namespace nb::literals;

constexpr size_t kMaxHeadDim = 1024;
constexpr size_t kMaxHeads = 65536;
// The most layers * kv_heads * tokens of a cache, so that sizes in bytes stay far below SIZE_MAX.
constexpr size_t kMaxEntries = SIZE_MAX / 2 / (2 * sizeof(float) * kMaxHeadDim);

const std::array<std::string, 3> kDtypes{"f32", "f16", "int8"};  // in the order of CacheDtype

std::string text(size_t number) { return std::to_string(number); }

// Compares quotients, because the product may overflow.
void check_size(size_t layers, size_t kv_heads, size_t capacity) {
  REQUIRE(layers >= 1 && kv_heads >= 1 && capacity >= 1, "KVCache: expected at least one layer, head and token");
  REQUIRE(kv_heads <= kMaxHeads, "kv_heads: expected up to " + text(kMaxHeads) + ", got " + text(kv_heads));
  REQUIRE(layers <= kMaxEntries / kv_heads / (2 * kKeyBlock) && capacity <= kMaxEntries / kv_heads / layers - kKeyBlock,
          "KVCache: expected up to " + text(kMaxEntries) + " layers * kv_heads * capacity, got " + text(layers) +
              " * " + text(kv_heads) + " * " + text(capacity));
}

std::shared_ptr<KVCache> new_cache(size_t layers, size_t kv_heads, size_t head_dim, size_t capacity,
                                   const std::string& dtype, nb::handle inv_freq, float rope_scaling) {
  check_size(layers, kv_heads, capacity);
  REQUIRE(head_dim >= 2 && head_dim % 2 == 0 && head_dim <= kMaxHeadDim,
          "head_dim: expected an even number up to " + text(kMaxHeadDim) + ", got " + text(head_dim));
  const auto found = std::find(kDtypes.begin(), kDtypes.end(), dtype);
  REQUIRE(found != kDtypes.end(), "dtype: expected 'f32', 'f16' or 'int8', got '" + dtype + "'");
  const Array frequencies(inv_freq, "inv_freq", "f", {head_dim / 2});
  std::vector<float> copy(frequencies.as<float>(), frequencies.as<float>() + head_dim / 2);
  return std::make_shared<KVCache>(layers, kv_heads, head_dim, capacity,
                                   static_cast<CacheDtype>(found - kDtypes.begin()), std::move(copy), rope_scaling);
}

bool same_shape(const KVCache& a, const KVCache& b) {
  return a.layers == b.layers && a.kv_heads == b.kv_heads && a.head_dim == b.head_dim;
}

std::string shape_text(const KVCache& cache) {
  return text(cache.layers) + " layers of " + text(cache.kv_heads) + " heads of " + text(cache.head_dim) + " " +
         kDtypes.at(static_cast<size_t>(cache.dtype));
}

void copy_prefix(KVCache& cache, const KVCache& source, size_t tokens) {
  REQUIRE(same_shape(cache, source) && cache.dtype == source.dtype,
          "source: expected " + shape_text(cache) + ", got " + shape_text(source));
  REQUIRE(cache.inv_freq == source.inv_freq && cache.rope_scaling == source.rope_scaling,
          "source: expected the same rotary frequencies, got others; keys are stored rotated");
  const size_t most = std::min(cache.capacity, source.capacity);
  REQUIRE(tokens <= most, "tokens: expected at most " + text(most) + ", got " + text(tokens));
  const nb::gil_scoped_release release;
  if (&cache != &source) cache.copy_prefix(source, tokens);
}

void check_block(const KVCache& cache, size_t index) {
  const size_t blocks = (cache.capacity + kKeyBlock - 1) / kKeyBlock;
  REQUIRE(index < blocks, "index: expected below " + text(blocks) + ", got " + text(index));
}

void read_block(const KVCache& cache, size_t index, nb::handle out) {
  check_block(cache, index);
  const Array bytes(out, "out", "B", {cache.block_stride()}, true);
  const nb::gil_scoped_release release;
  cache.read_block(index, bytes.as<uint8_t>());
}

void write_block(KVCache& cache, size_t index, nb::handle block) {
  check_block(cache, index);
  const Array bytes(block, "block", "B", {cache.block_stride()});
  const nb::gil_scoped_release release;
  cache.write_block(index, bytes.as<uint8_t>());
}

Batch new_batch(const nb::list& list) {
  std::vector<Sequence> sequences;
  for (nb::handle item : list) {
    const nb::tuple triple = nb::cast<nb::tuple>(item);
    REQUIRE(nb::len(triple) == 3,
            "sequences: expected (KVCache, start, count), got a tuple of " + text(nb::len(triple)));
    Sequence s{nb::cast<std::shared_ptr<KVCache>>(triple[0]), nb::cast<size_t>(triple[1]), nb::cast<size_t>(triple[2])};
    REQUIRE(s.start <= s.cache->capacity && s.count <= s.cache->capacity - s.start,
            "sequences: expected at most " + text(s.cache->capacity) + " positions, got " + text(s.start) + " + " +
                text(s.count));
    for (const Sequence& other : sequences) {
      REQUIRE(other.cache != s.cache, "sequences: expected each cache once, got one twice");
      REQUIRE(same_shape(*other.cache, *s.cache), "sequences: expected caches of one shape, got different ones");
    }
    sequences.push_back(std::move(s));
  }
  return Batch(std::move(sequences));
}

// Checks the arguments that both operations share; returns the number of floats in a row of qkv.
size_t check_step(const Batch& batch, size_t layer, size_t heads) {
  if (batch.sequences.empty()) return kAny;
  const KVCache& cache = *batch.sequences.front().cache;
  REQUIRE(layer < cache.layers, "layer: expected below " + text(cache.layers) + ", got " + text(layer));
  REQUIRE(heads >= 1 && heads % cache.kv_heads == 0,
          "heads: expected a multiple of " + text(cache.kv_heads) + " key/value heads, got " + text(heads));
  REQUIRE(heads <= kMaxHeads, "heads: expected up to " + text(kMaxHeads) + ", got " + text(heads));
  return HeadShape{heads, cache.kv_heads, cache.head_dim}.row();
}

void rope_and_cache_array(const Batch& batch, size_t layer, nb::handle qkv, size_t heads, bool rotates) {
  const Array a(qkv, "qkv", "f", {batch.tokens, check_step(batch, layer, heads)}, true);
  const nb::gil_scoped_release release;
  rope_and_cache(batch, layer, a.as<float>(), heads, rotates);
}

void attention_arrays(const Batch& batch, size_t layer, nb::handle qkv, size_t heads, nb::handle out, size_t window) {
  const Array a(qkv, "qkv", "f", {batch.tokens, check_step(batch, layer, heads)});
  const size_t width = batch.sequences.empty() ? kAny : heads * batch.sequences.front().cache->head_dim;
  const Array y(out, "out", "f", {batch.tokens, width}, true);
  const nb::gil_scoped_release release;
  attention(batch, layer, a.as<float>(), heads, window == 0 ? SIZE_MAX : window, y.as<float>());
}

}  // namespace

void bind_cache(nb::module_& m) {
  nb::class_<KVCache>(m, "KVCache")
      .def(nb::new_(&new_cache), "layers"_a, "kv_heads"_a, "head_dim"_a, "capacity"_a, "dtype"_a, "inv_freq"_a,
           "rope_scaling"_a = 1.0f)
      .def("copy_prefix", copy_prefix, "source"_a, "tokens"_a)
      .def("read_block", read_block, "index"_a, "out"_a)
      .def("write_block", write_block, "index"_a, "block"_a)
      .def_prop_ro("block_nbytes", &KVCache::block_stride)
      .def_prop_ro("nbytes", &KVCache::nbytes)
      .def_ro("capacity", &KVCache::capacity);
  nb::class_<Batch>(m, "Batch")
      .def(
          "__init__", [](Batch* self, const nb::list& list) { new (self) Batch(new_batch(list)); }, "sequences"_a)
      .def_ro("tokens", &Batch::tokens);
  m.def("rope_and_cache", rope_and_cache_array, "batch"_a, "layer"_a, "qkv"_a, "heads"_a, "rotates"_a = true);
  m.def("attention", attention_arrays, "batch"_a, "layer"_a, "qkv"_a, "heads"_a, "out"_a, "window"_a = 0);
}

}  // namespace llamita
