// The Python module: checks all arguments, releases the GIL, calls the operations.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <memory>
#include <optional>
#include <string_view>

#include "arrays.h"
#include "dispatch.h"
#include "ops.h"
#include "threads.h"

namespace llamita {
namespace {

using namespace nb::literals;

// Weights, and the arrays that they point into
struct HeldWeights {
  Weights weights;
  std::vector<Array> held;
};

const char* kind_name(Kind kind) {
  constexpr const char* kNames[] = {"w4", "w8", "f32", "f16", "bf16"};
  return kNames[static_cast<int>(kind)];
}

Dtype dtype_of(const Array& a) {
  if (a.type() == 'e') return Dtype::f16;
  return a.type() == 'H' ? Dtype::bf16 : Dtype::f32;
}

constexpr std::string_view kRules[] = {"torchao", "torchao_bf16", "search"};  // in the order of Rule

std::string text(size_t number) { return std::to_string(number); }

void check_columns(size_t columns) {
  REQUIRE(columns >= 1 && columns <= kMaxColumns,
          "columns: expected 1 to " + text(kMaxColumns) + ", got " + text(columns));
}

void check_tokens(size_t tokens, const Activations& acts) {
  REQUIRE(tokens <= acts.max_tokens, "x: expected at most " + text(acts.max_tokens) + " tokens, got " + text(tokens));
}

// ---- weights -----------------------------------------------------------------------------------------------------
HeldWeights pack_w4_arrays(const nb::list& packed, const nb::list& scales, size_t group_size, bool gated) {
  REQUIRE(nb::len(packed) > 0 && nb::len(packed) == nb::len(scales),
          "packed: expected as many arrays as scales, at least one");
  REQUIRE(group_size >= 8 && group_size % 8 == 0, "group_size: expected a multiple of 8, got " + text(group_size));
  const size_t words = Array(packed[0], "packed", "i", {kAny, kAny}).shape(1), columns = 8 * words;
  check_columns(columns);
  REQUIRE(columns % group_size == 0,
          "group_size: expected a divisor of " + text(columns) + " columns, got " + text(group_size));
  std::vector<Array> held;
  std::vector<Part> parts;
  for (size_t i = 0; i < nb::len(packed); i++) {
    const Array& codes = held.emplace_back(packed[i], "packed", "i", std::initializer_list<size_t>{kAny, words});
    const size_t rows = codes.shape(0);
    const void* data = codes.as<void>();
    const Array& s =
        held.emplace_back(scales[i], "scales", "fH", std::initializer_list<size_t>{rows, columns / group_size});
    parts.push_back({data, rows, s.as<void>(), s.type() == 'H'});
  }
  REQUIRE(!gated || (parts.size() == 2 && parts[0].rows == parts[1].rows),
          "packed: expected gates and as many rows that they gate, got other matrices");
  const nb::gil_scoped_release release;
  return {pack_w4(parts, columns, group_size, gated), {}};
}

HeldWeights pack_w8_arrays(nb::handle codes, nb::handle scales) {
  const Array c(codes, "codes", "b", {kAny, kAny}), s(scales, "scales", "fH", {c.shape(0)});
  check_columns(c.shape(1));
  const nb::gil_scoped_release release;
  std::vector<float> wide(c.shape(0));
  kernels().to_f32(s.as<void>(), dtype_of(s), wide.size(), wide.data());
  return {pack_w8(c.as<int8_t>(), c.shape(0), c.shape(1), wide.data()), {}};
}

HeldWeights wrap_float_arrays(const nb::list& arrays, bool bf16_products) {
  REQUIRE(nb::len(arrays) > 0, "arrays: expected at least one");
  std::vector<Array> held;
  std::vector<Part> parts;
  for (nb::handle array : arrays) {
    const size_t columns = held.empty() ? kAny : held.front().shape(1);
    const std::string types = held.empty() ? "feH" : std::string(1, held.front().type());
    const Array& a = held.emplace_back(array, "arrays", types.c_str(), std::initializer_list<size_t>{kAny, columns});
    parts.push_back({a.as<void>(), a.shape(0)});
  }
  const size_t columns = held.front().shape(1);
  check_columns(columns);
  const Dtype dtype = dtype_of(held.front());
  const Kind kind = dtype == Dtype::f32 ? Kind::f32 : dtype == Dtype::f16 ? Kind::f16 : Kind::bf16;
  HeldWeights wrapped{wrap_float(std::move(parts), columns, kind), std::move(held)};
  wrapped.weights.bf16_products = bf16_products && kind == Kind::bf16;
  return wrapped;
}

nb::tuple round_weights_arrays(nb::handle w, int bits, size_t group_size, const std::string& rule,
                               nb::handle importance) {
  const Array a(w, "w", "feH", {kAny, kAny});
  const size_t rows = a.shape(0), columns = a.shape(1);
  REQUIRE(bits == 4 || bits == 8, "bits: expected 4 or 8, got " + std::to_string(bits));
  const auto known = std::find(std::begin(kRules), std::end(kRules), rule);
  REQUIRE(known != std::end(kRules), "rule: expected 'torchao', 'torchao_bf16' or 'search', got '" + rule + "'");
  REQUIRE(columns >= 1 && group_size >= 1 && columns % group_size == 0,
          "group_size: expected a divisor of " + text(columns) + " columns, got " + text(group_size));
  std::optional<Array> weights;
  if (!importance.is_none()) weights.emplace(importance, "importance", "f", std::initializer_list<size_t>{columns});
  NewArray<int8_t> codes({rows, columns});
  NewArray<float> scales({rows, columns / group_size});
  NewArray<double> errors({rows});
  const Rounding rounding{weights ? weights->as<float>() : nullptr, columns, group_size, bits == 4 ? 7 : 127,
                          static_cast<Rule>(known - std::begin(kRules))};
  size_t bad;
  {
    const nb::gil_scoped_release release;
    bad = round_weights(a.as<void>(), dtype_of(a), rows, rounding, {codes.data, scales.data, errors.data});
  }
  if (bad < rows) {
    std::vector<float> row(columns);
    const size_t bytes = columns * (dtype_of(a) == Dtype::f32 ? 4 : 2);
    kernels().to_f32(a.as<uint8_t>() + bad * bytes, dtype_of(a), columns, row.data());
    size_t column = 0;
    while (std::isfinite(row[column])) column++;
    refuse("w: expected finite weights, got " + std::to_string(row[column]) + " in row " + text(bad) + ", column " +
           text(column));
  }
  return nb::make_tuple(codes.array, scales.array, errors.array);
}

nb::object codes_to_packed_array(nb::handle codes) {
  const Array c(codes, "codes", "b", {kAny, kAny});
  REQUIRE(c.shape(1) % 8 == 0, "codes: expected columns in a multiple of 8, got " + text(c.shape(1)));
  NewArray<int32_t> packed({c.shape(0), c.shape(1) / 8});
  bool valid;
  {
    const nb::gil_scoped_release release;
    valid = codes_to_packed(c.as<int8_t>(), c.shape(0), c.shape(1), reinterpret_cast<uint32_t*>(packed.data));
  }
  REQUIRE(valid, "codes: expected -8 to 7, got a code out of range");
  return nb::cast(packed.array);
}

// A float32 array in huge pages. Its rows are far apart: with small pages they would need more entries than the
// processor's table of pages (TLB) has.
nb::object new_buffer(size_t rows, size_t columns) {
  REQUIRE(columns >= 1 && rows <= SIZE_MAX / sizeof(float) / columns / 2, "rows, columns: expected a size that exists");
  auto memory = std::make_unique<Memory>(rows * columns * sizeof(float), Pages::huge);
  const nb::capsule owner(memory.get(), [](void* p) noexcept { delete static_cast<Memory*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, float>(memory.release()->data(), {rows, columns}, owner));
}

// A transform, and the signs that it points into
struct HeldHadamard {
  size_t columns, outer;
  std::vector<float> signs;  // empty if outer is 1
  Hadamard transform() const {
    const float factor = static_cast<float>(1 / std::sqrt(static_cast<double>(columns)));
    return {columns, outer, signs.empty() ? nullptr : signs.data(), factor};
  }
};

HeldHadamard new_hadamard(size_t columns, nb::handle signs) {
  check_columns(columns);
  size_t outer = 1;
  std::vector<float> all;
  if (!signs.is_none()) {
    const Array s(signs, "signs", "b", {kAny, kAny});
    outer = s.shape(0);
    REQUIRE(outer >= 1 && s.shape(1) == outer, "signs: expected as many rows as columns, got another shape");
    all.assign(s.as<int8_t>(), s.as<int8_t>() + outer * outer);
    REQUIRE(std::all_of(all.begin(), all.end(), [](float sign) { return std::abs(sign) == 1.0f; }),
            "signs: expected 1 and -1 alone");
  }
  REQUIRE(columns % outer == 0 && std::has_single_bit(columns / outer),
          "columns: expected " + text(outer) + " times a power of two, got " + text(columns));
  return {columns, outer, std::move(all)};
}

// ---- operations --------------------------------------------------------------------------------------------------
void linear_arrays(const HeldWeights& held, nb::handle x, nb::handle out, nb::handle bias, bool accumulate) {
  const Weights& w = held.weights;
  const bool quantized = w.kind == Kind::w4 || w.kind == Kind::w8;
  REQUIRE(quantized == nb::isinstance<Activations>(x), std::string("x: expected ") +
                                                           (quantized ? "Activations" : "a float32 array") + " for " +
                                                           kind_name(w.kind) + " weights");
  std::optional<Array> offsets, input;
  if (!bias.is_none()) offsets.emplace(bias, "bias", "f", std::initializer_list<size_t>{w.rows});
  Activations* acts = quantized ? nb::cast<Activations*>(x) : nullptr;
  if (!quantized) input.emplace(x, "x", "f", std::initializer_list<size_t>{kAny, w.columns});
  if (acts)
    REQUIRE(acts->columns == w.columns, "x: expected " + text(w.columns) + " columns, got " + text(acts->columns));
  const size_t tokens = acts ? acts->tokens : input->shape(0);
  const Array y(out, "out", "f", {tokens, w.outputs()}, true);
  REQUIRE(!(accumulate && w.gated), "accumulate: expected without it for gated weights");
  const Output output{y.as<float>(), offsets ? offsets->as<float>() : nullptr, accumulate};
  const nb::gil_scoped_release release;
  if (acts)
    linear_quantized(w, *acts, output);
  else
    linear_float(w, input->as<float>(), tokens, output);
}

void embed_arrays(const HeldWeights& held, nb::handle ids, nb::handle out) {
  const Weights& w = held.weights;
  REQUIRE(w.kind != Kind::w4, "weights: expected w8 or float rows to embed, got w4");
  const Array i(ids, "ids", "il", {kAny}), y(out, "out", "f", {i.shape(0), w.columns}, true);
  std::vector<int64_t> rows(i.shape(0));
  for (size_t t = 0; t < rows.size(); t++) {
    rows[t] = i.type() == 'i' ? i.as<int32_t>()[t] : i.as<int64_t>()[t];
    REQUIRE(rows[t] >= 0 && static_cast<size_t>(rows[t]) < w.rows,
            "ids: expected 0 to " + text(w.rows - 1) + ", got " + std::to_string(rows[t]));
  }
  const nb::gil_scoped_release release;
  embed(w, rows.data(), rows.size(), y.as<float>());
}

void set_activations(Activations& acts, nb::handle codes, nb::handle scales, nb::handle zero_points) {
  const Array c(codes, "codes", "b", {kAny, acts.columns});
  const Array s(scales, "scales", "f", {c.shape(0)}), z(zero_points, "zero_points", "i", {c.shape(0)});
  check_tokens(c.shape(0), acts);
  acts.tokens = c.shape(0);
  for (size_t t = 0; t < acts.tokens; t++) {
    std::copy_n(c.as<int8_t>() + t * acts.columns, acts.columns, acts.codes(t));
    acts.scales[t] = s.as<float>()[t];
    acts.zero_points[t] = z.as<int32_t>()[t];
    acts.add_up(t);
  }
}

nb::tuple get_activations(const Activations& acts) {
  NewArray<int8_t> codes({acts.tokens, acts.columns});
  NewArray<float> scales({acts.tokens});
  NewArray<int32_t> zero_points({acts.tokens});
  for (size_t t = 0; t < acts.tokens; t++) std::copy_n(acts.codes(t), acts.columns, codes.data + t * acts.columns);
  std::copy_n(acts.scales.data(), acts.tokens, scales.data);
  std::copy_n(acts.zero_points.data(), acts.tokens, zero_points.data);
  return nb::make_tuple(codes.array, scales.array, zero_points.array);
}

void rmsnorm_arrays(nb::handle x, nb::handle gamma, float eps, nb::handle out) {
  const Array a(x, "x", "f", {kAny, kAny}), g(gamma, "gamma", "f", {a.shape(1)});
  const Array y(out, "out", "f", {a.shape(0), a.shape(1)}, true);
  const nb::gil_scoped_release release;
  rmsnorm(a.as<float>(), g.as<float>(), a.shape(0), a.shape(1), eps, y.as<float>());
}

void rmsnorm_heads_array(nb::handle qkv, nb::handle q_gamma, nb::handle k_gamma, size_t heads, float eps) {
  const Array a(qkv, "qkv", "f", {kAny, kAny}, true), q(q_gamma, "q_gamma", "f", {kAny});
  const size_t columns = a.shape(1), dim = q.shape(0);
  const Array k(k_gamma, "k_gamma", "f", {dim});
  REQUIRE(dim >= 1, "q_gamma: expected at least one number, got none");
  const size_t all = columns / dim;  // query heads, and as many key as value heads
  REQUIRE(columns % dim == 0 && heads >= 1 && heads < all && (all - heads) % 2 == 0,
          "qkv: expected (heads + 2 * kv_heads) * " + text(dim) + " columns for " + text(heads) + " heads, got " +
              text(columns));
  const HeadNorms norms{q.as<float>(), k.as<float>(), heads, (all - heads) / 2, dim, eps};
  const nb::gil_scoped_release release;
  rmsnorm_heads(norms, a.shape(0), a.as<float>());
}

void quantize_array(nb::handle x, Activations& acts) {
  const Array a(x, "x", "f", {kAny, acts.columns});
  check_tokens(a.shape(0), acts);
  const nb::gil_scoped_release release;
  quantize(a.as<float>(), a.shape(0), acts);
}

void rmsnorm_quantize_arrays(nb::handle x, nb::handle gamma, float eps, Activations& acts) {
  const Array a(x, "x", "f", {kAny, acts.columns}), g(gamma, "gamma", "f", {acts.columns});
  check_tokens(a.shape(0), acts);
  const nb::gil_scoped_release release;
  rmsnorm_quantize(a.as<float>(), g.as<float>(), a.shape(0), eps, acts);
}

void hadamard_arrays(const HeldHadamard& held, nb::handle x, nb::handle out) {
  const Array a(x, "x", "f", {kAny, held.columns}), y(out, "out", "f", {a.shape(0), a.shape(1)}, true);
  const nb::gil_scoped_release release;
  hadamard(held.transform(), a.as<float>(), a.shape(0), y.as<float>());
}

void hadamard_quantize_array(const HeldHadamard& held, nb::handle x, Activations& acts) {
  const Array a(x, "x", "f", {kAny, held.columns});
  REQUIRE(acts.columns == held.columns, "acts: expected " + text(held.columns) + " columns, got " + text(acts.columns));
  check_tokens(a.shape(0), acts);
  const nb::gil_scoped_release release;
  hadamard_quantize(held.transform(), a.as<float>(), a.shape(0), acts);
}

void swiglu_arrays(nb::handle gate_up, nb::handle out) {
  const Array y(out, "out", "f", {kAny, kAny}, true), a(gate_up, "gate_up", "f", {y.shape(0), 2 * y.shape(1)});
  const nb::gil_scoped_release release;
  swiglu(a.as<float>(), y.shape(0), y.shape(1), y.as<float>());
}

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const Kernels* k : supported_kernels()) names.emplace_back(k->name);
  return names;
}

std::tuple<size_t, size_t> check_products_of(const std::string& isa, double seconds, size_t threads) {
  const Kernels& k = kernels(isa);
  REQUIRE(seconds >= 0 && seconds <= 3600, "seconds: expected 0 to 3600, got " + std::to_string(seconds));
  REQUIRE(threads >= 1 && threads <= kMaxThreads, "threads: expected 1 to 1024, got " + text(threads));
  const nb::gil_scoped_release release;
  const Checked found = check_products(k, seconds, threads);
  return {found.rounds, found.wrong};
}

void bind_machine(nb::module_& m) {
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("available_isas", isa_names);
  m.def("set_isa", choose_kernels, "name"_a);
  m.def("threads", threads);
  m.def("set_threads", set_threads, "count"_a);
  m.def("usable_cpus", usable_cpus, "root"_a = "");
  m.def("read_bandwidth", read_bandwidth, "bytes"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "int8_rate", [](const std::string& isa) { return int8_rate(isa.empty() ? kernels() : kernels(isa)); },
      "isa"_a = "", nb::call_guard<nb::gil_scoped_release>());
  m.def("check_products", check_products_of, "isa"_a, "seconds"_a, "threads"_a);
}

void bind_weights(nb::module_& m) {
  nb::class_<HeldWeights>(m, "Weights")
      .def_prop_ro("rows", [](const HeldWeights& w) { return w.weights.rows; })
      .def_prop_ro("columns", [](const HeldWeights& w) { return w.weights.columns; })
      .def_prop_ro("gated", [](const HeldWeights& w) { return w.weights.gated; })
      .def_prop_ro("group_size", [](const HeldWeights& w) { return w.weights.group_size; })
      .def_prop_ro("bf16_products",
                   [](const HeldWeights& w) { return w.weights.bf16_products && kernels().bf16 != nullptr; })
      .def_prop_ro("kind", [](const HeldWeights& w) { return kind_name(w.weights.kind); })
      .def_prop_ro("nbytes", [](const HeldWeights& w) { return w.weights.nbytes(); });
  m.def("pack_w4", pack_w4_arrays, "packed"_a, "scales"_a, "group_size"_a, "gated"_a = false);
  m.def("pack_w8", pack_w8_arrays, "codes"_a, "scales"_a);
  m.def("wrap_float", wrap_float_arrays, "arrays"_a, "bf16_products"_a = false);
  m.def("round_weights", round_weights_arrays, "w"_a, "bits"_a, "group_size"_a, "rule"_a, "importance"_a = nb::none());
  m.def("codes_to_packed", codes_to_packed_array, "codes"_a);
}

void bind_operations(nb::module_& m) {
  nb::class_<Activations>(m, "Activations")
      .def(
          "__init__",
          [](Activations* self, size_t max_tokens, size_t columns) {
            check_columns(columns);
            new (self) Activations(max_tokens, columns);
          },
          "max_tokens"_a, "columns"_a)
      .def_ro("max_tokens", &Activations::max_tokens)
      .def_ro("columns", &Activations::columns)
      .def_ro("tokens", &Activations::tokens)
      .def("set", set_activations, "codes"_a, "scales"_a, "zero_points"_a)
      .def("get", get_activations);
  nb::class_<HeldHadamard>(m, "Hadamard")
      .def(nb::new_(&new_hadamard), "columns"_a, "signs"_a = nb::none())
      .def_prop_ro("columns", [](const HeldHadamard& held) { return held.columns; });
  m.def("new_buffer", new_buffer, "rows"_a, "columns"_a);
  m.def("quantize", quantize_array, "x"_a, "acts"_a);
  m.def("rmsnorm", rmsnorm_arrays, "x"_a, "gamma"_a, "eps"_a, "out"_a);
  m.def("rmsnorm_heads", rmsnorm_heads_array, "qkv"_a, "q_gamma"_a, "k_gamma"_a, "heads"_a, "eps"_a);
  m.def("rmsnorm_quantize", rmsnorm_quantize_arrays, "x"_a, "gamma"_a, "eps"_a, "acts"_a);
  m.def("hadamard", hadamard_arrays, "transform"_a, "x"_a, "out"_a);
  m.def("hadamard_quantize", hadamard_quantize_array, "transform"_a, "x"_a, "acts"_a);
  m.def("swiglu", swiglu_arrays, "gate_up"_a, "out"_a);
  m.def("linear", linear_arrays, "weights"_a, "x"_a, "out"_a, "bias"_a = nb::none(), "accumulate"_a = false);
  m.def("embed", embed_arrays, "weights"_a, "ids"_a, "out"_a);
}

}  // namespace
}  // namespace llamita

NB_MODULE(_native, m) {
#ifdef NDEBUG
  // At a program's end, Python leaves what is in reference cycles to the system; nanobind would list each as a leak.
  nanobind::set_leak_warnings(false);
#endif
  llamita::bind_machine(m);
  llamita::bind_weights(m);
  llamita::bind_operations(m);
  llamita::bind_cache(m);
  llamita::bind_adapters(m);
  llamita::kernels();  // a wrong LLAMITA_ISA fails here, at import; a wrong LLAMITA_THREADS on first use
}
