#!/usr/bin/env bash
# with.sh COMMAND...: COMMAND with a Kubernetes. Where KUBECONFIG is set, that one; else the test cluster with the project's image in
# it, which is started first where it does not run, and in that case taken away afterwards.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/names.sh"

[ -z "${KUBECONFIG:-}" ] || exec "$@"
if [ ! -e "$STATE/up" ]; then
  trap '"$HERE/down.sh"' EXIT
  trap 'exit 130' INT TERM
fi
use=$("$HERE/up.sh")
"$HERE/../../deploy/image.sh"
"$HERE/load.sh" "$HERE/../../target/image/expertmesh.tar"
eval "$use"
"$@"
