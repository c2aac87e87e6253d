// Threads that share the parts of one run. They sleep between runs, and one that wakes too late finds nothing left to do:
// nobody waits for it.

#pragma once

#include <immintrin.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

// Lets the calling thread take numbers below 1e-38 for zero, as ONNX Runtime's do: attention gives many, and they are slow.
class Denormals {
 public:
  Denormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~Denormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
};

class Crew {
 public:
  // With fewer threads than asked for where the system has no more.
  explicit Crew(int helpers) {
    try {
      threads_.reserve(helpers);
      for (int i = 1; i <= helpers; i++) threads_.emplace_back([this, i] { help(i); });
    } catch (const std::exception&) {
    }
  }

  ~Crew() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      leave_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  // Calls work(part, member) for each of the `parts`, each member of the crew in a thread of its own; the caller is 0.
  // While another thread is at it, the caller does all of its own.
  template <class Work>
  void share(int parts, const Work& work) {
    std::unique_lock<std::mutex> alone(running_, std::try_to_lock);
    if (!alone || threads_.empty() || parts < 2) {
      for (int part = 0; part < parts; part++) work(part, 0);
      return;
    }
    call_ = [](const void* work, int part, int member) { (*static_cast<const Work*>(work))(part, member); };
    work_ = &work;
    parts_ = parts;
    next_ = 0;  // from here on, whoever is awake takes part
    {
      std::lock_guard<std::mutex> lock(mutex_);
      run_++;
    }
    wake_.notify_all();
    take(0);
    next_ = CLOSED;
    for (int turn = 0; inside_; turn++) {  // for as long as a part takes; longer, where its thread has to wait itself
      if (turn < PAUSES)
        _mm_pause();
      else
        std::this_thread::yield();
    }
  }

 private:
  static constexpr int CLOSED = 1 << 30, PAUSES = 2000;

  // What `call_`, `work_` and `parts_` say is read after a number below CLOSED was taken: share() wrote it before, and
  // does not go on while anybody is inside.
  void take(int member) {
    for (int part; (part = next_++) < CLOSED && part < parts_;) call_(work_, part, member);
  }

  void help(int member) {
    const Denormals zero;
    for (unsigned seen = 0;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return leave_ || run_ != seen; });
        if (leave_) return;
        seen = run_;
      }
      inside_++;
      take(member);
      inside_--;
    }
  }

  std::vector<std::thread> threads_;
  std::mutex running_, mutex_;
  std::condition_variable wake_;
  unsigned run_ = 0;
  bool leave_ = false;
  std::atomic<int> next_{CLOSED}, inside_{0};
  void (*call_)(const void*, int, int) = nullptr;
  const void* work_ = nullptr;
  int parts_ = 0;
};

// For Python: a crew with so many threads besides the caller's, and its end, when nothing runs.
extern "C" void* crew(int helpers) { return new (std::nothrow) Crew(helpers); }
extern "C" void dismiss(void* crew) { delete static_cast<Crew*>(crew); }
