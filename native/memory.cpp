#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <new>

namespace llamita {
namespace {

constexpr size_t kHugePage = size_t{1} << 21;

size_t round_up(size_t value, size_t step) { return (value + step - 1) / step * step; }

// Returns how many of the bytes come in huge pages.
size_t huge_bytes(size_t bytes, Pages pages) {
  return pages == Pages::huge ? (bytes + kHugePage / 2) / kHugePage * kHugePage : 0;
}

#ifdef MADV_HUGEPAGE
void advise(void* data, size_t bytes, bool huge) { madvise(data, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE); }
#else
void advise(void*, size_t, bool) {}
#endif

}  // namespace

Memory::Memory(size_t bytes, Pages pages) : size_(bytes) {
  if (bytes == 0) return;
  const size_t huge = huge_bytes(bytes, pages);
  taken_ = std::max(huge, round_up(bytes, static_cast<size_t>(sysconf(_SC_PAGESIZE))));
  mapped_ = huge > 0 ? taken_ + kHugePage : taken_;
  map_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map_ == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<uint8_t*>(map_);
  if (huge > 0) {
    data_ += (kHugePage - reinterpret_cast<uintptr_t>(data_) % kHugePage) % kHugePage;
    advise(data_, huge, true);
  }
  if (taken_ > huge) advise(data_ + huge, taken_ - huge, false);  // some systems give every mapping huge pages
}

Memory::~Memory() {
  if (map_) munmap(map_, mapped_);
}

}  // namespace llamita
