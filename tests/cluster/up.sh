#!/usr/bin/env bash
# up.sh: a real Kubernetes on this machine (names.sh has the picture), from the binaries of build.sh and Debian's packages.
# Prints the line that makes it this shell's cluster. Running and healthy: nothing is done. Half dead: taken away and started anew.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/names.sh"
. "$HERE/node.sh"
one_at_a_time "$@"
PKI=$STATE/pki
PAUSE_IMAGE=expertmesh.dev/pause:1
PAUSE_ARCHIVE=$CLUSTER/pause.tar

main() {
  if healthy; then
    kubectl get nodes -o name | xargs -n1 "$BIN/kubectl" uncordon >/dev/null # a test that was killed may have cordoned them
    say_how_to_use
    return
  fi
  check_machine
  "$HERE/down.sh"
  trap failed ERR
  mkdir -p "$STATE/logs" "$RUN"
  echo "$CLUSTER" >"$RUN/owner"
  remember_sysctls
  make_cgroup "$TOP"
  make_cgroup "$TOP/host"
  "$HERE/pki.sh" "$PKI"
  start_switch
  start_etcd
  start_apiserver # takes seconds; the nodes are made meanwhile
  make_pause_image
  for node in $(node_names); do start_node "$node"; done
  wait_for "the API server" 60 "$BIN/kubectl" --kubeconfig "$PKI/admin.kubeconfig" get --raw /readyz
  start_controller_manager
  start_scheduler
  start_coredns
  for node in $(node_names); do start_kubelet "$node"; done
  cp "$PKI/admin.kubeconfig" "$KUBECONFIG_ADMIN"
  wait_for "the nodes" 60 nodes_are_ready
  wait_for "the default account, without which no pod is made," 30 kubectl get serviceaccount default
  touch "$STATE/up"
  say_how_to_use
}

say_how_to_use() { echo "export KUBECONFIG=$KUBECONFIG_ADMIN PATH=$BIN:\$PATH"; }

