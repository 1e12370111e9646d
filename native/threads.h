// A static pool of threads: parallel_for divides a range into chunks for the threads that are awake, with the caller.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace llamita {

// Whatever starts the pool can throw std::invalid_argument (LLAMITA_THREADS or count is not 1 to kMaxThreads) or
// std::runtime_error (the system refuses a thread; the pool stays as it was).
size_t threads();
void set_threads(size_t count);

constexpr size_t kMaxThreads = 1024;

using Task = void (*)(const void* context, size_t begin, size_t end, uint8_t* scratch) noexcept;

// grain: the least items of a chunk. Each thread gets `scratch_bytes` bytes, 64-byte aligned.
// Throws as threads() does, and std::bad_alloc, before any task runs; tasks cannot throw.
void parallel_run(size_t items, size_t grain, size_t scratch_bytes, Task task, const void* context);

// Calls f(begin, end, scratch) for each chunk.
template <class F>
void parallel_for(size_t items, size_t grain, size_t scratch_bytes, const F& f) {
  parallel_run(
      items, grain, scratch_bytes,
      [](const void* context, size_t begin, size_t end, uint8_t* scratch) noexcept {
        (*static_cast<const F*>(context))(begin, end, scratch);
      },
      &f);
}

}  // namespace llamita
