# shellcheck shell=bash
# find_python: sets PYTHON to the interpreter that has the project's packages. Sourced by launchers and tests.

PROJECT_DIR="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

# The user's SD3_PYTHON; else the venv that set-up remembered; else the current python3 if it has what is needed.
find_python() {
  local venv
  if [ -n "${SD3_PYTHON:-}" ]; then
    PYTHON="$SD3_PYTHON"
    command -v "$PYTHON" >/dev/null 2>&1 && return 0
    echo "SD3_PYTHON=$SD3_PYTHON is not a program; name a Python interpreter or unset it." >&2
    return 3
  fi
  venv="$PROJECT_DIR/.venv"
  [ ! -s "$PROJECT_DIR/build/venv.path" ] || venv="$(head -n 1 "$PROJECT_DIR/build/venv.path")"
  PYTHON="$venv/bin/python"
  [ ! -x "$PYTHON" ] || return 0
  PYTHON="$(command -v python3 || true)"
  if [ -n "$PYTHON" ] && "$PYTHON" -c 'import importlib.util as u, sys
sys.exit(any(u.find_spec(name) is None for name in ("torch", "accelerate", "diffusers")))'; then
    return 0
  fi
  echo "No Python with the project's packages was found (looked at $venv and python3); run: bash $PROJECT_DIR/setup_env.sh" >&2
  return 3
}
