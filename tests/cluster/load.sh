#!/usr/bin/env bash
# load.sh ARCHIVE: the image in ARCHIVE into every node. A node that has it already costs nothing.
set -euo pipefail
. "$(dirname "$0")/names.sh"
ARCHIVE=$(realpath "$1")
one_at_a_time "$@"

import() {
  ctr --address "$(containerd_socket "$1")" --namespace k8s.io images import "$ARCHIVE" >/dev/null && echo "$hash" >"$STATE/$1/$loaded"
}

[ -e "$STATE/up" ] || die "no cluster runs: make cluster"
hash=$(sha256sum <"$ARCHIVE")
loaded=loaded-$(basename "$ARCHIVE")
imports=()
for node in $(running_nodes); do
  [ "$(cat "$STATE/$node/$loaded" 2>/dev/null)" = "$hash" ] && continue
  import "$node" &
  imports+=($!)
done
for process in "${imports[@]}"; do wait "$process" || die "an import failed"; done
echo "loaded into ${#imports[@]} of $(running_nodes | wc -l) nodes; the others had it"
