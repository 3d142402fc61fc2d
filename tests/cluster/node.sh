# shellcheck shell=bash
# node.sh: what makes a node of a pair of namespaces. Sourced by up.sh.
#
# Several nodes on one kernel need each their own cgroup, containerd root and state, kubelet directories and certificates. Paths that
# containerd, CNI and kubelet have wired in get a private tmpfs, so that nodes do not share them and the host does not keep them.

# start_node NODE: its network and its containerd.
start_node() {
  local node=$1 dir=$STATE/$1
  mkdir -p "$dir/cni" "$dir/pods" "$RUN/$node"
  make_cgroup "$TOP/$node"
  hold "$node" --mount --net --propagation private
  private_directories "$node"
  connect "$node"
  write_cni_config "$node"
  write_containerd_config "$node"
  start "$node-containerd" nsenter --target "$(pid_of "$node")" --mount --net containerd --config "$dir/containerd.toml"
}

WIRED_IN="/run/containerd /var/log /var/lib/cni /var/lib/kubelet /opt/containerd"

private_directories() {
  # shellcheck disable=SC2086 # words
  mkdir -p $WIRED_IN
  inside "$1" sh -ec "mount --make-rshared /; for d in $WIRED_IN; do mount -t tmpfs node \$d; done"
}

# Nodes know the way to each other's pods, so packets between them do not pass the host; everything else is unreachable.
connect() {
  local node=$1 number=${1#node-} other
  plug "$node" eth0 "$(pid_of "$node")"
  inside "$node" sh -ec "
    ip link set lo up; ip address add 10.201.0.1$number/24 dev eth0; ip link set eth0 up
    ip route add unreachable default; sysctl -qw net.ipv4.ip_forward=1"
  for other in $(node_names); do
    [ "$other" = "$node" ] || inside "$node" ip route add "10.244.${other#node-}.0/24" via "10.201.0.1${other#node-}"
  done
  ip route add "10.244.$number.0/24" via "10.201.0.1$number"
  [ "$number" != 1 ] || ip route add "$SERVICES" via 10.201.0.11 || die "$SERVICES is in use on this machine"
}

write_cni_config() {
  cat >"$STATE/$1/cni/10-pods.conflist" <<JSON
{"cniVersion": "1.0.0", "name": "pods", "plugins": [{
  "type": "bridge", "bridge": "cni0", "isGateway": true, "isDefaultGateway": true, "ipMasq": false, "hairpinMode": true,
  "ipam": {"type": "host-local", "dataDir": "$STATE/$1/addresses", "ranges": [[{"subnet": "10.244.${1#node-}.0/24"}]]}
}]}
JSON
}

# restrict_oom_score_adj: without CAP_SYS_RESOURCE (a container as the host) no sandbox could start with its negative score:
# "can't get final child's PID from pipe: EOF".
write_containerd_config() {
  cat >"$STATE/$1/containerd.toml" <<TOML
version = 2
root = "$STATE/$1/containerd"
state = "$RUN/$1/state"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.internal.v1.tracing"]

[grpc]
  address = "$(containerd_socket "$1")"
[ttrpc]
  address = "$(containerd_socket "$1").ttrpc"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "$PAUSE_IMAGE"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$STATE/$1/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
TOML
}

# start_kubelet NODE: with the one image it cannot do without, and the kube-proxy beside it.
start_kubelet() {
  local node=$1 dir=$STATE/$1 enter
  enter=(nsenter --target "$(pid_of "$node")" --mount --net)
  wait_for "$node's containerd" 30 ctr --address "$(containerd_socket "$node")" version
  ctr --address "$(containerd_socket "$node")" --namespace k8s.io images import "$PAUSE_ARCHIVE" >/dev/null
  write_kubelet_config "$node"
  start "$node-kubelet" "${enter[@]}" "$BIN/kubelet" --config="$dir/kubelet.yaml" --kubeconfig="$PKI/$node.kubeconfig" \
    --hostname-override="$node" --node-ip="10.201.0.1${node#node-}" --root-dir="$dir/kubelet" --cert-dir="$dir/certificates"
  # nftables: iptables is not asked for. conntrack-max 0: the limit is the kernel's, not this namespace's.
  start "$node-proxy" "${enter[@]}" "$BIN/kube-proxy" --kubeconfig="$PKI/proxy.kubeconfig" --hostname-override="$node" \
    --proxy-mode=nftables --cluster-cidr="$PODS" --conntrack-max-per-core=0 --nodeport-addresses=0.0.0.0/0
}

write_kubelet_config() {
  cat >"$STATE/$1/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: 0.0.0.0
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $PKI/ca.crt}}
authorization: {mode: Webhook}
tlsCertFile: $PKI/$1.crt
tlsPrivateKeyFile: $PKI/$1.key
containerRuntimeEndpoint: unix://$(containerd_socket "$1")
cgroupDriver: cgroupfs
cgroupRoot: /$TOP/$1
failCgroupV1: false
failSwapOn: false
clusterDNS: [$HOST_IP]
clusterDomain: cluster.local
podLogsDir: $STATE/$1/pods
volumePluginDir: $STATE/$1/volume-plugins
nodeStatusUpdateFrequency: 4s
syncFrequency: 10s
# Absolute: a share of a disk that others fill, too, says nothing of what is left for pods.
evictionHard: {memory.available: 200Mi, nodefs.available: 200Mi, imagefs.available: 200Mi}
imageGCHighThresholdPercent: 100
YAML
}
