// Streams and events. A stream does its work at once, on the thread that asks. EMULATED_CANN_DELAY=MILLISECONDS gives each
// stream a thread instead, which waits up to that long before every piece of work: whatever the program has not made to
// wait by an event or a synchronization then comes in another order.
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <thread>

#include "common.h"

namespace {
long delay() {
  static long milliseconds = setting("EMULATED_CANN_DELAY", 0);
  return milliseconds;
}

struct Stream {
  int id, device;
  std::mutex guard;
  std::condition_variable changed;
  std::deque<std::function<aclError()>> tasks;  // the one being done is at the front
  aclError error = OK;
  bool stopping = false;
  std::thread worker;

  void start() {
    worker = std::thread([this] { work(); });
  }

  void work() {
    std::mt19937 random(id);
    std::unique_lock<std::mutex> lock(guard);
    for (;;) {
      changed.wait(lock, [this] { return stopping || !tasks.empty(); });
      if (tasks.empty()) return;
      auto task = tasks.front();
      lock.unlock();
      usleep(random() % (delay() * 1000 + 1));
      aclError result = task();
      lock.lock();
      if (result) error = result;
      tasks.pop_front();
      changed.notify_all();
    }
  }

  aclError wait() {
    std::unique_lock<std::mutex> lock(guard);
    changed.wait(lock, [this] { return tasks.empty(); });
    aclError result = error;
    error = OK;
    return result;
  }

  bool idle() {
    std::lock_guard<std::mutex> lock(guard);
    return tasks.empty();
  }

  void stop() {
    wait();
    {
      std::lock_guard<std::mutex> lock(guard);
      stopping = true;
    }
    changed.notify_all();
    if (worker.joinable()) worker.join();
  }
};

std::mutex all_guard;
std::set<Stream*> all;

aclError make_stream(void** stream) {
  static std::atomic<int> count{0};
  auto* made = new Stream;
  made->id = ++count;
  made->device = current_device();
  if (delay()) made->start();
  std::lock_guard<std::mutex> lock(all_guard);
  all.insert(made);
  *stream = made;
  return OK;
}

aclError destroy_stream(void* handle) {
  auto* stream = static_cast<Stream*>(handle);
  stream->stop();
  std::lock_guard<std::mutex> lock(all_guard);
  all.erase(stream);
  delete stream;
  return OK;
}

aclError synchronize_device() {
  std::set<Stream*> mine;
  {
    std::lock_guard<std::mutex> lock(all_guard);
    for (auto* stream : all)
      if (stream->device == current_device()) mine.insert(stream);
  }
  aclError result = OK;
  for (auto* stream : mine)
    if (aclError error = stream->wait()) result = error;
  return result;
}

// How often an event was recorded, and up to which of these its stream has come. It outlives the event: work refers to it.
struct Progress {
  std::mutex guard;
  std::condition_variable changed;
  uint64_t recorded = 0, reached = 0;
  double when = 0;

  uint64_t record() {
    std::lock_guard<std::mutex> lock(guard);
    return ++recorded;
  }
  void reach(uint64_t turn) {
    std::lock_guard<std::mutex> lock(guard);
    if (turn > reached) reached = turn;
    when = now_ms();
    changed.notify_all();
  }
  void wait(uint64_t turn) {
    std::unique_lock<std::mutex> lock(guard);
    changed.wait(lock, [&] { return reached >= turn; });
  }
  uint64_t last() {
    std::lock_guard<std::mutex> lock(guard);
    return recorded;
  }
  bool complete() {
    std::lock_guard<std::mutex> lock(guard);
    return reached >= recorded;
  }
};
typedef std::shared_ptr<Progress> Event;

Event& event_of(void* handle) { return *static_cast<Event*>(handle); }

aclError make_event(void** event) {
  *event = new Event(std::make_shared<Progress>());
  return OK;
}
}  // namespace

bool streams_are_late() { return delay() > 0; }

aclError submit(void* handle, std::function<aclError()> task) {
  auto* stream = static_cast<Stream*>(handle);
  if (!delay() || !stream) return task();
  std::lock_guard<std::mutex> lock(stream->guard);
  stream->tasks.push_back(std::move(task));
  stream->changed.notify_all();
  return OK;
}

API aclError aclrtCreateStream(void** stream) {
  TRACE();
  return make_stream(stream);
}
API aclError aclrtCreateStreamWithConfig(void** stream, uint32_t, uint32_t) {
  TRACE();
  return make_stream(stream);
}
API aclError aclrtDestroyStream(void* stream) { return destroy_stream(stream); }
API aclError aclrtDestroyStreamForce(void* stream) { return destroy_stream(stream); }
API aclError aclrtSynchronizeStream(void* stream) { return stream ? static_cast<Stream*>(stream)->wait() : OK; }
API aclError aclrtSynchronizeStreamWithTimeout(void* stream, int32_t) { return aclrtSynchronizeStream(stream); }
API aclError aclrtSynchronizeDevice() { return synchronize_device(); }
API aclError aclrtSynchronizeDeviceWithTimeout(int32_t) { return synchronize_device(); }
API aclError aclrtStreamQuery(void* stream, int* status) {
  *status = static_cast<Stream*>(stream)->idle() ? 0 : 1;
  return OK;
}
API aclError aclrtStreamGetId(void* stream, int32_t* id) {
  *id = static_cast<Stream*>(stream)->id;
  return OK;
}

API aclError aclrtCreateEvent(void** event) { return make_event(event); }
API aclError aclrtCreateEventWithFlag(void** event, uint32_t) { return make_event(event); }
API aclError aclrtCreateEventExWithFlag(void** event, uint32_t) { return make_event(event); }
API aclError aclrtDestroyEvent(void* event) {
  delete static_cast<Event*>(event);
  return OK;
}
API aclError aclrtRecordEvent(void* handle, void* stream) {
  Event event = event_of(handle);
  uint64_t turn = event->record();
  return submit(stream, [event, turn] {
    event->reach(turn);
    return OK;
  });
}
API aclError aclrtStreamWaitEvent(void* stream, void* handle) {
  Event event = event_of(handle);
  uint64_t turn = event->last();
  return submit(stream, [event, turn] {
    event->wait(turn);
    return OK;
  });
}
API aclError aclrtSynchronizeEvent(void* handle) {
  Event event = event_of(handle);
  event->wait(event->last());
  return OK;
}
API aclError aclrtQueryEvent(void* event, int* status) {  // 0: complete
  *status = event_of(event)->complete() ? 0 : 1;
  return OK;
}
API aclError aclrtQueryEventStatus(void* event, int* status) {  // 1: complete
  *status = event_of(event)->complete() ? 1 : 0;
  return OK;
}
API aclError aclrtQueryEventWaitStatus(void* event, int* status) {  // 0: complete
  return aclrtQueryEvent(event, status);
}
API aclError aclrtEventElapsedTime(float* milliseconds, void* start, void* end) {
  *milliseconds = static_cast<float>(event_of(end)->when - event_of(start)->when);
  return OK;
}
API aclError aclrtEventGetTimestamp(void* event, uint64_t* microseconds) {
  *microseconds = static_cast<uint64_t>(event_of(event)->when * 1000);
  return OK;
}
API aclError aclrtLaunchHostFunc(void* stream, void (*function)(void*), void* data) {
  return submit(stream, [=] {
    function(data);
    return OK;
  });
}
API aclError aclrtProcessReport(int32_t milliseconds) {
  usleep((milliseconds > 0 ? milliseconds : 1) * 1000);
  return REPORT_TIMEOUT;
}
