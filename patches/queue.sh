#!/usr/bin/env bash
# Maintainer's tool for the patch queue. Nobody needs it to use the project.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=patches/lib.sh
. "$ROOT/patches/lib.sh"
WORK="$ROOT/build/queue"
PIN_REF=refs/heads/pin

usage() {
  cat <<'END'
Usage: bash patches/queue.sh COMMAND

  check            prove the queue: every patch applies to the pin in order without an offset, the ids in
                   upstream.env are true, and any one patch can be left out
  open             lay the queue out as commits, one a patch, in the git repository build/queue
  save             write the commits of build/queue back as patches/*.patch, series and the ids in upstream.env
  refresh          open and save: new line numbers and ids after a patch file was edited by hand
  without NAME DIR write the patched files to DIR as they are with the patch NAME left out ('none': all applied)

To change a patch: open; in build/queue change the commit ('git commit --fixup', 'git rebase -i pin'); save; check.
The first line of a commit's message says what breaks without it and the trailer "Patch:" names the file.
END
}

die() { echo "patches/queue.sh: $1" >&2; exit "${2:-2}"; }

# Where the pristine files come from: the checkout that setup_env.sh made, which holds the pin's objects.
pristine_source() {
  local checkout="$ROOT/build/diffusers"
  [ "$(queue_git -C "$checkout" rev-parse -q --verify 'HEAD^{tree}' 2>/dev/null)" = "$UPSTREAM_TREE" ] ||
    die "no checkout of the pin at $checkout; run 'bash setup_env.sh --patch-only' first." 3
  printf '%s\n' "$checkout"
}

# lay_out DIR: the pristine versions of the patched files, and nothing else, below DIR.
lay_out() {
  local source path before after
  source="$(pristine_source)" || exit $?
  while read -r path before after; do
    [ -n "$path" ] || continue
    mkdir -p "$1/$(dirname "$path")"
    queue_git -C "$source" cat-file blob "HEAD:$path" >"$1/$path"
  done <<<"$UPSTREAM_FILES"
}

# The prose above the first "diff --git" of a patch.
patch_header() { sed '/^diff --git /,$d' "$PATCHES_DIR/$1"; }

scratch_git() {
  queue_git -C "$WORK" -c user.name=queue -c user.email=queue@localhost -c commit.gpgSign=false "$@"
}

cmd_open() {
  local name
  [ ! -e "$WORK" ] || [ -z "$(scratch_git status --porcelain)" ] ||
    die "$WORK has uncommitted changes; commit or drop them first."
  rm -rf "$WORK"
  mkdir -p "$WORK"
  lay_out "$WORK"
  scratch_git init -q
  scratch_git checkout -q -b queue
  scratch_git add -A
  scratch_git commit -q -m "pin $UPSTREAM_COMMIT"
  scratch_git update-ref "$PIN_REF" HEAD
  while IFS= read -r name; do
    (cd "$WORK" && queue_git apply --whitespace=nowarn -C1 --recount "$PATCHES_DIR/$name") ||
      die "$name does not apply; the patches before it are in $WORK." 1
    scratch_git add -A
    { patch_header "$name"; printf 'Patch: %s\n' "$name"; } | scratch_git commit -q --cleanup=verbatim -F -
  done < <(queue_names)
  echo "The queue lies in $WORK as $(scratch_git rev-list --count pin..HEAD) commits."
}

cmd_save() {
  local commit name path before after staged series ids
  [ -d "$WORK/.git" ] || die "there is no $WORK; run 'bash patches/queue.sh open' first."
  [ -z "$(scratch_git status --porcelain)" ] || die "$WORK has uncommitted changes; commit them first."
  staged="$(mktemp -d "$PATCHES_DIR/.save.XXXXXX")"
  # shellcheck disable=SC2064  # expanded now on purpose: the variable is local
  trap "rm -rf '$staged'" EXIT
  while IFS= read -r commit; do
    name="$(scratch_git log -1 --format=%B "$commit" | sed -n 's/^Patch: //p')"
    case "$name" in
      ""|*/*) die "commit $commit has no 'Patch: NAME.patch' line in its message." 1 ;;
    esac
    [ ! -e "$staged/$name" ] || die "two commits name the patch $name." 1
    {
      scratch_git log -1 --format=%B "$commit" | sed '/^Patch: /,$d'
      scratch_git diff --full-index "-U${QUEUE_CONTEXT:-2}" "$commit^" "$commit"
    } >"$staged/$name"
    grep -qxF "$name" <(queue_names) || echo "$name" >>"$staged/new"
    echo "$name" >>"$staged/order"
  done < <(scratch_git rev-list --reverse "$PIN_REF..HEAD")
  # series keeps its comments while the order is the same; else the names are written anew below its first lines.
  series="$PATCHES_DIR/series"
  if ! diff -q <(queue_names) "$staged/order" >/dev/null 2>&1; then
    { sed '/^[^#]/,$d' "$series"; cat "$staged/order"; } >"$staged/series"
    mv "$staged/series" "$series"
    echo "series was written anew: put its group comments back." >&2
  fi
  while read -r path before after; do
    [ -n "$path" ] || continue
    after="$(scratch_git rev-parse "HEAD:$path")"
    ids="${ids:-}$path $before $after"$'\n'
  done <<<"$UPSTREAM_FILES"
  { sed '/^UPSTREAM_FILES=/,$d' "$PATCHES_DIR/upstream.env"; printf 'UPSTREAM_FILES="\n%s"\n' "$ids"; } >"$staged/env"
  while IFS= read -r name; do mv "$staged/$name" "$PATCHES_DIR/$name"; done <"$staged/order"
  mv "$staged/env" "$PATCHES_DIR/upstream.env"
  echo "Saved $(wc -l <"$staged/order") patches and the ids of the files they change."
}

cmd_check() {
  local scratch name
  scratch="$(mktemp -d)"
  # shellcheck disable=SC2064
  trap "rm -rf '$scratch'" EXIT
  lay_out "$scratch/all"
  queue_verify "$scratch/all" before || die "the pin's files do not have the ids upstream.env gives them." 1
  queue_apply "$scratch/all" || exit 1
  queue_verify "$scratch/all" after || die "run 'bash patches/queue.sh refresh'." 1
  while IFS= read -r name; do
    [ -n "$(patch_header "$name")" ] || die "$name has no header." 1
    lay_out "$scratch/without-$name"
    queue_apply "$scratch/without-$name" --without "$name" || die "the queue needs $name: later patches stand on it." 1
  done < <(queue_names)
  for name in "$PATCHES_DIR"/*.patch; do
    [ ! -e "$name" ] || grep -qxF "$(basename "$name")" <<<"$(queue_names)" || die "$name is not in series." 1
  done
  echo "The queue is true: $(queue_names | wc -l) patches, any one of which can be left out."
}

cmd_without() {
  local name="${1:?}" dir="${2:?}"
  [ ! -e "$dir" ] || die "$dir exists; name a new directory."
  lay_out "$dir"
  if [ "$name" = none ]; then queue_apply "$dir"; else queue_apply "$dir" --without "$name"; fi
}

case "${1:-}" in
  check) cmd_check ;;
  open) cmd_open ;;
  save) cmd_save ;;
  refresh) cmd_open && cmd_save ;;
  without) [ $# -eq 3 ] || die "'without' takes a patch's name and a directory."; cmd_without "$2" "$3" ;;
  -h|--help) usage ;;
  *) usage >&2; exit 2 ;;
esac
