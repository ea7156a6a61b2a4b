// Reductions of HCCL over the slots of all ranks. Half precisions are summed in float32 and rounded once.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "hccl.h"

namespace {
// HcclDataType.
enum { INT8, INT16, INT32, FP16, FP32, INT64, UINT64, UINT8, UINT16, UINT32, FP64, BFP16 };
enum { SUM, PRODUCT, MAXIMUM, MINIMUM };

template <class T>
T combine(T a, T b, int operation) {
  switch (operation) {
    case SUM: return a + b;
    case PRODUCT: return a * b;
    case MAXIMUM: return a > b ? a : b;
    default: return a < b ? a : b;
  }
}

// T is what lies in memory, Wide what the sums are made in.
template <class T, class Wide = T>
bool reduce(void* to, Communicator* comm, size_t count, int operation) {
  auto at = [&](uint32_t rank, size_t i) { return static_cast<Wide>(reinterpret_cast<T*>(comm->slot(rank))[i]); };
  for (size_t i = 0; i < count; i++) {
    Wide sum = at(0, i);
    for (uint32_t rank = 1; rank < comm->ranks; rank++) sum = combine<Wide>(sum, at(rank, i), operation);
    static_cast<T*>(to)[i] = static_cast<T>(sum);
  }
  return true;
}
}  // namespace

size_t hccl_width(int type) {
  switch (type) {
    case INT8:
    case UINT8: return 1;
    case INT16:
    case UINT16:
    case FP16:
    case BFP16: return 2;
    case INT32:
    case UINT32:
    case FP32: return 4;
    default: return 8;
  }
}

// float64 has no case: HCCL's table of data types for reductions is without it.
bool hccl_reduce(void* to, Communicator* comm, size_t count, int type, int operation) {
  switch (type) {
    case INT8: return reduce<int8_t>(to, comm, count, operation);
    case INT16: return reduce<int16_t>(to, comm, count, operation);
    case INT32: return reduce<int32_t>(to, comm, count, operation);
    case INT64: return reduce<int64_t>(to, comm, count, operation);
    case FP32: return reduce<float>(to, comm, count, operation);
    case FP16: return reduce<c10::Half, float>(to, comm, count, operation);
    case BFP16: return reduce<c10::BFloat16, float>(to, comm, count, operation);
    default: return false;
  }
}
