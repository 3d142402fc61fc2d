#!/usr/bin/env bash
# addon.sh keda|metrics-server: that into the test cluster, from the binaries and the manifests that build.sh puts into target/cluster.
# Installed already: the same is applied again.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/names.sh"
one_at_a_time "$@"
ADDON=$1
DIR=$CLUSTER/$ADDON

main() {
  [ -e "$STATE/up" ] || die "no cluster runs: make cluster"
  [ -x "$DIR/${BINARIES[0]}" ] || die "no $ADDON yet: run tests/cluster/build.sh scalers"
  "$HERE/image.sh" "expertmesh.dev/tests/$ADDON:built" "$DIR/$ADDON.tar" "${BINARIES[@]/#/$DIR/}"
  "$HERE/load.sh" "$DIR/$ADDON.tar" >/dev/null
  cp "$HERE/$ADDON/kustomization.yaml" "$DIR"
  kubectl kustomize "$DIR" 2>/dev/null | kubectl apply --server-side --force-conflicts --filename - >/dev/null
  kubectl wait --for=condition=Available --timeout=120s --namespace "$NAMESPACE" "${DEPLOYMENTS[@]/#/deployment/}" >/dev/null
  kubectl wait --for=condition=Available --timeout=120s "apiservice/$API" >/dev/null
}

case $ADDON in
keda)
  BINARIES=(operator adapter) NAMESPACE=keda DEPLOYMENTS=(keda-operator keda-metrics-apiserver) API=v1beta1.external.metrics.k8s.io
  ;;
metrics-server)
  BINARIES=(metrics-server) NAMESPACE=kube-system DEPLOYMENTS=(metrics-server) API=v1beta1.metrics.k8s.io
  ;;
*) die "no addon is called $ADDON" ;;
esac
main
