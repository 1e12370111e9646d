// Linux: the cores this process may run on (a second hardware thread of a core adds nothing to full vector units),
// no more than the container's quota of processor time.
#include <sched.h>

#include <algorithm>
#include <fstream>
#include <string>

#include "dispatch.h"

namespace llamita {
namespace {

// Whether `cpu` is the first of its core's hardware threads that this process may use.
bool leads_core(int cpu, const cpu_set_t& allowed) {
  std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
  int first, last;
  char separator;
  while (file >> first) {  // ranges: "0,8" or "0-1"
    last = first;
    if (file.get(separator) && separator == '-') file >> last >> separator;
    for (int sibling = first; sibling <= last; sibling++)
      if (sibling < CPU_SETSIZE && CPU_ISSET(sibling, &allowed)) return sibling == cpu;
  }
  return true;
}

// Whole processors of the cgroup's quota (version 2, then 1); no quota: as many as you like
size_t quota() {
  double limit = 0, period = 0;
  if (!(std::ifstream("/sys/fs/cgroup/cpu.max") >> limit >> period)) {
    std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") >> limit;
    std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_period_us") >> period;
  }
  if (limit <= 0 || period <= 0) return SIZE_MAX;
  return std::max<size_t>(1, static_cast<size_t>(limit / period));
}

}  // namespace

size_t usable_cpus() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return 1;
  size_t cores = 0;
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
    if (CPU_ISSET(cpu, &allowed) && leads_core(cpu, allowed)) cores++;
  return std::clamp<size_t>(cores, 1, quota());
}

}  // namespace llamita
