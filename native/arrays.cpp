#include "arrays.h"

#include <cstring>

namespace llamita {
namespace {

const char* type_name(char type) {
  switch (type) {
    case 'f':
      return "float32";
    case 'd':
      return "float64";
    case 'e':
      return "float16";
    case 'H':
      return "uint16";
    case 'b':
      return "int8";
    case 'B':
      return "uint8";
    case 'i':
      return "int32";
    case 'l':
    case 'q':
      return "int64";
    default:
      return "another type";
  }
}

std::string shape_text(const size_t* shape, size_t axes) {
  std::string text = "(";
  for (size_t i = 0; i < axes; i++) {
    if (i > 0) text += ", ";
    text += shape[i] == kAny ? "any" : std::to_string(shape[i]);
  }
  return text + (axes == 1 ? ",)" : ")");
}

std::string expected(const char* types, std::initializer_list<size_t> shape) {
  std::string text;
  for (const char* t = types; *t; t++) {
    if (t != types) text += '|';
    text += type_name(*t);
  }
  return text + " " + shape_text(shape.begin(), shape.size());
}

std::string found(const Py_buffer& view) {
  const size_t shape[] = {view.ndim > 0 ? static_cast<size_t>(view.shape[0]) : 0,
                          view.ndim > 1 ? static_cast<size_t>(view.shape[1]) : 0};
  const std::string type = std::strlen(view.format) == 1 ? type_name(view.format[0]) : view.format;
  if (view.ndim < 1 || view.ndim > 2) return type + " with " + std::to_string(view.ndim) + " axes";
  return type + " " + shape_text(shape, static_cast<size_t>(view.ndim));
}

}  // namespace

Array::Array(nb::handle object, const char* name, const char* types, std::initializer_list<size_t> shape,
             bool writable) {
  auto* raw = new Py_buffer;
  const int flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
  if (PyObject_GetBuffer(object.ptr(), raw, flags) != 0) {
    PyErr_Clear();
    delete raw;
    refuse(std::string(name) + ": expected a C-contiguous" + (writable ? ", writable" : "") + " array " +
           expected(types, shape) + ", got something else; try np.ascontiguousarray");
  }
  view_.reset(raw);
  if (raw->format[0] == 'q') raw->format = const_cast<char*>("l");  // both are 64 bits on our platforms
  bool fits = std::strlen(raw->format) == 1 && std::strchr(types, raw->format[0]) != nullptr &&
              static_cast<size_t>(raw->ndim) == shape.size();
  for (size_t i = 0; fits && i < shape.size(); i++) {
    const size_t length = shape.begin()[i];
    fits = length == kAny || length == static_cast<size_t>(raw->shape[i]);
  }
  REQUIRE(fits, std::string(name) + ": expected " + expected(types, shape) + ", got " + found(*raw));
}

}  // namespace llamita