# Everything that was started still runs, and the API server says that it is ready.
healthy() {
  [ -e "$STATE/up" ] || return 1
  local file name
  for file in "$STATE"/*.pid; do
    name=$(basename "$file" .pid)
    [ "$name" = prometheus ] || pid_of "$name" >/dev/null || return 1
  done
  kubectl get --raw /readyz --request-timeout 5s >/dev/null 2>&1
}

check_machine() {
  [ "$(id -u)" = 0 ] || die "a node is a set of namespaces, and making those needs root"
  local tool owner
  for tool in containerd ctr runc buildah nft ip nsenter unshare openssl gcc flock; do
    command -v $tool >/dev/null || die "$tool is missing (tests/setup.sh installs it on Debian)"
  done
  [ -x "$BIN/kubelet" ] || die "no binaries yet: run tests/cluster/build.sh"
  owner=$(cat "$RUN/owner" 2>/dev/null || true)
  if [ -n "$owner" ] && [ "$owner" != "$CLUSTER" ] && [ -n "$(our_processes)" ]; then
    die "the cluster of $owner runs on this machine; run \`make cluster-down\` there first"
  fi
}

failed() { echo "cluster: start failed; logs are in $STATE/logs (\`make cluster-down\` clears them)" >&2; }

nodes_are_ready() {
  [ "$(kubectl get nodes -o name | wc -l)" = "$NODES" ] && kubectl wait --for=condition=Ready nodes --all --timeout=1s
}

# A kubelet sets these for the whole kernel; down.sh sets them back.
remember_sysctls() {
  sysctl vm.overcommit_memory vm.panic_on_oom kernel.panic kernel.panic_on_oops kernel.keys.root_maxkeys kernel.keys.root_maxbytes \
    >"$RUN/sysctl.conf" 2>/dev/null || true
}

# make_cgroup PATH: in every tree, with every controller that its parent has.
make_cgroup() {
  local tree dir parent
  for tree in $(cgroup_trees); do
    dir=$tree/$1 parent=$(dirname "$tree/$1")
    if cgroup_v2; then
      sed 's/\(^\| \)/ +/g' "$parent/cgroup.controllers" >"$parent/cgroup.subtree_control" 2>/dev/null ||
        die "cannot hand on the controllers of $parent (cgroup v2 inside a container is not supported)"
    fi
    mkdir -p "$dir"
    if [ -e "$dir/cpuset.mems" ] && ! cgroup_v2; then # else nothing may enter it
      cat "$parent/cpuset.cpus" >"$dir/cpuset.cpus"
      cat "$parent/cpuset.mems" >"$dir/cpuset.mems"
    fi
  done
}

# hold NAME OPTION...: a process that keeps new namespaces alive.
hold() {
  start "$1" unshare "${@:2}" sleep infinity
  wait_for "the namespace of $1" 10 has_own_network $!
}

has_own_network() { [ "$(readlink "/proc/$1/ns/net")" != "$(readlink /proc/self/ns/net)" ]; }

# A switch of its own rather than a bridge on the host: there, another program's packet filter (Docker's) may drop what passes it.
start_switch() {
  hold switch --net
  local switch
  switch=$(pid_of switch)
  nsenter --target "$switch" --net sh -ec 'ip link add br0 type bridge; ip link set br0 up'
  plug host "$LINK" 1
  ip address add "$HOST_IP/24" dev "$LINK"
  ip link set "$LINK" up
  ip route add unreachable "$PODS" || die "$PODS is in use on this machine" # pods of no node: never out of here
}

# plug NAME LINK PID: a wire from the switch (where its end is called NAME) to LINK in the network namespace of PID.
plug() {
  local switch
  switch=$(pid_of switch)
  ip link add "$2" netns "$3" type veth peer name "$1" netns "$switch"
  nsenter --target "$switch" --net ip link set "$1" master br0 up
}

make_pause_image() {
  [ "$PAUSE_ARCHIVE" -nt "$HERE/pause.c" ] && return
  gcc -Os -static -o "$STATE/pause" "$HERE/pause.c"
  "$HERE/image.sh" "$PAUSE_IMAGE" "$PAUSE_ARCHIVE" "$STATE/pause"
}

start_etcd() {
  start etcd "$BIN/etcd" --data-dir "$STATE/etcd" --unsafe-no-fsync --log-level warn \
    --listen-client-urls http://127.0.0.1:23790 --advertise-client-urls http://127.0.0.1:23790 \
    --listen-peer-urls http://127.0.0.1:23800 --initial-advertise-peer-urls http://127.0.0.1:23800 \
    --initial-cluster default=http://127.0.0.1:23800
}

# Aggregator routing lets the API server reach aggregated APIs and webhooks in pods: it has no kube-proxy at its side.
start_apiserver() {
  audit_policy >"$STATE/audit-policy.yaml"
  start apiserver "$BIN/kube-apiserver" --etcd-servers=http://127.0.0.1:23790 \
    --bind-address="$HOST_IP" --advertise-address="$HOST_IP" --secure-port=6443 --service-cluster-ip-range="$SERVICES" \
    --tls-cert-file="$PKI/apiserver.crt" --tls-private-key-file="$PKI/apiserver.key" --client-ca-file="$PKI/ca.crt" \
    --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction --allow-privileged=true \
    --service-account-issuer=https://kubernetes.default.svc --service-account-signing-key-file="$PKI/service-accounts.key" \
    --service-account-key-file="$PKI/service-accounts.pub" \
    --kubelet-client-certificate="$PKI/kubelet-client.crt" --kubelet-client-key="$PKI/kubelet-client.key" \
    --kubelet-preferred-address-types=InternalIP --enable-aggregator-routing=true \
    --proxy-client-cert-file="$PKI/front-proxy.crt" --proxy-client-key-file="$PKI/front-proxy.key" \
    --requestheader-client-ca-file="$PKI/ca.crt" --requestheader-allowed-names=front-proxy \
    --requestheader-username-headers=X-Remote-User --requestheader-group-headers=X-Remote-Group \
    --requestheader-extra-headers-prefix=X-Remote-Extra- \
    --audit-policy-file="$STATE/audit-policy.yaml" --audit-log-path="$STATE/logs/audit.log"
}

# A line for each of the operator's requests, but for watches and its Lease: tests count them.
audit_policy() {
  cat <<'YAML'
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- {level: None, verbs: [watch]}
- {level: None, resources: [{group: coordination.k8s.io}]}
- {level: Metadata, users: ["system:serviceaccount:expertmesh-system:expertmesh"]}
- {level: None}
YAML
}

# client NAME: the three ways in which a part of the control plane is told its kubeconfig.
client() { for flag in kubeconfig authentication-kubeconfig authorization-kubeconfig; do echo "--$flag=$PKI/$1.kubeconfig"; done; }

# It may ask ten times as often as usual: whole namespaces come and go here at once, and at 20 requests a second garbage waits for minutes.
# shellcheck disable=SC2046 # client prints words
start_controller_manager() {
  start controller-manager "$BIN/kube-controller-manager" $(client controller-manager) --bind-address=127.0.0.1 --leader-elect=false \
    --use-service-account-credentials=true --service-account-private-key-file="$PKI/service-accounts.key" \
    --root-ca-file="$PKI/ca.crt" --cluster-signing-cert-file="$PKI/ca.crt" --cluster-signing-key-file="$PKI/ca.key" \
    --allocate-node-cidrs=false --node-monitor-grace-period=20s --kube-api-qps=200 --kube-api-burst=400 --horizontal-pod-autoscaler-sync-period=5s
}

# shellcheck disable=SC2046
start_scheduler() {
  start scheduler "$BIN/kube-scheduler" $(client scheduler) --bind-address=127.0.0.1 --leader-elect=false
}

start_coredns() {
  cat >"$STATE/Corefile" <<COREFILE
.:53 {
  bind $HOST_IP
  errors
  kubernetes cluster.local in-addr.arpa {
    kubeconfig $PKI/admin.kubeconfig
    pods insecure
  }
  cache 5
}
COREFILE
  start coredns "$BIN/coredns" -conf "$STATE/Corefile"
}

main
