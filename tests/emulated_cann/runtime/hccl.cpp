// HCCL between processes of one machine: a file in /dev/shm that all ranks of a communicator map, with a slot for each
// rank and for each pair of ranks. Collectives go in pieces of one slot: every rank shows its own piece, all meet, each
// takes what it needs, all meet again. Sums are made in the order of the ranks, so that all get the same bits.
#include "hccl.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "common.h"

namespace {
constexpr size_t ROOT_INFO_BYTES = 4108;
// HcclResult's numbers.
constexpr HcclResult SUCCESS = 0, BAD_PARAMETER = 1, NO_MEMORY_LEFT = 3, NOT_SUPPORTED = 5, OPEN_FAILED = 8, TIMED_OUT = 9;

Communicator* of(void* handle) { return static_cast<Communicator*>(handle); }

void pause_shortly() {
  timespec moment{0, 20000};
  nanosleep(&moment, nullptr);
}

double deadline() { return now_ms() + 1000.0 * setting("HCCL_EXEC_TIMEOUT", 1800); }

// All ranks of the communicator wait here for each other; false where one does not come.
bool meet(Communicator* comm) {
  Shared* shared = comm->shared;
  uint32_t phase = shared->phase.load();
  if (shared->arrived.fetch_add(1) + 1 == comm->ranks) {
    shared->arrived = 0;
    shared->phase.fetch_add(1);
    return true;
  }
  for (double limit = deadline(); shared->phase.load() == phase; pause_shortly())
    if (now_ms() > limit) return false;
  return true;
}

HcclResult open_communicator(uint32_t ranks, const char* name, uint32_t rank, void** out) {
  if (ranks > MAX_RANKS || rank >= ranks) return BAD_PARAMETER;
  std::string path = std::string("/dev/shm/") + name;
  size_t room = setting("EMULATED_CANN_HCCL_SLOT", 8L << 20);
  size_t bytes = HEADER_BYTES + room * (ranks + ranks * ranks);
  int file = open(path.c_str(), O_RDWR | O_CREAT, 0600);
  if (file < 0 || ftruncate(file, bytes)) return OPEN_FAILED;
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (at == MAP_FAILED) return NO_MEMORY_LEFT;
  auto* slots = static_cast<char*>(at) + HEADER_BYTES;
  auto* comm = new Communicator{name, ranks, rank, static_cast<Shared*>(at), slots, room, bytes};
  if (!meet(comm)) return TIMED_OUT;
  if (rank == 0) unlink(path.c_str());  // all have it open
  *out = comm;
  return SUCCESS;
}

// `take(offset, bytes)` reads what all ranks show of the piece at `offset`; a rank that does not `show` only reads.
template <class Take>
HcclResult in_pieces(Communicator* comm, const void* mine, size_t bytes, size_t step, bool show, Take take) {
  size_t room = comm->room / step * step;
  for (size_t at = 0; at == 0 || at < bytes; at += room) {
    size_t part = bytes - at < room ? bytes - at : room;
    if (show && part) memcpy(comm->slot(comm->rank), static_cast<const char*>(mine) + at, part);
    if (!meet(comm)) return TIMED_OUT;
    HcclResult result = take(at, part);
    if (!meet(comm)) return TIMED_OUT;
    if (result) return result;
  }
  return SUCCESS;
}

HcclResult all_reduce(Communicator* comm, const void* from, void* to, size_t count, int type, int operation, bool keep) {
  size_t width = hccl_width(type);
  return in_pieces(comm, from, count * width, width, true, [&](size_t at, size_t part) {
    if (!keep) return SUCCESS;
    return hccl_reduce(static_cast<char*>(to) + at, comm, part / width, type, operation) ? SUCCESS : NOT_SUPPORTED;
  });
}

HcclResult broadcast(Communicator* comm, void* data, size_t bytes, uint32_t root) {
  return in_pieces(comm, data, bytes, 8, comm->rank == root, [&](size_t at, size_t part) {
    if (comm->rank != root) memcpy(static_cast<char*>(data) + at, comm->slot(root), part);
    return SUCCESS;
  });
}

HcclResult all_gather(Communicator* comm, const void* from, void* to, size_t bytes) {
  return in_pieces(comm, from, bytes, 8, true, [&](size_t at, size_t part) {
    for (uint32_t r = 0; r < comm->ranks; r++) memcpy(static_cast<char*>(to) + bytes * r + at, comm->slot(r), part);
    return SUCCESS;
  });
}

HcclResult reduce_scatter(Communicator* comm, const void* from, void* to, size_t count, int type, int operation) {
  size_t bytes = count * hccl_width(type);
  std::vector<char> all(bytes * comm->ranks);
  HcclResult result = all_reduce(comm, from, all.data(), count * comm->ranks, type, operation, true);
  memcpy(to, all.data() + bytes * comm->rank, bytes);
  return result;
}

HcclResult scatter(Communicator* comm, const void* from, void* to, size_t bytes, uint32_t root) {
  std::vector<char> all(bytes * comm->ranks);
  if (comm->rank == root) memcpy(all.data(), from, all.size());
  HcclResult result = broadcast(comm, all.data(), all.size(), root);
  memcpy(to, all.data() + bytes * comm->rank, bytes);
  return result;
}

// To another rank: a message is in the pair's slot for as long as more were sent than taken.
HcclResult send(Communicator* comm, const void* data, size_t bytes, uint32_t peer) {
  auto &sent = comm->shared->sent[comm->rank][peer], &taken = comm->shared->taken[comm->rank][peer];
  double limit = deadline();
  for (size_t at = 0; at < bytes; at += comm->room) {
    for (; sent.load() != taken.load(); pause_shortly())
      if (now_ms() > limit) return TIMED_OUT;
    size_t part = bytes - at < comm->room ? bytes - at : comm->room;
    memcpy(comm->pair_slot(comm->rank, peer), static_cast<const char*>(data) + at, part);
    sent.fetch_add(1);
  }
  return SUCCESS;
}

HcclResult receive(Communicator* comm, void* data, size_t bytes, uint32_t peer) {
  auto &sent = comm->shared->sent[peer][comm->rank], &taken = comm->shared->taken[peer][comm->rank];
  double limit = deadline();
  for (size_t at = 0; at < bytes; at += comm->room) {
    for (; sent.load() == taken.load(); pause_shortly())
      if (now_ms() > limit) return TIMED_OUT;
    size_t part = bytes - at < comm->room ? bytes - at : comm->room;
    memcpy(static_cast<char*>(data) + at, comm->pair_slot(peer, comm->rank), part);
    taken.fetch_add(1);
  }
  return SUCCESS;
}
}  // namespace

