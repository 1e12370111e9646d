// Repeats a product whose outcome is known, on many threads. Some virtual machines lose AMX's tiles when a thread is
// interrupted: they come back as zeros, and nothing else tells.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "memory.h"

namespace llamita {
namespace {

constexpr size_t kRows = kPanelRows, kTokens = 32;
constexpr size_t kColumns = 4096;  // sums are in tiles for some 4 microseconds
constexpr size_t kNarrow = 32;     // more columns make the last tiles narrow

// One panel of int8 weights and a block of tokens, pseudo-random.
class Product {
 public:
  explicit Product(size_t columns)
      : columns_(columns), panel_(kRows * columns, Pages::small), codes_(kTokens * columns, Pages::small) {
    fill(panel_);
    fill(codes_);
    const int8_t* x = codes();
    for (size_t i = 0; i < codes_.size(); i++) starts_[i / columns] -= 128 * x[i];
  }

  std::vector<float> compute(const Kernels& k) const {
    std::vector<float> out(kTokens * kRows);
    QuantizedLinear a{};
    a.panels = panel_.data();
    a.panel_stride = panel_.size();
    a.scales = a.colsum = a.x_scale = ones_.data();
    a.rows = kRows;
    a.columns = a.group_size = a.x_stride = columns_;
    a.groups = 1;
    a.x = codes();
    a.x_zero = zeros_.data();
    a.x_start = starts_.data();
    a.tokens = kTokens;
    a.out = out.data();
    k.linear_w8(a, 0, 1);
    return out;
  }

 private:
  const int8_t* codes() const { return reinterpret_cast<const int8_t*>(codes_.data()); }

  static void fill(Memory& memory) {
    uint32_t state = 1;
    for (size_t i = 0; i < memory.size(); i++) {
      state = state * 1664525u + 1013904223u;  // Numerical Recipes' generator; its high bits are the random ones
      memory.data()[i] = static_cast<uint8_t>(state >> 24);
    }
  }

  size_t columns_;
  Memory panel_, codes_;
  std::vector<float> ones_ = std::vector<float>(std::max(kRows, kTokens), 1.0f);
  std::vector<int32_t> zeros_ = std::vector<int32_t>(kTokens), starts_ = zeros_;
};

}  // namespace

Checked check_products(const Kernels& k, double seconds, size_t threads) {
  const Product products[] = {Product(kColumns), Product(kColumns + kNarrow)};
  const std::vector<float> expected[] = {products[0].compute(scalar_kernels), products[1].compute(scalar_kernels)};
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  std::vector<Checked> found(std::max<size_t>(threads, 1));
  const auto repeat = [&](Checked& mine) {
    do {
      const std::vector<float>& right = expected[mine.rounds % 2];
      const std::vector<float> got = products[mine.rounds % 2].compute(k);
      mine.wrong += std::memcmp(got.data(), right.data(), right.size() * sizeof(float)) != 0;
      mine.rounds++;
    } while (mine.rounds < 2 || std::chrono::steady_clock::now() < end);
  };
  std::vector<std::thread> others;
  try {
    for (size_t i = 1; i < found.size(); i++) others.emplace_back(repeat, std::ref(found[i]));
  } catch (const std::system_error&) {  // fewer threads check, too
  }
  repeat(found[0]);
  for (std::thread& thread : others) thread.join();
  Checked all;
  for (const Checked& mine : found) {
    all.rounds += mine.rounds;
    all.wrong += mine.wrong;
  }
  return all;
}

}  // namespace llamita
