# shellcheck shell=bash
# Makes the venv and installs the pinned packages. Sourced by setup_env.sh, which defines die and the options.

DIFFUSERS_RELEASE=0.33.1  # the one nearest to the pin, where there is no checkout

# choose_python: sets BASE_PYTHON, refusing versions the stack has no wheels for.
choose_python() {
  local version newest=12
  [ "$STACK" = default ] || newest=11
  if [ "$USE_VENV" -eq 0 ] && [ -z "$PYTHON_EXE" ]; then PYTHON_EXE="$(command -v python3 || command -v python || true)"; fi
  if [ -z "$PYTHON_EXE" ]; then
    for PYTHON_EXE in python3 python3.12 python3.11 python3.10; do
      command -v "$PYTHON_EXE" >/dev/null 2>&1 && fits_stack "$newest" && break
    done
  fi
  command -v "$PYTHON_EXE" >/dev/null 2>&1 || die "--python=$PYTHON_EXE is not a program; name a Python 3.10 to 3.$newest." 2
  BASE_PYTHON="$(command -v "$PYTHON_EXE")"
  version="$("$BASE_PYTHON" -c 'import platform; print(platform.python_version())')" || die "$BASE_PYTHON does not run." 2
  fits_stack "$newest" ||
    die "Python $version ($BASE_PYTHON) is not supported by the $STACK stack; use Python 3.10 to 3.$newest, for example --python=python3.$newest." 2
}

fits_stack() {
  "$(command -v "$PYTHON_EXE")" -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, $1))" 2>/dev/null
}

# make_venv: sets PYTHON to the interpreter that gets the packages.
make_venv() {
  if [ "$USE_VENV" -eq 0 ]; then
    PYTHON="$BASE_PYTHON"
    "$PYTHON" -c 'import os, sys; sys.exit(sys.prefix == sys.base_prefix and "CONDA_PREFIX" not in os.environ)' ||
      die "--no-venv: $PYTHON is no conda or venv environment; activate one, or leave --no-venv out." 2
    return 0
  fi
  PYTHON="$VENV/bin/python"
  if [ -x "$PYTHON" ]; then
    PYTHON_EXE="$PYTHON"
    fits_stack "$([ "$STACK" = default ] && echo 12 || echo 11)" ||
      die "$VENV was made with $("$PYTHON" -V 2>&1), which the $STACK stack does not support; remove it or name another with --venv." 2
  elif [ -e "$VENV" ] && [ ! -e "$VENV/.sd3-setup" ] && [ -n "$(ls -A "$VENV" 2>/dev/null)" ]; then
    die "$VENV exists and is no virtual environment; name another with --venv." 2
  fi
  if [ ! -x "$PYTHON" ] || ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
    mkdir -p "$VENV"
    touch "$VENV/.sd3-setup"  # ours, also when killed half-way
    "$BASE_PYTHON" -m venv --clear "$VENV" || die "$BASE_PYTHON could not make a virtual environment at $VENV; on Debian and Ubuntu install python3-venv." 3
    touch "$VENV/.sd3-setup"
  fi
}

requirements_file() {
  [ "$STACK" = default ] && echo "$PROJECT_DIR/requirements_sd3.txt" || echo "$PROJECT_DIR/requirements_sd3_torch2.1.txt"
}

pip_install() {
  "$PYTHON" -m pip install --disable-pip-version-check --no-input "$@" ||
    die "pip could not install ${*: -1} (its message is above); check the network or PIP_INDEX_URL and run set-up again." 3
}

# kept_torch: versions of a torch, and torch_npu, that the environment already has and that are to stay.
kept_torch() {
  "$PYTHON" - "$DEVICE" <<'END'
import sys
from importlib.metadata import PackageNotFoundError, version
found = {}
for name in ("torch", "torchvision", "torch_npu"):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
if "torch" in found and (sys.argv[1] != "npu" or "torch_npu" in found):
    print(" ".join(f"{name}=={value}" for name, value in found.items()))
END
}

