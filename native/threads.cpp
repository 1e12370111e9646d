// Each thread gets a run of neighbouring chunks of a job, so that it streams through its own part of memory. It takes
// chunks from the front of its run, then from the back of other runs. A run is one word: the job's number and the
// chunks left. Threads change it by compare-and-swap. The caller waits for chunks, not for threads, so nobody waits for
// a thread that wakes late and finds nothing to do.
#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "memory.h"

namespace llamita {
namespace {

constexpr int kSpins = 2000;             // about 30 to 100 microseconds: longer than the pause between two operations
constexpr size_t kChunksPerThread = 32;  // many, so that others can take over most of an interrupted thread's share

// Chunks [first, last) of a job, which no thread has taken yet
struct Run {
  uint32_t job;
  uint16_t first, last;

  static Run of(uint64_t word) {
    return {static_cast<uint32_t>(word >> 32), static_cast<uint16_t>(word >> 16), static_cast<uint16_t>(word)};
  }
  uint64_t word() const { return static_cast<uint64_t>(job) << 32 | static_cast<uint64_t>(first) << 16 | last; }
};
static_assert(kMaxThreads * kChunksPerThread <= UINT16_MAX);

#if defined(__x86_64__)
void relax() { __builtin_ia32_pause(); }
#elif defined(__aarch64__)
void relax() { asm volatile("yield"); }
#else
void relax() {}
#endif

struct Job {
  Task task;
  const void* context;
  size_t items;
  uint32_t chunks;
};

class Pool {
 public:
  // Delegates, so that the destructor joins the threads already started if another one cannot be.
  explicit Pool(size_t count) : Pool() {
    scratch_ = std::vector<Memory>(count);
    runs_ = std::vector<SharedRun>(count);
    workers_.reserve(count - 1);
    try {
      for (size_t i = 1; i < count; i++) workers_.emplace_back([this, i] { work(i); });
    } catch (const std::system_error& error) {
      throw std::runtime_error("threads: expected to start " + std::to_string(count) + ", got " +
                               std::to_string(workers_.size() + 1) + " (" + error.code().message() + "); try fewer");
    }
  }

  ~Pool() {
    stop_ = true;
    wake();
    for (std::thread& worker : workers_) worker.join();
  }

  size_t size() const { return scratch_.size(); }

  void run(const Job& job, size_t scratch_bytes) {
    for (Memory& memory : scratch_)
      if (memory.size() < scratch_bytes) memory = Memory(scratch_bytes, Pages::huge);
    if (job.chunks == 1) return job.task(job.context, 0, job.items, scratch_[0].data());
    job_ = job;
    done_.store(0, std::memory_order_relaxed);
    number_++;
    for (size_t i = 0; i < size(); i++) {
      const auto edge = [&](size_t thread) { return static_cast<uint16_t>(job.chunks * thread / size()); };
      runs_[i].word.store(Run{number_, edge(i), edge(i + 1)}.word(), std::memory_order_release);
    }
    wake();
    while (take_chunk(0)) continue;
    for (int i = 0; i < kSpins && done_.load(std::memory_order_acquire) != job.chunks; i++) relax();
    for (uint32_t done; (done = done_.load(std::memory_order_acquire)) != job.chunks;) done_.wait(done);
  }

 private:
  Pool() = default;

  void wake() {
    signal_.fetch_add(1);
    signal_.notify_all();
  }

  // Takes and does a chunk of the thread's own run, else of another run. A taken chunk keeps the job from ending, and
  // job_ from changing, until it is done.
  bool take_chunk(size_t thread) {
    for (size_t i = 0; i < size(); i++) {
      std::atomic<uint64_t>& shared = runs_[(thread + i) % size()].word;
      uint64_t word = shared.load(std::memory_order_acquire);
      for (Run run = Run::of(word); run.first < run.last; run = Run::of(word)) {
        const size_t chunk = i == 0 ? run.first++ : --run.last;
        if (shared.compare_exchange_weak(word, run.word(), std::memory_order_acq_rel, std::memory_order_acquire)) {
          do_chunk(chunk, thread);
          return true;
        }
      }
    }
    return false;
  }

  void do_chunk(size_t chunk, size_t thread) {
    const size_t chunks = job_.chunks;
    job_.task(job_.context, job_.items * chunk / chunks, job_.items * (chunk + 1) / chunks, scratch_[thread].data());
    if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == chunks) done_.notify_all();
  }

  void work(size_t thread) {
    while (!stop_) {
      const uint32_t seen = signal_.load();
      bool worked = false;
      for (int i = 0; i < kSpins && !worked && !stop_; i++) {
        worked = take_chunk(thread);
        relax();
      }
      if (!worked && !stop_) signal_.wait(seen);
    }
  }

  struct SharedRun {
    alignas(64) std::atomic<uint64_t> word{0};
  };

  std::vector<Memory> scratch_;
  std::vector<SharedRun> runs_;
  std::vector<std::thread> workers_;
  Job job_{};
  uint32_t number_ = 0;  // of the current job
  alignas(64) std::atomic<uint32_t> done_{0};
  alignas(64) std::atomic<uint32_t> signal_{0};
  std::atomic<bool> stop_{false};
};

struct Shared {
  std::mutex lock;
  std::unique_ptr<Pool> pool;  // made on first use
};

// Never destroyed: waiting threads must not be joined while the process ends.
Shared* shared = new Shared;
size_t chosen = 0;  // number of threads, 0 until one is first needed

// A forked child has no workers, and a thread that held the lock does not exist there to release it. The parent's pool
// is leaked in the child, because its threads cannot be joined.
void renew_in_child() { shared = new Shared; }

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, renew_in_child);

size_t checked(size_t count, const char* what, const std::string& given) {
  if (count < 1 || count > kMaxThreads)
    throw std::invalid_argument(std::string(what) + ": expected 1 to " + std::to_string(kMaxThreads) + ", got " +
                                given);
  return count;
}

size_t default_threads() {
  const char* text = std::getenv("LLAMITA_THREADS");
  if (!text || !*text) return std::min(usable_cpus(), kMaxThreads);
  char* end;
  const long count = std::strtol(text, &end, 10);
  return checked(*end || count < 1 ? 0 : static_cast<size_t>(count), "LLAMITA_THREADS", text);
}

// Call the next three with the lock held.
size_t choice() {
  if (chosen == 0) chosen = default_threads();
  return chosen;
}

void start(size_t count) {
  shared->pool = std::make_unique<Pool>(count);
  chosen = count;
}

Pool& pool() {
  if (!shared->pool) start(choice());
  return *shared->pool;
}

}  // namespace

size_t threads() {
  const std::lock_guard<std::mutex> guard(shared->lock);
  return pool().size();
}

void set_threads(size_t count) {
  checked(count, "threads", std::to_string(count));
  const std::lock_guard<std::mutex> guard(shared->lock);
  if (choice() != count || !shared->pool) start(count);
}

void parallel_run(size_t items, size_t grain, size_t scratch_bytes, Task task, const void* context) {
  if (items == 0) return;
  const std::lock_guard<std::mutex> guard(shared->lock);
  const size_t most = pool().size() == 1 ? 1 : pool().size() * kChunksPerThread;
  const size_t chunks = std::clamp<size_t>(items / std::max<size_t>(grain, 1), 1, most);
  pool().run({task, context, items, static_cast<uint32_t>(chunks)}, scratch_bytes);
}

}  // namespace llamita
