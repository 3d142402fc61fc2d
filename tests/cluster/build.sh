#!/usr/bin/env bash
# build.sh [--check]: the test cluster's binaries, from the Go module proxy, into target/cluster/bin.
#
# Each folder beside this file is a Go module whose `tool` lines name what to build; they are apart because their
# dependencies do not agree. A module whose go.mod and go.sum have not changed since its last build costs nothing.
# Cold: 6 to 7 minutes on two cores. To move to another version: edit go.mod, run `go mod tidy` there, build, commit both.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
CHECK=${1:-} # --check: build nothing, only say by the exit status whether all is built
BIN=$HERE/../../target/cluster/bin
export CGO_ENABLED=0

# The version that kubernetes/go.mod pins. The binaries call themselves v0.0.0 unless the linker is told, and clients refuse that.
kubernetes_version() { sed -n 's/^\tk8s.io\/kubernetes \(v[0-9.]*\).*/\1/p' "$HERE/kubernetes/go.mod"; }

kubernetes_ldflags() {
  local version minor v=k8s.io/component-base/version
  version=$(kubernetes_version) minor=${version#v1.}
  echo "-X $v.gitVersion=$version -X $v.gitMajor=1 -X $v.gitMinor=${minor%%.*}"
}

# build MODULE OUTPUT [LDFLAGS]: all tools of a module. OUTPUT ends with a slash where the binaries keep their packages' names.
build() {
  local module=$1 output=$2 ldflags="-s -w ${3:-}" stamp want
  stamp=$BIN/.$module.stamp
  want=$(cd "$HERE/$module" && { cat go.mod go.sum; echo "$ldflags"; } | sha256sum)
  [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && return
  [ -z "$CHECK" ] || exit 1
  echo "building $module for the test cluster" >&2
  rm -f "$stamp"
  (cd "$HERE/$module" && nice -n 5 go build -trimpath -buildvcs=false -ldflags "$ldflags" -o "$output" tool)
  echo "$want" >"$stamp"
}

main() {
  mkdir -p "$BIN" && BIN=$(cd "$BIN" && pwd)
  build helm "$BIN/helm"
  build etcd "$BIN/etcd"
  build coredns "$BIN/coredns"
  build kubernetes "$BIN/" "$(kubernetes_ldflags)"
}

main
