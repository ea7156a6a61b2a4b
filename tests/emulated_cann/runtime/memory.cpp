// Memory of the cards, which is the host's. Each card has EMULATED_CANN_MEMORY bytes for each process that uses it; what
// goes beyond is refused with CANN's own code, and torch_npu reports that it is out of memory.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "common.h"

namespace {
struct Block {
  size_t size;
  int device;
};
std::mutex guard;
std::map<void*, Block> blocks;     // what aclrtMalloc handed out
std::map<void*, size_t> reserved;  // ranges of addresses, for expandable segments
std::map<void*, size_t> mapped;    // the parts of them that have memory
std::map<int, size_t> used;

size_t capacity() {
  static size_t bytes = setting("EMULATED_CANN_MEMORY", 64L << 30);
  return bytes;
}

bool take(int device, size_t size) {
  if (used[device] + size > capacity()) return false;
  used[device] += size;
  return true;
}

aclError allocate(void** pointer, size_t size) {
  std::lock_guard<std::mutex> lock(guard);
  int device = current_device();
  if (!take(device, size)) return NO_MEMORY;
  if (posix_memalign(pointer, 512, size ? size : 512)) return NO_MEMORY;
  blocks[*pointer] = {size, device};
  return OK;
}

aclError allocate_host(void** pointer, size_t size) {
  return posix_memalign(pointer, 4096, size ? size : 1) ? NO_MEMORY : OK;
}

aclError copy(void* to, size_t room, const void* from, size_t size) {
  if (size > room) return INVALID;
  memmove(to, from, size);
  return OK;
}
}  // namespace

API aclError aclrtMalloc(void** pointer, size_t size, int) {
  TRACE();
  return allocate(pointer, size);
}
API aclError aclrtMallocAlign32(void** pointer, size_t size, int) {
  TRACE();
  return allocate(pointer, size);
}
API aclError aclrtFree(void* pointer) {
  TRACE();
  std::lock_guard<std::mutex> lock(guard);
  auto found = blocks.find(pointer);
  if (found == blocks.end()) return INVALID;
  used[found->second.device] -= found->second.size;
  blocks.erase(found);
  free(pointer);
  return OK;
}
API aclError aclrtMallocHost(void** pointer, size_t size) { return allocate_host(pointer, size); }
API aclError aclrtMallocHostWithCfg(void** pointer, uint64_t size, void*) { return allocate_host(pointer, size); }
API aclError aclrtFreeHost(void* pointer) {
  free(pointer);
  return OK;
}
API aclError aclrtGetMemInfo(int, size_t* free_bytes, size_t* total) {
  std::lock_guard<std::mutex> lock(guard);
  *total = capacity();
  *free_bytes = capacity() - used[current_device()];
  return OK;
}

// Expandable segments: a range of addresses is reserved, then memory is put behind parts of it.
API aclError aclrtReserveMemAddress(void** pointer, size_t size, size_t, void*, uint64_t) {
  TRACE();
  void* at = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) return NO_MEMORY;
  std::lock_guard<std::mutex> lock(guard);
  reserved[at] = size;
  *pointer = at;
  return OK;
}
API aclError aclrtReleaseMemAddress(void* pointer) {
  std::lock_guard<std::mutex> lock(guard);
  auto found = reserved.find(pointer);
  if (found == reserved.end()) return INVALID;
  munmap(pointer, found->second);
  reserved.erase(found);
  return OK;
}
API aclError aclrtMallocPhysical(void** handle, size_t size, const void*, uint64_t) {
  TRACE();
  std::lock_guard<std::mutex> lock(guard);
  int device = current_device();
  if (!take(device, size)) return NO_MEMORY;
  *handle = new Block{size, device};
  return OK;
}
API aclError aclrtFreePhysical(void* handle) {
  std::lock_guard<std::mutex> lock(guard);
  Block* block = static_cast<Block*>(handle);
  used[block->device] -= block->size;
  delete block;
  return OK;
}
API aclError aclrtMapMem(void* pointer, size_t size, size_t, void*, uint64_t) {
  TRACE();
  if (mprotect(pointer, size, PROT_READ | PROT_WRITE)) return INVALID;
  std::lock_guard<std::mutex> lock(guard);
  mapped[pointer] = size;
  return OK;
}
API aclError aclrtUnmapMem(void* pointer) {
  std::lock_guard<std::mutex> lock(guard);
  auto found = mapped.find(pointer);
  if (found == mapped.end()) return INVALID;
  mmap(pointer, found->second, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  mapped.erase(found);
  return OK;
}

API aclError aclrtMemcpy(void* to, size_t room, const void* from, size_t size, int) {
  TRACE();
  return copy(to, room, from, size);
}
API aclError aclrtMemcpyAsync(void* to, size_t room, const void* from, size_t size, int, void* stream) {
  TRACE();
  return submit(stream, [=] { return copy(to, room, from, size); });
}
API aclError aclrtMemcpyAsyncWithCondition(void* to, size_t room, const void* from, size_t size, int, void* stream) {
  TRACE();
  return submit(stream, [=] { return copy(to, room, from, size); });
}
API aclError aclrtMemset(void* to, size_t, int32_t value, size_t size) {
  memset(to, value, size);
  return OK;
}
API aclError aclrtMemsetAsync(void* to, size_t, int32_t value, size_t size, void* stream) {
  return submit(stream, [=] {
    memset(to, value, size);
    return OK;
  });
}
API aclError aclrtHostRegister(void* pointer, uint64_t, int, void** device) {
  if (device) *device = pointer;
  return OK;
}
