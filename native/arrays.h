// Views of NumPy arrays by the buffer protocol. Every dtype and shape is checked, with the argument's name in errors.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>

namespace llamita {

namespace nb = nanobind;

constexpr size_t kAny = SIZE_MAX;  // any length is allowed

[[noreturn]] inline void refuse(const std::string& what) { throw nb::value_error(what.c_str()); }

// A macro, so that the text is made only on failure: making it took longer than most operations on one token.
#define REQUIRE(condition, what)    \
  do {                              \
    if (!(condition)) refuse(what); \
  } while (false)

// A view of an array's memory, which keeps the array alive. Make and destroy it with the GIL held.
class Array {
 public:
  // types: the dtypes allowed, as buffer formats: f float32, e float16, H uint16, b int8, i int32, l int64
  Array(nb::handle object, const char* name, const char* types, std::initializer_list<size_t> shape,
        bool writable = false);
  Array(Array&& other) noexcept : view_(std::move(other.view_)) {}

  size_t shape(size_t axis) const { return static_cast<size_t>(view_->shape[axis]); }
  char type() const { return view_->format[0]; }
  template <class T>
  T* as() const {
    return static_cast<T*>(view_->buf);
  }

 private:
  struct Release {
    void operator()(Py_buffer* view) const {
      PyBuffer_Release(view);
      delete view;
    }
  };
  std::unique_ptr<Py_buffer, Release> view_;
};

// A new NumPy array that owns its (uninitialized) memory.
template <class T>
struct NewArray {
  explicit NewArray(std::initializer_list<size_t> shape) {
    size_t size = 1;
    for (const size_t length : shape) size *= length;
    data = new T[size];
    array = nb::ndarray<nb::numpy, T>(data, shape,
                                      nb::capsule(data, [](void* p) noexcept { delete[] static_cast<T*>(p); }));
  }
  T* data;
  nb::ndarray<nb::numpy, T> array;
};

void bind_cache(nb::module_& m);
void bind_adapters(nb::module_& m);

}  // namespace llamita
