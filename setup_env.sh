#!/usr/bin/env bash
# Everything the project needs: a virtual environment, the pinned packages, and diffusers at the pin with the patch
# queue applied; where its source is out of reach, the nearest release, for the native engine. Safe to run again at any
# time: what is right stays, what is half-done is done again.
set -euo pipefail

PROJECT_DIR="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
DEVICE=auto
STACK=default
VENV="$PROJECT_DIR/.venv"
USE_VENV=1
PYTHON_EXE=""
SOURCE=""
PATCH_ONLY=0
PACKAGES_ONLY=0
FORCE=0

usage() {
  cat <<'END'
Usage: bash setup_env.sh [options]

  --device=auto|npu|cuda|cpu     which accelerator to install for (default auto: npu if there is one, else cuda or cpu)
  --stack=default|torch2.1       package versions: requirements_sd3.txt, or those of the source document
  --venv=DIR                     where the virtual environment goes (default .venv in the project)
  --no-venv                      use the active conda or venv environment; a torch that it has is kept
  --python=EXE                   Python 3.10 to 3.12 to make the environment with (torch2.1: 3.10 or 3.11)
  --diffusers-src=URL|DIR|FILE   another source of diffusers: a mirror, a local clone or bare repository, or a
                                 .tar.gz or .zip of the tree at the pinned commit
  --patch-only                   source and patches only, no Python packages (needs git alone)
  --packages-only                Python packages only, with the diffusers release nearest to the pin in place of the
                                 patched source: enough for inference and for the native engine
  --force                        replace a build/diffusers that was changed; install the packages again
  --help                         this text

Where the source cannot be reached and --diffusers-src was not given, set-up goes on as with --packages-only and says
so at the end.

Exit status: 0 done; 2 a bad option or a source that is not the pinned one; 3 something needed cannot be had.
END
}

die() {
  echo "setup_env.sh: $1" >&2
  exit "$2"
}

without_source() {
  cat <<END

================ NOTE: set up without the source of diffusers ================
${OUT_OF_REACH^}
Installed in its place: the library, diffusers $DIFFUSERS_RELEASE. Inference and evaluation need no more, and launchers
train with the native engine: --engine=native, which --engine=auto now takes.
For the patched scripts (--engine=diffusers) run this again with a network, or with --diffusers-src=URL|DIR|FILE.
==============================================================================
END
}

# A value given as --key=value or --key value.
while [ $# -gt 0 ]; do
  key="${1%%=*}"
  case "$key" in
    --no-venv|--patch-only|--packages-only|--force|--help|-h)
      [ "$key" = "$1" ] || die "$key takes no value." 2 ;;
    --device|--stack|--venv|--python|--diffusers-src)
      if [ "$key" = "$1" ]; then
        [ $# -ge 2 ] || die "$key needs a value." 2
        value="$2"; shift
      else
        value="${1#*=}"
      fi
      [ -n "$value" ] || die "$key needs a value." 2 ;;
  esac
  case "$key" in
    --device) DEVICE="$value" ;;
    --stack) STACK="$value" ;;
    --venv) VENV="$value" ;;
    --no-venv) USE_VENV=0 ;;
    --python) PYTHON_EXE="$value" ;;
    --diffusers-src) SOURCE="$value" ;;
    --patch-only) PATCH_ONLY=1 ;;
    --packages-only) PACKAGES_ONLY=1 ;;
    --force) FORCE=1 ;;
    --help|-h) usage; exit 0 ;;
    *) die "unknown option $1; see --help." 2 ;;
  esac
  shift
done
case "$DEVICE" in auto|npu|cuda|cpu) ;; *) die "--device=$DEVICE is not known; use auto, npu, cuda or cpu." 2 ;; esac
case "$STACK" in default|torch2.1) ;; *) die "--stack=$STACK is not known; use default or torch2.1." 2 ;; esac
[ "$PATCH_ONLY$PACKAGES_ONLY" != 11 ] || die "--patch-only and --packages-only exclude each other." 2
case "$VENV" in /*) ;; *) VENV="$PWD/$VENV" ;; esac

# shellcheck source=sd3/launch/cann.sh
. "$PROJECT_DIR/sd3/launch/cann.sh"
# shellcheck source=sd3/launch/setup_source.sh
. "$PROJECT_DIR/sd3/launch/setup_source.sh"
# shellcheck source=sd3/launch/setup_stack.sh
. "$PROJECT_DIR/sd3/launch/setup_stack.sh"

# One set-up at a time. The lock goes with the process, however it ends.
mkdir -p "$PROJECT_DIR/build"
exec 9>"$PROJECT_DIR/build/.setup.lock"
if command -v flock >/dev/null 2>&1; then
  flock -n 9 || die "another set-up is running in $PROJECT_DIR; wait for it to end." 2
fi

if [ "$DEVICE" = auto ]; then
  if npu_device_there || command -v npu-smi >/dev/null 2>&1; then DEVICE=npu
  elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then DEVICE=cuda
  else DEVICE=cpu; fi
fi

# What can be refused is refused before anything is fetched.
if [ "$PATCH_ONLY" -eq 0 ]; then
  choose_python
  if [ "$DEVICE" = npu ]; then source_cann || exit 3; fi
fi
[ "$PACKAGES_ONLY" -eq 1 ] || get_source "$SOURCE"
[ "$PATCH_ONLY" -eq 0 ] || exit 0
[ -z "$OUT_OF_REACH" ] || PACKAGES_ONLY=1
make_venv
install_stack
"$PYTHON" -c 'import sys; print(sys.prefix)' >"$PROJECT_DIR/build/venv.path.new"
mv "$PROJECT_DIR/build/venv.path.new" "$PROJECT_DIR/build/venv.path"
if [ "$PACKAGES_ONLY" -eq 0 ]; then
  summary "$DEVICE" "$UPSTREAM_COMMIT" "$(queue_names | wc -l) applied" "diffusers, native"
else
  summary "$DEVICE" "none: release $DIFFUSERS_RELEASE" "none" "native"
fi
[ -z "$OUT_OF_REACH" ] || without_source >&2
