// LowRank, an adapter of one layer or of several fused layers, and its operation.
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "arrays.h"
#include "ops.h"

namespace llamita {
namespace {

using namespace nb::literals;

// Both factors, and the arrays that they point into
struct HeldLowRank {
  LowRank adapter;
  std::vector<Array> held;
};

std::string text(size_t number) { return std::to_string(number); }

Dtype dtype_of(const Array& a) {
  if (a.type() == 'e') return Dtype::f16;
  return a.type() == 'H' ? Dtype::bf16 : Dtype::f32;
}

using Up = std::tuple<nb::handle, size_t, size_t>;  // panels, first output, number of outputs

HeldLowRank new_low_rank(const std::vector<nb::handle>& downs, const std::vector<Up>& ups, size_t outputs,
                         float scaling) {
  REQUIRE(!downs.empty() && downs.size() == ups.size(), "downs, ups: expected as many of one as of the other");
  HeldLowRank made;
  std::vector<Part> parts;
  for (size_t i = 0; i < downs.size(); i++) {
    const std::string types = i ? std::string(1, made.held.front().type()) : "feH";
    const size_t columns = i ? made.held.front().shape(1) : kAny;
    const Array& down =
        made.held.emplace_back(downs[i], "downs", types.c_str(), std::initializer_list<size_t>{kAny, columns});
    parts.push_back({down.as<void>(), down.shape(0)});
  }
  const Dtype dtype = dtype_of(made.held.front());
  const Kind kind = dtype == Dtype::f32 ? Kind::f32 : dtype == Dtype::f16 ? Kind::f16 : Kind::bf16;
  size_t inner = 0;
  for (size_t i = 0; i < ups.size(); i++) {
    const auto& [array, first, count] = ups[i];
    const size_t rank = parts[i].rows, panels = (count + kLanes - 1) / kLanes;
    REQUIRE(rank >= 1, "downs: expected a rank of at least 1, got 0");
    REQUIRE(count >= 1 && first <= outputs && count <= outputs - first,
            "ups: expected outputs within " + text(outputs) + ", got " + text(count) + " from " + text(first));
    const Array& up = made.held.emplace_back(array, "ups", "feH", std::initializer_list<size_t>{panels, rank, kLanes});
    made.adapter.ups.push_back({up.as<void>(), dtype_of(up), rank, count, first, inner});
    inner += rank;
  }
  made.adapter.outputs = outputs;
  made.adapter.scaling = scaling;
  made.adapter.down = wrap_float(std::move(parts), made.held.front().shape(1), kind);
  return made;
}

void low_rank_arrays(const HeldLowRank& held, nb::handle x, nb::handle out) {
  const LowRank& a = held.adapter;
  const Array input(x, "x", "f", {kAny, a.down.columns}), y(out, "out", "f", {input.shape(0), a.outputs}, true);
  const nb::gil_scoped_release release;
  low_rank(a, input.as<float>(), input.shape(0), y.as<float>());
}

}  // namespace

void bind_adapters(nb::module_& m) {
  nb::class_<HeldLowRank>(m, "LowRank")
      .def(nb::new_(&new_low_rank), "downs"_a, "ups"_a, "outputs"_a, "scaling"_a)
      .def_prop_ro("scaling", [](const HeldLowRank& held) { return held.adapter.scaling; });
  m.def("low_rank", low_rank_arrays, "adapter"_a, "x"_a, "out"_a);
}

}  // namespace llamita
