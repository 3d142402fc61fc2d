# shellcheck shell=bash disable=SC2034
# names.sh: what the scripts here agree on. Sourced, never run.
#
# The cluster on one machine:
#
#   host      etcd, kube-apiserver, -controller-manager, -scheduler and CoreDNS as plain processes on 10.201.0.1
#   switch    a network namespace with the bridge that joins the host and the nodes
#   node-N    a network and mount namespace with its own containerd, kubelet and kube-proxy on 10.201.0.1N; pods 10.244.N.0/24
#
# Every namespace is held by a `sleep`, and every process that is started here sits in the cgroup $OURS or in its node's. Ending
# what is in those cgroups therefore ends the cluster, and its links, mounts and namespaces go with the last process in them.

CLUSTER=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/target/cluster
BIN=$CLUSTER/bin                     # survives `make cluster-down`
STATE=$CLUSTER/state                 # does not
KUBECONFIG_ADMIN=$CLUSTER/kubeconfig # nor does this
RUN=/run/expertmesh-test             # sockets, whose paths must be short

HOST_IP=10.201.0.1
SERVICES=10.96.0.0/16
PODS=10.244.0.0/16
LINK=em-host # the host's end of the wire to the switch
NODES=${NODES:-3}

die() {
  echo "cluster: $*" >&2
  exit 1
}

kubectl() { "$BIN/kubectl" --kubeconfig "$KUBECONFIG_ADMIN" "$@"; }

# Only one of up, down and load at a time. --close keeps the daemons that are started here from inheriting the lock.
one_at_a_time() {
  [ -n "${CLUSTER_LOCKED:-}" ] && return
  mkdir -p "$CLUSTER"
  CLUSTER_LOCKED=1 exec flock --close "$CLUSTER/lock" "$0" "$@"
}

# --- cgroups: version 1 (a tree per controller) or version 2 (one tree) ---

cgroup_v2() { [ "$(stat -fc %T /sys/fs/cgroup)" = cgroup2fs ]; }
cgroup_trees() { if cgroup_v2; then echo /sys/fs/cgroup; else find /sys/fs/cgroup -mindepth 1 -maxdepth 1 -type d; fi; }
cgroup_of_processes() { if cgroup_v2; then echo /sys/fs/cgroup; else echo /sys/fs/cgroup/pids; fi; }

TOP=expertmesh-test
OURS=$(cgroup_of_processes)/$TOP/host

# The processes of the cluster, pods included.
our_processes() { find "$(cgroup_of_processes)/$TOP" -name cgroup.procs -exec cat {} + 2>/dev/null; }

# The process that NAME's pid file names, if it is alive and ours: an id from before a reboot may be anybody's by now.
pid_of() {
  local pid
  pid=$(cat "$STATE/$1.pid" 2>/dev/null) && grep -qx "$pid" "$OURS/cgroup.procs" 2>/dev/null && echo "$pid"
}

# start NAME COMMAND...: in the background, in our cgroup, with a log and a pid file, and with no other descriptor: whoever reads what
# the caller writes (make, a pipe, a script's lock) would wait for the daemon to end.
start() {
  # shellcheck disable=SC2016 # expands in the child, which enters the cgroup before it becomes COMMAND
  setsid bash -c '
    for fd in /proc/$$/fd/*; do fd=${fd##*/}; [ "$fd" -le 2 ] || eval "exec $fd>&-"; done
    echo $$ >"$0" && exec "$@"' "$OURS/cgroup.procs" "${@:2}" </dev/null >"$STATE/logs/$1.log" 2>&1 &
  echo $! >"$STATE/$1.pid"
}

# wait_for WHAT SECONDS COMMAND...
wait_for() {
  local what=$1 end=$((SECONDS + $2))
  until "${@:3}" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || die "$what did not come up within $2 s; logs are in $STATE/logs"
    sleep 0.2
  done
}

# inside NAME COMMAND...: in the namespaces of a node. Not `ip netns exec`, which mounts /sys anew and so hides the cgroups.
inside() {
  local holder
  holder=$(pid_of "$1") || die "$1 is not running"
  nsenter --target "$holder" --mount --net "${@:2}"
}

containerd_socket() { echo "$RUN/$1/containerd.sock"; }
node_names() { seq -f 'node-%g' "$NODES"; }
running_nodes() { find "$STATE" -maxdepth 1 -name 'node-*.pid' -printf '%f\n' 2>/dev/null | grep -oE '^node-[0-9]+(\.pid)' | sed 's/\.pid//' | sort -u; }
