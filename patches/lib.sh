# shellcheck shell=bash
# The patch queue, for whoever sources this file: setup_env.sh, the launchers and patches/queue.sh.
# Needs bash and git alone. Functions return 1 after saying why on stderr.

PATCHES_DIR="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=patches/upstream.env
. "$PATCHES_DIR/upstream.env"

# git as the queue needs it: no line-end conversion, no hooks, and no repository from the caller's environment.
queue_git() {
  env -u GIT_DIR -u GIT_WORK_TREE -u GIT_INDEX_FILE git -c core.autocrlf=false -c core.hooksPath=/dev/null \
    -c core.fileMode=false "$@"
}

# Names of the patches in order, one a line.
queue_names() {
  local line
  while IFS= read -r line || [ -n "$line" ]; do
    line="${line%%#*}"
    line="${line//[[:space:]]/}"
    [ -z "$line" ] || printf '%s\n' "$line"
  done <"$PATCHES_DIR/series"
}

# queue_apply TREE [--without NAME]: apply the queue, in order, to the pristine files in TREE.
# A hunk that lands elsewhere than its header says is an error: the queue no longer describes the pin. Leaving a
# patch out moves the lines of those behind it, so only then are offsets taken.
queue_apply() {
  local tree="$1" without="" name output context=()
  [ "${2:-}" != --without ] || without="${3:?queue_apply --without needs a name}"
  if [ -n "$without" ] && ! grep -qxF "$without" <<<"$(queue_names)"; then
    echo "patches: no patch '$without' in $PATCHES_DIR/series." >&2
    return 1
  fi
  [ -z "$without" ] || context=(-C1)
  while IFS= read -r name; do
    [ "$name" != "$without" ] || continue
    # The ceiling keeps git from taking a repository around TREE for its own: it would then skip TREE's files.
    if ! output="$(cd "$tree" && LC_ALL=C GIT_CEILING_DIRECTORIES="$(dirname "$PWD")" \
      queue_git apply --whitespace=nowarn --verbose "${context[@]}" "$PATCHES_DIR/$name" 2>&1)"; then
      printf '%s\n' "$output" >&2
      echo "patches: $name does not apply to $tree." >&2
      return 1
    fi
    if [ -z "$without" ] && [[ $output == *'(offset '* ]]; then
      printf '%s\n' "$output" >&2
      echo "patches: $name applies to $tree only with an offset; run 'bash patches/queue.sh refresh'." >&2
      return 1
    fi
  done < <(queue_names)
}

# queue_verify TREE before|after: every patched file has the id that upstream.env gives it.
queue_verify() {
  local tree="$1" when="$2" path before after expected actual bad=0
  while read -r path before after; do
    [ -n "$path" ] || continue
    expected="$before"
    [ "$when" = before ] || expected="$after"
    actual="$(queue_git hash-object --no-filters "$tree/$path" 2>/dev/null || echo missing)"
    if [ "$actual" != "$expected" ]; then
      echo "patches: $tree/$path has id $actual, expected $expected ($when the queue)." >&2
      bad=1
    fi
  done <<<"$UPSTREAM_FILES"
  return "$bad"
}

# queue_source_ok TREE: TREE is a git checkout of the pinned tree, its patched files are as after the queue, and no
# other tracked file differs. What is wrong goes to stderr.
queue_source_ok() {
  local tree="$1" actual differing path
  if [ ! -e "$tree/.git" ]; then
    echo "patches: there is no checkout at $tree." >&2
    return 1
  fi
  actual="$(queue_git -C "$tree" rev-parse --verify -q 'HEAD^{tree}' || echo none)"
  if [ "$actual" != "$UPSTREAM_TREE" ]; then
    echo "patches: $tree holds tree $actual, expected $UPSTREAM_TREE (commit $UPSTREAM_COMMIT)." >&2
    return 1
  fi
  queue_verify "$tree" after || return 1
  differing="$(queue_git -C "$tree" diff --name-only HEAD)" || return 1
  while IFS= read -r path; do
    [ -n "$path" ] || continue
    if ! grep -qF "$path " <<<"$UPSTREAM_FILES"; then
      echo "patches: $tree/$path differs from the pinned commit." >&2
      return 1
    fi
  done <<<"$differing"
}
