// Memory straight from the operating system: page-aligned, zero, and taken only when it is first touched.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>

namespace llamita {

class Memory {
 public:
  Memory() = default;
  // huge: ask for huge pages, for memory that will be touched whole. Throws std::bad_alloc.
  Memory(size_t bytes, bool huge);
  Memory(Memory&& other) noexcept { swap(other); }
  Memory& operator=(Memory&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Memory();

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void swap(Memory& other) noexcept {
    std::swap(map_, other.map_);
    std::swap(mapped_, other.mapped_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  void* map_ = nullptr;
  size_t mapped_ = 0;
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace llamita
