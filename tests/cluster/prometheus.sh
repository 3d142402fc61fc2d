#!/usr/bin/env bash
# prometheus.sh: a Prometheus beside the test cluster, a process of the host with deploy/prometheus.yaml and its alerts. Prints its
# URL, which pods reach too, and which answers queries (a Go module has no web pages to show). Running: it reads its files again.
# down.sh ends it with the rest.
#
# What is changed in the files: intervals and how long alerts hold back, since a test waits for what is seen; and that it is outside of
# the cluster.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/names.sh"
one_at_a_time "$@"
INTERVAL=2s
DEPLOY=$HERE/../../deploy
DIR=$STATE/prometheus
ADDRESS=$HOST_IP:9090

main() {
  [ -e "$STATE/up" ] || die "no cluster runs: make cluster"
  [ -x "$BIN/prometheus" ] || die "no Prometheus yet: run tests/cluster/build.sh prometheus"
  configure
  if pid_of prometheus >/dev/null; then
    kill -HUP "$(pid_of prometheus)"
  else
    start prometheus "$BIN/prometheus" --config.file "$DIR/prometheus.yaml" --storage.tsdb.path "$DIR/data" --storage.tsdb.retention.time 6h \
      --storage.tsdb.retention.size 256MB --web.listen-address "$ADDRESS" --web.external-url "http://$ADDRESS" --log.level warn
  fi
  announce
  wait_for Prometheus 30 answers
  echo "http://$ADDRESS"
}

answers() (exec 3<>"/dev/tcp/${ADDRESS/:/\/}" && printf 'GET /-/ready HTTP/1.0\r\n\r\n' >&3 && grep -q ' 200 OK' <&3)

# It may list pods, which is all that finding them takes.
configure() {
  mkdir -p "$DIR"
  rm -rf "$DIR/alerts" && mkdir "$DIR/alerts"
  sed -E "s/^( +for:) .*/\1 $INTERVAL/" "$DEPLOY/alerts/expertmesh.yaml" >"$DIR/alerts/expertmesh.yaml"
  sed -E "s/^(  (scrape|evaluation)_interval:) .*/\1 $INTERVAL/
    /kubernetes_sd_configs:/ { n; s|^( *)- role: pod\$|&\n\1  kubeconfig_file: $STATE/pki/prometheus.kubeconfig| }" \
    "$DEPLOY/prometheus.yaml" >"$DIR/prometheus.yaml"
  kubectl get clusterrolebinding prometheus >/dev/null 2>&1 && return
  kubectl create clusterrole prometheus --verb=get,list,watch --resource=pods >/dev/null
  kubectl create clusterrolebinding prometheus --clusterrole=prometheus --user=prometheus >/dev/null
}

# In the cluster it is where the samples expect one: http://prometheus.monitoring.svc:9090.
announce() {
  kubectl apply --server-side --filename - >/dev/null <<YAML
apiVersion: v1
kind: Namespace
metadata: {name: monitoring}
---
apiVersion: v1
kind: Service
metadata: {name: prometheus, namespace: monitoring}
spec: {ports: [{port: 9090}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: prometheus, namespace: monitoring, labels: {kubernetes.io/service-name: prometheus}}
addressType: IPv4
endpoints: [{addresses: [$HOST_IP]}]
ports: [{port: 9090}]
YAML
}

main
