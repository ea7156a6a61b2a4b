// A communicator of the emulated HCCL, and the reductions over what its ranks show.
#pragma once
#include <atomic>
#include <cstdint>
#include <string>

typedef int HcclResult;
constexpr size_t MAX_RANKS = 16, HEADER_BYTES = 65536;

// The head of the file that all ranks map.
struct Shared {
  std::atomic<uint32_t> arrived, phase;
  std::atomic<uint64_t> sent[MAX_RANKS][MAX_RANKS], taken[MAX_RANKS][MAX_RANKS];  // messages, from and to
};
static_assert(sizeof(Shared) <= HEADER_BYTES, "the head has to fit before the slots");

struct Communicator {
  std::string name;
  uint32_t ranks, rank;
  Shared* shared;
  char* slots;
  size_t room;   // bytes of a slot
  size_t bytes;  // of the whole file

  char* slot(uint32_t of) { return slots + room * of; }
  char* pair_slot(uint32_t from, uint32_t to) { return slots + room * (ranks + from * ranks + to); }
};

// Bytes of an element of HcclDataType.
size_t hccl_width(int type);
// Reduces `count` elements of all ranks' slots by HcclReduceOp (sum, product, max, min); false for a type it has not.
bool hccl_reduce(void* to, Communicator* comm, size_t count, int type, int operation);
