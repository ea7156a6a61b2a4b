// Cards: how many there are, which one a thread uses, and what torch_npu asks about them.
#include <dlfcn.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "common.h"

namespace {
thread_local int current = -1;

// ASCEND_RT_VISIBLE_DEVICES lists the cards that a process may see, up to the first that is not there.
long visible_devices() {
  long present = setting("EMULATED_CANN_CARDS", 1), named = 0;
  const char* visible = getenv("ASCEND_RT_VISIBLE_DEVICES");
  if (!visible) return present;
  for (const char* at = visible; *at; named++) {
    char* end;
    long index = strtol(at, &end, 10);
    if (end == at || index < 0 || index >= present) break;
    at = *end == ',' ? end + 1 : end;
  }
  return named;
}

// The table of operators is checked when the first process starts a card, not in the middle of a run.
bool operators_load() {
  Dl_info here;
  if (!dladdr(reinterpret_cast<void*>(&operators_load), &here)) return false;
  std::string path = here.dli_fname;
  path = path.substr(0, path.rfind('/') + 1) + "libopapi.so";
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
  if (!library) fprintf(stderr, "emulated CANN: %s\n", dlerror());
  return library != nullptr;
}

std::mutex guard;
std::map<int, int64_t> system_options;
}  // namespace

int current_device() { return current; }
long device_count() {
  static long count = visible_devices();
  return count;
}

API aclError aclInit(const char*) {
  TRACE();
  if (!device_count()) return NO_DEVICE;
  static bool loaded = operators_load();
  return loaded ? OK : INTERNAL;
}
API aclError aclFinalize() { return OK; }
API aclError aclrtGetDeviceCount(uint32_t* count) {
  TRACE();
  *count = device_count();
  return OK;
}
API aclError aclrtSetDevice(int32_t device) {
  TRACE();
  if (device < 0 || device >= device_count()) return BAD_DEVICE;
  current = device;
  return OK;
}
API aclError aclrtGetDevice(int32_t* device) {
  if (current < 0) return NO_CONTEXT;
  *device = current;
  return OK;
}
API aclError aclrtResetDevice(int32_t) { return OK; }
API aclError aclrtResetDeviceForce(int32_t) { return OK; }
API const char* aclrtGetSocName() { return "Ascend910B3"; }
API aclError aclrtGetCurrentContext(void** context) {
  if (current < 0) return NO_CONTEXT;
  *context = reinterpret_cast<void*>(static_cast<intptr_t>(current + 1));
  return OK;
}
API aclError aclrtSetCurrentContext(void* context) {
  current = static_cast<int>(reinterpret_cast<intptr_t>(context)) - 1;
  return OK;
}
API aclError aclrtGetPrimaryCtxState(int32_t, uint32_t* flags, int32_t* active) {
  if (flags) *flags = 0;
  *active = current >= 0;
  return OK;
}
API aclError aclrtDeviceCanAccessPeer(int32_t* can, int32_t, int32_t) {
  *can = 1;
  return OK;
}
API aclError aclrtDeviceGetBareTgid(int32_t* pid) {
  *pid = getpid();
  return OK;
}
API aclError aclGetDeviceCapability(uint32_t, int, int64_t* value) {
  *value = 0;
  return OK;
}
API aclError aclrtGetStreamOverflowSwitch(void*, uint32_t* flag) {
  *flag = 0;
  return OK;
}
API aclError aclsysGetVersionStr(const char*, char* version) {
  strcpy(version, "8.5.0");
  return OK;
}
API size_t aclGetCompileoptSize(int) { return 256; }
API aclError aclGetCompileopt(int, char* value, size_t length) {
  snprintf(value, length, "disable");
  return OK;
}

static aclError set_option(int option, int64_t value) {
  std::lock_guard<std::mutex> lock(guard);
  system_options[option] = value;
  return OK;
}
static aclError get_option(int option, int64_t* value) {
  std::lock_guard<std::mutex> lock(guard);
  *value = system_options[option];
  return OK;
}
API aclError aclrtCtxSetSysParamOpt(int option, int64_t value) { return set_option(option, value); }
API aclError aclrtSetSysParamOpt(int option, int64_t value) { return set_option(option, value); }
API aclError aclrtCtxGetSysParamOpt(int option, int64_t* value) { return get_option(option, value); }
API aclError aclrtGetSysParamOpt(int option, int64_t* value) { return get_option(option, value); }
