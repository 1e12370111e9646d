// Linux: counts the cores that this process may use, at most the processors that the quotas of its cgroups grant.
// A core's second hardware thread does not count, because it adds nothing to busy vector units.
#include <sched.h>

#include <algorithm>
#include <fstream>
#include <string>

#include "dispatch.h"

namespace llamita {
namespace {

// True if `cpu` is the first of its core's hardware threads that this process may use.
bool leads_core(const std::string& root, int cpu, const cpu_set_t& allowed) {
  std::ifstream file(root + "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
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

// Returns the whole processors that one cgroup's files grant (version 2, then 1), SIZE_MAX without a quota.
size_t quota_of(const std::string& group) {
  double limit = 0, period = 0;
  if (!(std::ifstream(group + "/cpu.max") >> limit >> period)) {  // "max 100000" does not parse: no limit
    std::ifstream(group + "/cpu.cfs_quota_us") >> limit;
    std::ifstream(group + "/cpu.cfs_period_us") >> period;
  }
  if (limit <= 0 || period <= 0) return SIZE_MAX;
  return std::max<size_t>(1, static_cast<size_t>(limit / period));
}

bool names_cpu(const std::string& controllers) { return ("," + controllers + ",").find(",cpu,") != std::string::npos; }

// Returns the least quota from the process's cgroup up to the root: each level may have one. In a container the path
// may be the host's and not exist; then only the root is read, where the container's cgroup is mounted.
size_t quota(const std::string& root) {
  size_t least = SIZE_MAX;
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {  // "0::/path" is version 2, "4:cpu,cpuacct:/path" version 1
    const size_t name = line.find(':') + 1, end = line.find(':', name);
    if (name == 0 || end == std::string::npos) continue;
    const std::string controllers = line.substr(name, end - name);
    if (!controllers.empty() && !names_cpu(controllers)) continue;
    const std::string mount = root + "/sys/fs/cgroup" + (controllers.empty() ? "" : "/" + controllers);
    for (std::string path = line.substr(end + 1);; path.resize(path.rfind('/'))) {
      least = std::min(least, quota_of(mount + path));
      if (path.find('/') == std::string::npos) break;
    }
  }
  return least;
}

}  // namespace

size_t usable_cpus(const std::string& root) {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return 1;
  size_t cores = 0;
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
    if (CPU_ISSET(cpu, &allowed) && leads_core(root, cpu, allowed)) cores++;
  return std::clamp<size_t>(cores, 1, quota(root));
}

}  // namespace llamita
