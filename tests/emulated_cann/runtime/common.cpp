// Settings and traces.
#include "common.h"

#include <fcntl.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <string>

long setting(const char* name, long otherwise) {
  const char* text = getenv(name);
  return text && *text ? atol(text) : otherwise;
}

API void emulated_note(const char* variable, const char* line) {
  const char* path = getenv(variable);
  if (!path || !*path) return;
  std::string text = std::string(line) + "\n";
  bool to_stderr = !strcmp(path, "-");
  // Opened for each line: processes that fork share no position, and short appended writes stay whole.
  int file = to_stderr ? STDERR_FILENO : open(path, O_WRONLY | O_CREAT | O_APPEND, 0644);
  if (file < 0) return;
  if (write(file, text.data(), text.size()) < 0) return;
  if (!to_stderr) close(file);
}

void trace_call(const char* name) { emulated_note("EMULATED_CANN_CALLS", name); }

double now_ms() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
