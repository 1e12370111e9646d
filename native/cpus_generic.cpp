#include <thread>

#include "dispatch.h"

namespace llamita {

size_t usable_cpus(const std::string&) {
  const size_t count = std::thread::hardware_concurrency();
  return count > 0 ? count : 1;
}

}  // namespace llamita
