#!/usr/bin/env bash
# down.sh: ends the cluster, whole or half dead, and leaves nothing of it but the binaries. Ends only what sits in the cluster's own
# cgroups; links, mounts and namespaces go with those processes.
set -euo pipefail
. "$(dirname "$0")/names.sh"
one_at_a_time "$@"

main() {
  other_checkout_runs && die "the cluster of $(cat "$RUN/owner") runs on this machine, not this one's; run \`make cluster-down\` there"
  end_processes
  ip route delete unreachable "$PODS" 2>/dev/null || true
  ip link delete "$LINK" 2>/dev/null || true
  [ ! -e "$RUN/sysctl.conf" ] || sysctl -qp "$RUN/sysctl.conf" 2>/dev/null || true
  remove_cgroups
  # What was only a place to mount on; a directory that holds anything belongs to somebody else.
  rmdir --ignore-fail-on-non-empty /opt/containerd /var/lib/cni /var/lib/kubelet /run/containerd 2>/dev/null || true
  rm -rf "$RUN" "$STATE" "$KUBECONFIG_ADMIN"
}

other_checkout_runs() {
  [ -e "$RUN/owner" ] && [ "$(cat "$RUN/owner")" != "$CLUSTER" ] && [ -n "$(our_processes)" ]
}

# Nothing here is worth a graceful end: the state goes too. Again and again, since a process may be forking just now.
end_processes() {
  local end=$((SECONDS + 20)) processes
  while processes=$(our_processes) && [ -n "$processes" ]; do
    [ $SECONDS -lt $end ] || die "these processes do not end: ${processes//$'\n'/ }"
    # shellcheck disable=SC2086 # words
    kill -KILL $processes 2>/dev/null || true
    sleep 0.1
  done
}

remove_cgroups() {
  local tree end=$((SECONDS + 10))
  for tree in $(cgroup_trees); do
    until [ ! -d "$tree/$TOP" ] || find "$tree/$TOP" -depth -type d -exec rmdir {} + 2>/dev/null; do
      [ $SECONDS -lt $end ] || die "the cgroup $tree/$TOP is still busy"
      sleep 0.1
    done
  done
}

main
