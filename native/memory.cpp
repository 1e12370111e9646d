#include "memory.h"

#include <sys/mman.h>

#include <new>

namespace llamita {
namespace {

constexpr size_t kHugePage = size_t{1} << 21;
constexpr size_t kWorthHuge = size_t{1} << 16;  // bytes from which a huge page is worth the rest of it

#ifdef MADV_HUGEPAGE
void advise_huge(void* data, size_t bytes) { madvise(data, bytes, MADV_HUGEPAGE); }
#else
void advise_huge(void*, size_t) {}
#endif

}  // namespace

Memory::Memory(size_t bytes, bool huge) : size_(bytes) {
  if (bytes == 0) return;
  const bool align = huge && bytes >= kWorthHuge;
  mapped_ = align ? (bytes + kHugePage - 1) / kHugePage * kHugePage + kHugePage : bytes;
  map_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map_ == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<uint8_t*>(map_);
  if (!align) return;
  data_ += (kHugePage - reinterpret_cast<uintptr_t>(data_) % kHugePage) % kHugePage;
  advise_huge(data_, (bytes + kHugePage - 1) / kHugePage * kHugePage);
}

Memory::~Memory() {
  if (map_) munmap(map_, mapped_);
}

}  // namespace llamita
