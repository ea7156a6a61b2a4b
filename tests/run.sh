#!/usr/bin/env bash
# Sets up what the tests need, then runs the linters and the suite.
#
#   bash tests/run.sh [--full] [--no-setup] [pytest arguments]
#
# Exit status: 0 when everything passed; 1 when a linter or a test failed, or no test was executed; otherwise that of
# the set-up step that failed.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: bash tests/run.sh [--full] [--no-setup] [pytest arguments]

  --full       also run the tests marked `long`: every patch with and without, every launcher and mode
  --no-setup   use the environment as it stands: do not run setup_env.sh, do not install test packages
  --help       this text

Everything else goes to pytest, for example:  bash tests/run.sh tests/test_static_repo.py -k lines
TEXT
}

full=0
with_setup=1
pytest_args=()
for arg in "$@"; do
  case "$arg" in
    --full) full=1 ;;
    --no-setup) with_setup=0 ;;
    -h | --help) usage && exit 0 ;;
    *) pytest_args+=("$arg") ;;
  esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
started=$SECONDS

# Where the source of diffusers is out of reach, set-up does without it, and the tests marked `upstream` are skipped.
[ "$with_setup" -eq 0 ] || bash setup_env.sh --device=cpu

PYTHON=python3
# shellcheck source=sd3/launch/python.sh
. sd3/launch/python.sh
find_python
if [ "$with_setup" -eq 1 ]; then
  "$PYTHON" -m pip install --quiet --disable-pip-version-check -r tests/requirements_tests.txt
fi
bin="$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')"
export PATH="$bin:$PATH"

# Tiny models gain nothing from threads, and threads that wait for each other on busy cores cost minutes.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

echo "== ruff"
ruff_status=0
"$PYTHON" -m ruff check . || ruff_status=$?

echo "== shellcheck"
mapfile -t scripts < <(find . \( -path ./build -o -path ./logs -o -path ./.venv -o -path ./.git \) -prune -o \
  -name '*.sh' -print | sort)
shellcheck_status=0
"$bin/shellcheck" -x "${scripts[@]}" .ci/run || shellcheck_status=$?
[ "$shellcheck_status" -ne 0 ] || echo "${#scripts[@]} scripts and .ci/run are clean."

echo "== pytest"
mkdir -p build/tests
rm -f build/tests/junit.xml
[ "$full" -eq 0 ] || pytest_args+=(--full)
pytest_status=0
# A file's tests stay together: they share what was trained for them. (nproc would take OMP_NUM_THREADS for the cores.)
workers="$(env -u OMP_NUM_THREADS nproc)"
"$PYTHON" -m pytest --numprocesses="$((workers < 4 ? workers : 4))" --dist=loadfile \
  --junitxml=build/tests/junit.xml --durations=10 "${pytest_args[@]}" || pytest_status=$?

echo "== summary ($((SECONDS - started)) s)"
[ "$ruff_status" -eq 0 ] || echo "ruff: failed"
[ "$shellcheck_status" -eq 0 ] || echo "shellcheck: failed"
# Counts the tests that were executed, says what was skipped and why, and fails where nothing was executed.
summary_status=0
"$PYTHON" tests/summary.py build/tests/junit.xml || summary_status=$?
if [ "$((ruff_status + shellcheck_status + pytest_status + summary_status))" -ne 0 ]; then
  exit 1
fi
