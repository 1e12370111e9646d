// The instruction sets that this machine can run, best first, and the chosen one.
#pragma once
#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace llamita {

std::vector<const Kernels*> supported_kernels();  // cpu_x86.cpp, cpu_arm.cpp or cpu_generic.cpp
// cpus_linux.cpp or cpus_generic.cpp. root: the folder that contains /proc and /sys.
size_t usable_cpus(const std::string& root = "");

const Kernels& kernels();
const Kernels& kernels(const std::string& name);  // throws std::invalid_argument
void choose_kernels(const std::string& name);     // throws std::invalid_argument

struct Checked {
  size_t rounds = 0, wrong = 0;
};
// Computes two products in turn on so many threads, at least once each, and counts results that are wrong.
Checked check_products(const Kernels& k, double seconds, size_t threads);

}  // namespace llamita