# check_pair KEPT: torch and torch_npu must be of one version.
check_pair() {
  local torch npu
  torch="$(sed -n 's/.*torch==\([0-9.]*[0-9]\).*/\1/p' <<<"$1")"
  npu="$(sed -n 's/.*torch_npu==\([0-9]*\.[0-9]*\.[0-9]*\).*/\1/p' <<<"$1")"
  [ -z "$npu" ] || [ "$torch" = "$npu" ] ||
    die "this environment holds torch $torch beside torch_npu $npu, which do not match; install a pair of one version, or leave --no-venv out." 2
}

install_stack() {
  local requirements kept="" stamp want npu_line rest=()
  requirements="$(requirements_file)"
  stamp="$("$PYTHON" -c 'import sys; print(sys.prefix)')/.sd3-stack"
  want="$(cat "$requirements" "${BASH_SOURCE[0]}" | git hash-object --stdin) $DEVICE $PACKAGES_ONLY $("$PYTHON" -V 2>&1)"
  if [ "$FORCE" -eq 0 ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
    echo "The packages of $(basename "$requirements") are already installed."
    return 0
  fi
  rm -f "$stamp"
  [ "$USE_VENV" -eq 1 ] || kept="$(kept_torch)"
  mapfile -t rest < <(grep -vE '^(#|torch==|torchvision==|deepspeed==|$)' "$requirements")
  read -ra npu_line <<<"$(sed -n 's/^# npu: //p' "$requirements")"
  if [ -n "$kept" ]; then
    check_pair "$kept"
    echo "Keeping $kept of this environment."
    local constraints
    constraints="$(mktemp "$PROJECT_DIR/build/.constraints.XXXXXX")"
    tr ' ' '\n' <<<"$kept" >"$constraints"
    [ "$DEVICE" != npu ] || pip_install -c "$constraints" "${npu_line[@]:1}"
    pip_install -c "$constraints" "${rest[@]}"
    # torchvision goes with torch; where it is missing pip may take only one that this torch allows.
    pip_install -c "$constraints" torchvision
    DS_BUILD_OPS=0 pip_install -c "$constraints" --no-build-isolation "$(grep '^deepspeed==' "$requirements")"
    rm -f "$constraints"
    [ "$(kept_torch)" = "$kept" ] || [[ " $(kept_torch) " == *" $(cut -d' ' -f1 <<<"$kept") "* ]] ||
      die "torch changed from $kept to $(kept_torch) while the rest was installed." 1
  else
    mapfile -t torch_lines < <(grep -E '^(torch|torchvision)==' "$requirements")
    pip_install "${torch_lines[@]}"
    if [ "$DEVICE" = npu ]; then
      # The x86_64 wheel of torch_npu asks for torch X+cpu, which the package index does not have.
      pip_install --no-deps "${npu_line[0]}"
      pip_install "${npu_line[@]:1}"
    fi
    pip_install "${rest[@]}"
    DS_BUILD_OPS=0 pip_install --no-build-isolation "$(grep '^deepspeed==' "$requirements")"
  fi
  if [ "$PACKAGES_ONLY" -eq 1 ]; then
    pip_install --no-deps "diffusers==$DIFFUSERS_RELEASE"
  else
    pip_install --no-deps -e "$PROJECT_DIR/build/diffusers"
  fi
  printf '%s\n' "$want" >"$stamp.new"
  mv "$stamp.new" "$stamp"
}

# The last word: import everything, and show what there is.
summary() {
  PYTHONPATH="$PROJECT_DIR" PYTHONWARNINGS=ignore DS_ACCELERATOR="$([ "$DEVICE" = cpu ] && echo cpu || true)" \
    "$PYTHON" "$PROJECT_DIR/sd3/common/setup_summary.py" "$@" || die "the packages were installed but cannot all be imported (see above)." 3
}
