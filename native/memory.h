// Memory from the operating system: page-aligned, zero, and taken page by page when first touched.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>

namespace llamita {

// Huge pages (2 MB) save walks through page tables, but touching one byte takes the whole page. So the rest at the end
// gets a huge page only if it fills half of it, else small pages.
enum class Pages { small, huge };

class Memory {
 public:
  Memory() = default;
  // Throws std::bad_alloc.
  Memory(size_t bytes, Pages pages);
  Memory(Memory&& other) noexcept { swap(other); }
  Memory& operator=(Memory&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Memory();

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  size_t taken() const { return taken_; }  // bytes in whole pages, once all of them are touched

 private:
  void swap(Memory& other) noexcept {
    std::swap(map_, other.map_);
    std::swap(mapped_, other.mapped_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(taken_, other.taken_);
  }
  void* map_ = nullptr;
  size_t mapped_ = 0;
  uint8_t* data_ = nullptr;
  size_t size_ = 0, taken_ = 0;
};

}  // namespace llamita
