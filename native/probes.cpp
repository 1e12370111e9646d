// Measures the limits of the hardware by loops that do nothing else: the best of several, over all threads.
#include <algorithm>
#include <chrono>
#include <cstring>

#include "dispatch.h"
#include "ops.h"
#include "threads.h"

namespace llamita {
namespace {

constexpr int kRepeats = 3;

template <class F>
double seconds(const F& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

double read_bandwidth(size_t bytes) {
  constexpr size_t kPiece = size_t{1} << 22;
  const Kernels& k = kernels();
  const size_t pieces = std::max<size_t>(1, bytes / kPiece);
  const Memory memory(pieces * kPiece, Pages::huge);
  parallel_for(pieces, 1, 0, [&](size_t begin, size_t end, uint8_t*) {
    std::memset(memory.data() + begin * kPiece, 1, (end - begin) * kPiece);
  });
  double best = 0;
  for (int i = 0; i < kRepeats * kProbeVariants; i++) {
    const double time = seconds([&] {
      parallel_for(pieces, 1, 0, [&](size_t begin, size_t end, uint8_t*) {
        volatile float sink = k.read_probe(memory.data() + begin * kPiece, (end - begin) * kPiece, i % kProbeVariants);
        static_cast<void>(sink);
      });
    });
    best = std::max(best, static_cast<double>(pieces * kPiece) / time);
  }
  return best / 1e9;
}

double int8_rate(const Kernels& k) {
  constexpr size_t kIterations = 100000;
  const size_t items = threads() * 16;
  double best = 0;
  for (int i = 0; i < kRepeats * kProbeVariants; i++) {
    double each = 0;
    const double time = seconds([&] {
      parallel_for(items, 1, 0, [&](size_t begin, size_t end, uint8_t*) {
        for (size_t item = begin; item < end; item++) {
          const double done = k.int8_probe(kIterations, i % kProbeVariants);
          if (item == 0) each = done;
        }
      });
    });
    best = std::max(best, each * static_cast<double>(items) / time);
  }
  return best / 1e9;
}

}  // namespace llamita
