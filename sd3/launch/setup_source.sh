# shellcheck shell=bash
# Gets the pinned diffusers source, proves it by its ids, patches it, and puts it at build/diffusers. Sourced by
# setup_env.sh, which defines die. Everything is made aside and renamed, so a kill leaves the old or the new checkout.

# shellcheck source=patches/lib.sh
. "$PROJECT_DIR/patches/lib.sh"
CHECKOUT="$PROJECT_DIR/build/diffusers"
OUT_OF_REACH=""    # why the pin's own address gave nothing
MADE_BY=sd3-queue  # in the checkout's .git: the ids of the queue that it was patched by

other_sources() {
  printf '%s' "Give the source another way: --diffusers-src=URL of a mirror, --diffusers-src=DIR of a local clone or" \
    " bare repository, or --diffusers-src=FILE, a .tar.gz or .zip of the tree at commit $UPSTREAM_COMMIT."
}

# Refuse an archive that would write outside its directory, then unpack it into $2.
unpack() {
  local archive="$1" into="$2" members
  case "$archive" in
    *.zip)
      command -v unzip >/dev/null 2>&1 || die "$archive: unpacking a .zip needs the program unzip; install it or use a .tar.gz." 3
      members="$(unzip -Z1 "$archive" 2>/dev/null)" || die "$archive is not a readable .zip archive." 2
      ;;
    *.tar.gz|*.tgz) members="$(tar -tzf "$archive" 2>/dev/null)" || die "$archive is not a readable .tar.gz archive." 2 ;;
    *) die "--diffusers-src=$archive is a file that is neither .tar.gz nor .zip." 2 ;;
  esac
  if grep -qE '(^|/)\.\.(/|$)|^/' <<<"$members"; then
    die "$archive holds a member that would be written outside its directory; nothing was unpacked." 2
  fi
  # A link that leads out, then a file written through it, is the other way to escape.
  case "$archive" in
    *.zip) ! grep -q '^l' <<<"$(unzip -Z "$archive")" || die "$archive holds links, which the pinned tree does not." 2
      unzip -q "$archive" -d "$into" ;;
    *) ! grep -q '^[^-d]' <<<"$(tar -tvzf "$archive")" || die "$archive holds links or special files, which the pinned tree does not." 2
      tar -xzf "$archive" -C "$into" --no-same-owner ;;
  esac || die "$archive could not be unpacked." 2
}

