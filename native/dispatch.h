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
void choose_kernels(const std::string& name);  // throws std::invalid_argument

}  // namespace llamita