API HcclResult HcclGetRootInfo(void* info) {
  memset(info, 0, ROOT_INFO_BYTES);
  auto stamp = static_cast<unsigned long long>(now_ms() * 1e6);
  snprintf(static_cast<char*>(info), 128, "emulated_hccl.%d.%llx", getpid(), stamp);
  return SUCCESS;
}
API HcclResult HcclCommInitRootInfo(uint32_t ranks, const void* info, uint32_t rank, void** comm) {
  TRACE();
  return open_communicator(ranks, static_cast<const char*>(info), rank, comm);
}
API HcclResult HcclCommInitRootInfoConfig(uint32_t ranks, const void* info, uint32_t rank, const void*, void** comm) {
  TRACE();
  return open_communicator(ranks, static_cast<const char*>(info), rank, comm);
}
API void HcclCommConfigInit(void*) {}
API uint32_t HcclGetCommConfigCapability() { return 5; }
API HcclResult HcclCommDestroy(void* handle) {
  TRACE();
  Communicator* comm = of(handle);
  munmap(comm->shared, comm->bytes);
  delete comm;
  return SUCCESS;
}
API HcclResult HcclGetCommName(void* comm, char* name) {
  strncpy(name, of(comm)->name.c_str(), 127);
  return SUCCESS;
}
API HcclResult HcclGetCommAsyncError(void*, HcclResult* error) {
  *error = SUCCESS;
  return SUCCESS;
}
API const char* HcclGetErrorString(HcclResult code) {
  return code == TIMED_OUT ? "a rank did not come in HCCL_EXEC_TIMEOUT seconds" : "emulated HCCL";
}
API HcclResult HcclGetRankSize(void* comm, uint32_t* ranks) {
  *ranks = of(comm)->ranks;
  return SUCCESS;
}
API HcclResult HcclGetRankId(void* comm, uint32_t* rank) {
  *rank = of(comm)->rank;
  return SUCCESS;
}
API HcclResult HcclSetConfig(int, int) { return SUCCESS; }

API HcclResult HcclAllReduce(void* from, void* to, uint64_t count, int type, int operation, void* comm, void* stream) {
  TRACE();
  return submit(stream, [=] { return all_reduce(of(comm), from, to, count, type, operation, true); });
}
API HcclResult HcclReduce(void* from, void* to, uint64_t count, int type, int operation, uint32_t root, void* comm,
                          void* stream) {
  TRACE();
  bool keep = of(comm)->rank == root;
  return submit(stream, [=] { return all_reduce(of(comm), from, to, count, type, operation, keep); });
}
API HcclResult HcclBroadcast(void* data, uint64_t count, int type, uint32_t root, void* comm, void* stream) {
  TRACE();
  return submit(stream, [=] { return broadcast(of(comm), data, count * hccl_width(type), root); });
}
API HcclResult HcclAllGather(void* from, void* to, uint64_t count, int type, void* comm, void* stream) {
  TRACE();
  return submit(stream, [=] { return all_gather(of(comm), from, to, count * hccl_width(type)); });
}
API HcclResult HcclReduceScatter(void* from, void* to, uint64_t count, int type, int operation, void* comm, void* stream) {
  TRACE();
  return submit(stream, [=] { return reduce_scatter(of(comm), from, to, count, type, operation); });
}
API HcclResult HcclScatter(void* from, void* to, uint64_t count, int type, uint32_t root, void* comm, void* stream) {
  TRACE();
  return submit(stream, [=] { return scatter(of(comm), from, to, count * hccl_width(type), root); });
}
API HcclResult HcclBarrier(void* comm, void* stream) {
  TRACE();
  return submit(stream, [=] { return meet(of(comm)) ? SUCCESS : TIMED_OUT; });
}
API HcclResult HcclSend(void* data, uint64_t count, int type, uint32_t peer, void* comm, void* stream) {
  TRACE();
  return submit(stream, [=] { return send(of(comm), data, count * hccl_width(type), peer); });
}
API HcclResult HcclRecv(void* data, uint64_t count, int type, uint32_t peer, void* comm, void* stream) {
  TRACE();
  return submit(stream, [=] { return receive(of(comm), data, count * hccl_width(type), peer); });
}
