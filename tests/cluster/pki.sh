#!/usr/bin/env bash
# pki.sh DIR: one authority, the certificates of a control plane and its nodes, and a kubeconfig for each that is a client.
# Test material: made anew with every cluster, and gone with it.
set -euo pipefail
. "$(dirname "$0")/names.sh"
mkdir -p "$1" && cd "$1"

key=(-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -noenc)

# certificate NAME SUBJECT [SUBJECT_ALT_NAME]
certificate() {
  openssl req -x509 -CA ca.crt -CAkey ca.key "${key[@]}" -keyout "$1.key" -out "$1.crt" -days 3650 -subj "$2" \
    -addext basicConstraints=critical,CA:false ${3:+-addext "subjectAltName=$3"} 2>/dev/null
}

# kubeconfig NAME: with everything inside, so that it may be copied.
kubeconfig() {
  cat >"$1.kubeconfig" <<YAML
apiVersion: v1
kind: Config
clusters:
- name: expertmesh-test
  cluster:
    server: https://$HOST_IP:6443
    certificate-authority-data: $(base64 -w0 ca.crt)
users:
- name: $1
  user:
    client-certificate-data: $(base64 -w0 "$1.crt")
    client-key-data: $(base64 -w0 "$1.key")
contexts:
- name: expertmesh-test
  context: {cluster: expertmesh-test, user: $1}
current-context: expertmesh-test
YAML
}

openssl req -x509 "${key[@]}" -keyout ca.key -out ca.crt -days 3650 -subj /CN=expertmesh-test 2>/dev/null
certificate apiserver /CN=kube-apiserver "DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,\
DNS:kubernetes.default.svc.cluster.local,DNS:localhost,IP:127.0.0.1,IP:10.96.0.1,IP:$HOST_IP"
certificate kubelet-client /O=system:masters/CN=kube-apiserver-kubelet-client
certificate front-proxy /CN=front-proxy # the API server's name when it calls an aggregated API
certificate admin /O=system:masters/CN=admin
certificate controller-manager /CN=system:kube-controller-manager
certificate scheduler /CN=system:kube-scheduler
certificate proxy /CN=system:kube-proxy
certificate prometheus /CN=prometheus
for node in $(node_names); do
  certificate "$node" "/O=system:nodes/CN=system:node:$node" "DNS:$node,IP:127.0.0.1,IP:10.201.0.1${node#node-}"
done
openssl ecparam -name prime256v1 -genkey -noout -out service-accounts.key
openssl ec -in service-accounts.key -pubout -out service-accounts.pub 2>/dev/null
for client in admin controller-manager scheduler proxy prometheus $(node_names); do kubeconfig "$client"; done
