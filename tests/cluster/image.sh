#!/usr/bin/env bash
# image.sh NAME ARCHIVE BINARY...: an image of nothing but static binaries; it runs the first. An ARCHIVE newer than they are is kept.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
NAME=$1 ARCHIVE=$2
shift 2

current() {
  local binary
  for binary in "$@"; do [ "$ARCHIVE" -nt "$binary" ] || return 1; done
}

current "$@" && exit
context=$(mktemp -d "$(dirname "$ARCHIVE")/image.XXXXXX")
trap 'rm -rf "$context"' EXIT
cp -l "$@" "$context"
printf 'FROM scratch\nCOPY * /\nUSER 65532:65532\nENTRYPOINT ["/%s"]\n' "$(basename "$1")" >"$context/.Dockerfile"
echo '.*' >"$context/.dockerignore"
"$HERE/buildah.sh" build --quiet --file "$context/.Dockerfile" --tag "$NAME" "$context" >/dev/null
rm -f "$ARCHIVE" # buildah adds to an archive, but does not replace it
"$HERE/buildah.sh" push --quiet "$NAME" "docker-archive:$ARCHIVE:$NAME"
"$HERE/buildah.sh" rmi "$NAME" >/dev/null
