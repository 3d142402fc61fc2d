#!/usr/bin/env bash
# build.sh [--check] [PART]: the test cluster's binaries, from the Go module proxy, into target/cluster. Parts: cluster (the default),
# prometheus, scalers (KEDA and metrics-server, each with its manifests).
#
# Each folder beside this file is a Go module whose `tool` lines name what to build; they are apart because their
# dependencies do not agree. A module whose go.mod and go.sum have not changed since its last build costs nothing.
# Cold, on two cores: 6 to 7 minutes, 1.5 for Prometheus, 7 for the scalers. To move to another version: edit go.mod, run `go mod tidy`
# there, build, commit both.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
CHECK= # --check: build nothing, only say by the exit status whether all is built
[ "${1:-}" != --check ] || { CHECK=yes && shift; }
PART=${1:-cluster}
CLUSTER=$HERE/../../target/cluster
BIN=$CLUSTER/bin
export CGO_ENABLED=0

# The version that kubernetes/go.mod pins. The binaries call themselves v0.0.0 unless the linker is told, and clients refuse that.
kubernetes_version() { sed -n 's/^\tk8s.io\/kubernetes \(v[0-9.]*\).*/\1/p' "$HERE/kubernetes/go.mod"; }

kubernetes_ldflags() {
  local version minor v=k8s.io/component-base/version
  version=$(kubernetes_version) minor=${version#v1.}
  echo "-X $v.gitVersion=$version -X $v.gitMajor=1 -X $v.gitMinor=${minor%%.*}"
}

# build MODULE OUTPUT [LDFLAGS] [TAGS]: all tools of a module. OUTPUT ends with a slash where the binaries keep their packages' names.
build() {
  local module=$1 output=$2 ldflags="-s -w ${3:-}" tags=${4:-} stamp want
  stamp=$BIN/.$module.stamp
  want=$(cd "$HERE/$module" && { cat go.mod go.sum; echo "$ldflags${tags:+ $tags}"; } | sha256sum)
  [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && [ -e "$output" ] && return
  [ -z "$CHECK" ] || exit 1
  echo "building $module for the test cluster" >&2
  rm -rf "$stamp" "${CLUSTER:?}/$module"
  (cd "$HERE/$module" && nice -n 5 go build -trimpath -buildvcs=false -tags "$tags" -ldflags "$ldflags" -o "$output" tool)
  echo "$want" >"$stamp"
}

# manifests MODULE GO_MODULE FOLDER: that folder of the Go module beside the binaries.
manifests() {
  local to=$CLUSTER/$1/$3 from
  [ ! -d "$to" ] || return 0
  [ -z "$CHECK" ] || exit 1
  from=$(cd "$HERE/$1" && go list -m -f '{{.Dir}}' "$2")
  rm -rf "$to.part" && cp -r "$from/$3" "$to.part" && chmod -R u+w "$to.part" && mv "$to.part" "$to"
}

mkdir -p "$BIN" && CLUSTER=$(cd "$CLUSTER" && pwd) && BIN=$CLUSTER/bin
case $PART in
cluster)
  build helm "$BIN/helm"
  build etcd "$BIN/etcd"
  build coredns "$BIN/coredns"
  build kubernetes "$BIN/" "$(kubernetes_ldflags)"
  ;;
prometheus)
  # Debian's knows no Kubernetes. Without those of two dozen clouds it is built in a third of the time.
  build prometheus "$BIN/prometheus" "" remove_all_sd,enable_kubernetes_sd
  ;;
scalers)
  build keda "$CLUSTER/keda/"
  manifests keda github.com/kedacore/keda/v2 config
  build metrics-server "$CLUSTER/metrics-server/"
  manifests metrics-server sigs.k8s.io/metrics-server manifests
  ;;
*) echo "build: no part is called $PART" >&2 && exit 2 ;;
esac
