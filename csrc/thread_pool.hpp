// Workers that share loops. The caller works too, so a pool of one thread starts none.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace vito {

class ThreadPool {
 public:
  explicit ThreadPool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
  }

  ~ThreadPool() {
    if (getpid() != owner_) {  // in a forked child the workers do not exist and cannot be joined
      for (std::thread& worker : workers_) worker.detach();
      return;
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // body(i) for each i in [0, count), in any order; returns when all are done. `body` must not throw. May be called from
  // several threads at once; a forked child does the work itself.
  void run(size_t count, const std::function<void(size_t)>& body) {
    if (count <= 1 || workers_.empty() || getpid() != owner_) {
      for (size_t i = 0; i < count; ++i) body(i);
      return;
    }
    const auto job = std::make_shared<Job>(count, body);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      jobs_.push_back(job);
    }
    wake_.notify_all();
    job->work();
    std::unique_lock<std::mutex> lock(mutex_);
    jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), job), jobs_.end());
    done_.wait(lock, [&] { return job->finished == count; });
  }

 private:
  struct Job {
    Job(size_t count, const std::function<void(size_t)>& body) : count(count), body(body) {}
    // Whether this call finished the last of the work.
    bool work() {
      size_t mine = 0;
      for (size_t i; (i = next.fetch_add(1)) < count; ++mine) body(i);
      return mine && finished.fetch_add(mine) + mine == count;
    }
    const size_t count;
    const std::function<void(size_t)>& body;
    std::atomic<size_t> next{0}, finished{0};
  };

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
      if (stopping_) return;
      const std::shared_ptr<Job> job = jobs_.front();
      if (job->next >= job->count) {
        jobs_.pop_front();
        continue;
      }
      lock.unlock();
      const bool last = job->work();
      lock.lock();
      if (last) done_.notify_all();
    }
  }

  const pid_t owner_ = getpid();
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::deque<std::shared_ptr<Job>> jobs_;
  bool stopping_ = false;
  std::vector<std::thread> workers_;
};

}  // namespace vito
