# shellcheck shell=bash
# CANN's environment on an NPU machine. Sourced by setup_env.sh and the launchers.

# npu_device_there: is a card visible? A container may have been given any of them, not the first.
npu_device_there() { compgen -G '/dev/davinci[0-9]*' >/dev/null; }

# cann_set_env: print the path of CANN's set_env.sh: CANN_SET_ENV if the user exported it, else its usual places.
cann_set_env() {
  local place
  if [ -n "${CANN_SET_ENV:-}" ]; then
    if [ -r "$CANN_SET_ENV" ]; then printf '%s\n' "$CANN_SET_ENV"; return 0; fi
    echo "CANN_SET_ENV=$CANN_SET_ENV cannot be read; name CANN's set_env.sh." >&2
    return 3
  fi
  # ASCEND_TOOLKIT_HOME is .../ascend-toolkit/latest or .../cann, with set_env.sh in it or one above.
  for place in ${ASCEND_TOOLKIT_HOME:+"$ASCEND_TOOLKIT_HOME"} ${ASCEND_TOOLKIT_HOME:+"$ASCEND_TOOLKIT_HOME/.."} \
    "${CANN_ROOT:-/usr/local/Ascend}/ascend-toolkit" "${CANN_ROOT:-/usr/local/Ascend}/cann"; do
    if [ -r "$place/set_env.sh" ]; then printf '%s\n' "$place/set_env.sh"; return 0; fi
  done
  echo "CANN's set_env.sh was not found (looked in ASCEND_TOOLKIT_HOME=${ASCEND_TOOLKIT_HOME:-unset}," \
    "${CANN_ROOT:-/usr/local/Ascend}/ascend-toolkit and ${CANN_ROOT:-/usr/local/Ascend}/cann);" \
    "install CANN or export CANN_SET_ENV=/path/to/set_env.sh." >&2
  return 3
}

# source_cann: put CANN into this shell's environment. Its script is written for neither set -u nor set -e.
source_cann() {
  local script options
  script="$(cann_set_env)" || return 3
  options="$-"
  set +eu
  # shellcheck disable=SC1090  # found at run time
  . "$script"
  case "$options" in *e*) set -e ;; esac
  case "$options" in *u*) set -u ;; esac
}
