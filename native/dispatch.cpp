#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace llamita {
namespace {

const Kernels* find(const std::string& name, const char* what) {
  std::string names;
  for (const Kernels* k : supported_kernels()) {
    if (name == k->name) return k;
    names += names.empty() ? k->name : std::string(", ") + k->name;
  }
  throw std::invalid_argument(std::string(what) + ": expected an instruction set of this machine, got '" + name +
                              "'; try one of " + names);
}

const Kernels* first_choice() {
  const char* name = std::getenv("LLAMITA_ISA");
  return name && *name ? find(name, "LLAMITA_ISA") : supported_kernels().front();
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels = first_choice();
  return kernels;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

const Kernels& kernels(const std::string& name) { return *find(name, "isa"); }

void choose_kernels(const std::string& name) { chosen() = &kernels(name); }

}  // namespace llamita
