# shellcheck shell=bash
# Environment of a training run. What the user exported wins; what stands here is the default.
#
#   set_training_env DEVICE
#
# The Ascend variables are those of the source document, and HCCL_EXEC_TIMEOUT. Off an NPU only the last two mean
# anything.
ASCEND_TABLE='ASCEND_SLOG_PRINT_TO_STDOUT|0|0 or 1|print the log to the screen: 0 off, 1 on
ASCEND_GLOBAL_LOG_LEVEL|3|0 to 4|0 debug, 1 info, 2 warning, 3 error, 4 none
ASCEND_GLOBAL_EVENT_ENABLE|0|0 or 1|event log: 0 off, 1 on
TASK_QUEUE_ENABLE|2|0 to 2|operators are handed over by a queue: 0 off, 1 level 1, 2 level 2
COMBINED_ENABLE|1|0 or 1|joins two operators on non-contiguous tensors: 0 off, 1 on
HCCL_WHITELIST_DISABLE|1|0 or 1|communication whitelist: 0 on, 1 off
CPU_AFFINITY_CONF|1|0 to 2|binds tasks to cores: 0 off, 1 coarse, 2 fine; more may follow a comma
HCCL_CONNECT_TIMEOUT|1200|120 to 7200|seconds that ranks wait for each other to connect
HCCL_EXEC_TIMEOUT|1800|0 to 2147483647|seconds a collective may wait for a slow rank, such as one that paints a validation
ACLNN_CACHE_LIMIT|100000|1 to 10000000|operators whose information is cached on the host
PYTORCH_NPU_ALLOC_CONF|expandable_segments:True||behaviour of the memory allocator
TOKENIZERS_PARALLELISM|false|true or false|threads in the tokenizers
OMP_NUM_THREADS|1|1 to 1024|threads of the CPU side of each process'

set_training_env() {
  local device="$1" name default range meaning value
  while IFS='|' read -r name default range meaning; do
    case "$device:$name" in
      npu:*|*:TOKENIZERS_PARALLELISM|*:OMP_NUM_THREADS) ;;
      *) continue ;;
    esac
    value="${!name:-$default}"
    in_range "$value" "$range" || {
      echo "$name=$value is out of range; expected $range ($meaning). Export another value or unset it." >&2
      return 2
    }
    export "$name=$value"
  done <<<"$ASCEND_TABLE"
}

# in_range VALUE "A to B" | "A or B" | "": whether VALUE, up to a comma, fits.
in_range() {
  local value="${1%%,*}" least most
  case "$2" in
    "") return 0 ;;
    *" or "*) [ "$1" = "${2%% or *}" ] || [ "$1" = "${2##* or }" ] ;;
    *)
      least="${2%% to *}"; most="${2##* to }"
      [[ $value =~ ^[0-9]{1,10}$ ]] && [ "$((10#$value))" -ge "$least" ] && [ "$((10#$value))" -le "$most" ] ;;
  esac
}