from_archive() {
  local archive="$1" into="$2" stage entries
  stage="$into.unpacked"
  rm -rf "$stage"; mkdir -p "$stage"
  unpack "$archive" "$stage"
  # Archives hold the tree itself or one folder with the tree in it.
  shopt -s nullglob dotglob
  entries=("$stage"/*)
  shopt -u nullglob dotglob
  [ "${#entries[@]}" -ne 1 ] || [ ! -d "${entries[0]}" ] || stage="${entries[0]}"
  rm -rf "$stage/.git"
  mv "$stage" "$into.tree"
  rm -rf "$into.unpacked" "$into"; mv "$into.tree" "$into"
  queue_git -C "$into" init -q
  # No attribute of the tree or of the user may change a byte on its way into the repository.
  mkdir -p "$into/.git/info"
  printf '* -text -filter -ident -eol -working-tree-encoding\n' >"$into/.git/info/attributes"
  queue_git -C "$into" -c core.excludesFile=/dev/null -c core.fileMode=true add -A -f
  queue_git -C "$into" -c user.name=setup -c user.email=setup@localhost -c commit.gpgSign=false \
    commit -q -m "Tree of $UPSTREAM_COMMIT, from an archive"
}

from_git() {
  local address="$1" into="$2" pack=git-upload-pack errors
  if [ -d "$address" ]; then
    address="$(cd "$address" && pwd)"
    # A local repository may be asked for a commit that no branch of it names.
    pack="git -c uploadpack.allowAnySHA1InWant=true -c safe.directory=* upload-pack"
  fi
  mkdir -p "$into"
  queue_git -C "$into" init -q
  if ! errors="$(GIT_TERMINAL_PROMPT=0 GIT_SSH_COMMAND="${GIT_SSH_COMMAND:-ssh -o BatchMode=yes -o ConnectTimeout=20}" \
    queue_git -C "$into" -c http.lowSpeedLimit=1000 -c http.lowSpeedTime=60 \
    fetch -q --depth 1 --no-tags --upload-pack="$pack" "$address" "$UPSTREAM_COMMIT" 2>&1)"; then
    OUT_OF_REACH="commit $UPSTREAM_COMMIT of diffusers cannot be had from $address ($(tail -n 1 <<<"$errors"))."
    return 0
  fi
  queue_git -C "$into" checkout -q --detach FETCH_HEAD
}

# made_by_older_queue: the checkout is, byte for byte, what set-up once made of another pin or another queue.
made_by_older_queue() {
  # Those that queue_source_ok reads, for the time of this function.
  local UPSTREAM_TREE UPSTREAM_FILES record="$CHECKOUT/.git/$MADE_BY"
  [ -r "$record" ] || return 1
  { read -r UPSTREAM_TREE && UPSTREAM_FILES="$(cat)"; } <"$record" || return 1
  queue_source_ok "$CHECKOUT" 2>/dev/null &&
    [ -z "$(queue_git -C "$CHECKOUT" ls-files --others --exclude-standard)" ]
}

# get_source [SOURCE]: make build/diffusers right, or say why not. Where nobody asked for a certain source and none can be
# reached, that is no error: OUT_OF_REACH tells set-up to do without.
get_source() {
  local source="${1:-$UPSTREAM_URL}" aside found wrong
  command -v git >/dev/null 2>&1 || die "git is not installed; install it first." 3
  mkdir -p "$PROJECT_DIR/build"
  rm -rf "$PROJECT_DIR"/build/.diffusers.*
  if [ -e "$CHECKOUT" ] && wrong="$(queue_source_ok "$CHECKOUT" 2>&1)"; then
    echo "build/diffusers already holds the pinned commit with the queue applied."
    return 0
  elif [ -e "$CHECKOUT" ] && made_by_older_queue; then
    echo "build/diffusers was patched by an older queue and is otherwise untouched: making it anew."
  elif [ -e "$CHECKOUT" ] && [ "$FORCE" -eq 0 ]; then
    found="$(queue_git -C "$CHECKOUT" status --porcelain 2>/dev/null | head -n 5 || true)"
    die "build/diffusers is not what set-up makes: ${wrong//$'\n'/ } ${found:+Changed: ${found//$'\n'/; }. }Keep what you need of it and run again with --force to replace it." 2
  fi
  aside="$(mktemp -d "$PROJECT_DIR/build/.diffusers.XXXXXX")/diffusers"
  mkdir "$aside"
  echo "Getting diffusers $UPSTREAM_COMMIT from $source"
  if [ -f "$source" ]; then from_archive "$source" "$aside"; else from_git "$source" "$aside"; fi
  if [ -n "$OUT_OF_REACH" ]; then
    [ -z "${1:-}" ] && [ "$PATCH_ONLY" -eq 0 ] || die "$OUT_OF_REACH $(other_sources)" 3
    rm -rf "$PROJECT_DIR"/build/.diffusers.*
    return 0
  fi
  found="$(queue_git -C "$aside" rev-parse -q --verify 'HEAD^{tree}')"
  [ "$found" = "$UPSTREAM_TREE" ] ||
    die "$source holds tree $found, not $UPSTREAM_TREE of commit $UPSTREAM_COMMIT; it was not used." 2
  queue_verify "$aside" before || die "$source does not hold the pinned files; it was not used." 2
  queue_apply "$aside" || die "the patch queue does not apply; the project's patches/ were changed." 2
  queue_source_ok "$aside" || die "the patched files are not as patches/upstream.env says." 2
  printf '%s\n%s\n' "$UPSTREAM_TREE" "$UPSTREAM_FILES" >"$aside/.git/$MADE_BY"
  if [ -e "$CHECKOUT" ]; then
    mv "$CHECKOUT" "$(dirname "$aside")/replaced"
  fi
  mv "$aside" "$CHECKOUT"
  rm -rf "$PROJECT_DIR"/build/.diffusers.*
  echo "build/diffusers: pinned commit, $(queue_names | wc -l) patches applied, ids checked."
}
