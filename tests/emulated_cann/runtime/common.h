// What the files of the runtime share: how a C function is exported, error codes, settings, traces.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

#define API extern "C" __attribute__((visibility("default")))
#define TRACE() trace_call(__func__)

typedef int aclError;
// CANN's own numbers (torch_npu's NPUErrorCodes.h lists them with their meaning).
constexpr aclError OK = 0, INVALID = 107000, BAD_DEVICE = 107001, NO_CONTEXT = 107002, NO_MEMORY = 207001;
constexpr aclError INTERNAL = 500000, NO_DEVICE = 507899, REPORT_TIMEOUT = 507018;

// The integer in an environment variable; `otherwise` where it is unset or empty.
long setting(const char* name, long otherwise);
// One line to the file that the environment variable names ("-": standard error); nothing where it is unset.
API void emulated_note(const char* variable, const char* line);
void trace_call(const char* name);

int current_device();  // -1 before any was set
long device_count();
double now_ms();

// Work for a stream: done at once, or, under EMULATED_CANN_DELAY, by the stream's own thread some time later.
aclError submit(void* stream, std::function<aclError()> task);
bool streams_are_late();
